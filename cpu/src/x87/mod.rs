//! Arithmetic of the x87.
//!
//! It is our own because its results have a precision that the control word chooses, with the exponents of
//! 80 bits, and say in which direction they were rounded; soft-float crates round to the format.

pub(crate) mod arith;
pub(crate) mod convert;
pub(crate) mod function;
pub(crate) mod number;
pub(crate) mod round;
pub(crate) mod wide;
