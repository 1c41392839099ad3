//! The memory-mapped device of the guest `mmio`.

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_ops::Gpa;

/// A device with one word of state: a 4-byte write to register 0 mixes a value in, a 4-byte read of
/// register 4 returns the state. The value read depends on every earlier write and on their order.
#[derive(Debug, Default)]
pub(crate) struct Mixer(AtomicU32);

impl Mixer {
    /// The address of register 0.
    pub(crate) const BASE: Gpa = Gpa::new(0xe000_0000);
    /// The address of register 4.
    pub(crate) const STATE: Gpa = Gpa::new(0xe000_0004);

    /// Handles a write; returns `false` if it is not for this device.
    pub(crate) fn write(&self, gpa: Gpa, data: &[u8]) -> bool {
        let (Self::BASE, Ok(bytes)) = (gpa, data.try_into()) else {
            return false;
        };
        let value = u32::from_le_bytes(bytes);
        let mix = |state: u32| Some(state.rotate_left(5) ^ value);
        // The closure always returns `Some`, so the update cannot fail.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, mix);
        true
    }

    /// Handles a read; returns `false` if it is not for this device.
    pub(crate) fn read(&self, gpa: Gpa, data: &mut [u8]) -> bool {
        if gpa != Self::STATE || data.len() != 4 {
            return false;
        }
        data.copy_from_slice(&self.0.load(Ordering::SeqCst).to_le_bytes());
        true
    }
}
