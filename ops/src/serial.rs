//! Identities that are unique in the process.

use core::sync::atomic::{AtomicU64, Ordering};

/// The next identity. It is the only global state of the crate: a counter, so that two hosts in one
/// process, which number their VMs alike, cannot take each other's tokens, pages and keys.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// The identity of a pool of keys or a source of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortId(u64);

impl PortId {
    /// An identity that no other value of the process has.
    #[allow(clippy::new_without_default)] // Two defaults would differ.
    pub fn new() -> Self {
        Self(next())
    }
}

/// A number that no other caller in the process gets.
pub(crate) fn next() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}
