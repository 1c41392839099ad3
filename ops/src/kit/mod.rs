//! The back-end test kit: checks that any back end can run on itself.

mod null;

pub use null::{NullVcpu, NullVm};
