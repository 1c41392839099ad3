//! What a VM is created with.

use crate::{Error, Field, Result};

/// The most vCPUs a VM can have, as Linux has it on x86 (`KVM_MAX_VCPUS`).
pub const MAX_VCPUS: u32 = 4096;

/// Where interrupt controllers live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Irqchip {
    /// Nowhere: the embedder injects interrupts itself, and HLT is an exit.
    #[default]
    None,
    /// PIC, IOAPIC and local APICs in the platform, with a PIT. HLT is no exit.
    Full,
    /// Local APICs in the platform, PIC and IOAPIC with the embedder. TDs need it.
    Split,
}

/// What every VM is created with, whatever its technology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmParams {
    /// How many vCPUs the VM may have, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Where its interrupt controllers live.
    pub irqchip: Irqchip,
}

impl VmParams {
    /// That many vCPUs and no irqchip.
    pub const fn new(vcpus: u32) -> Self {
        Self {
            vcpus,
            irqchip: Irqchip::None,
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the number of vCPUs that is out of range.
    pub const fn validate(&self) -> Result<()> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(Error::Invalid(Field::VcpuCount, self.vcpus as u64));
        }
        Ok(())
    }
}
