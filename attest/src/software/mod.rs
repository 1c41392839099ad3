//! Evidence of software platforms: the certificates that a vendor's services issue for hardware.
//!
//! The private keys of these authorities are part of this crate, so that anyone can make evidence.
//! It proves nothing about hardware, and verdicts call its root by that name.

mod kds;

pub use kds::{Kds, KdsError, Revocation, Subject, VekRequest};
