//! The machine as a whole.

use super::{PagePort, PspPort, SeamPort, VmPort};
use crate::{Result, Tech, Vendor, VmId, VmParams};

/// A machine that can hold VMs. The value is a handle and cheap to clone.
pub trait Host: Clone + Send + Sync + 'static {
    /// A VM of this machine.
    type Vm: VmPort;
    /// The port for SEAMCALLs; [`NoPort`](super::NoPort) if the host never has one.
    type Seam: SeamPort;
    /// The port to the AMD SP; [`NoPort`](super::NoPort) if the host never has one.
    type Psp: PspPort;
    /// The source of pages for firmware and private memory; [`NoPort`](super::NoPort) if no
    /// technology of the host needs them.
    type Pages: PagePort;

    /// A short name for reports: `kvm`, `sim`, ...
    fn name(&self) -> &'static str;

    /// The vendor of the processors, which decides the technologies that the host can offer.
    fn vendor(&self) -> Vendor;

    /// A number for the next VM, which no other VM of this host has.
    fn next_vm_id(&self) -> VmId;

    /// Creates an empty VM for a back end of `tech`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the host lacks what `params` or `tech`
    /// ask for; otherwise the answer of the system.
    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<Self::Vm>;

    /// True if the system below holds confidential VMs of that technology itself, as Linux does
    /// ([`HeldPort`](super::HeldPort)). Otherwise a back end holds them, by the ports below.
    fn holds(&self, tech: Tech) -> bool {
        let _ = tech;
        false
    }

    /// The kind of code that vCPUs of this host execute.
    fn runs(&self) -> Runs {
        Runs::Processor
    }

    /// The SEAMCALL port, if this machine has a TDX module.
    fn seam(&self) -> Option<&Self::Seam> {
        None
    }

    /// The AMD SP port, if this machine has one.
    fn psp(&self) -> Option<&Self::Psp> {
        None
    }

    /// The physical memory that confidential VMs are made of, if this machine has such memory.
    fn pages(&self) -> Option<&Self::Pages> {
        None
    }
}

/// The kind of code that the vCPUs of a host execute.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Runs {
    /// Machine code in guest memory.
    Processor,
    /// Guest programs, which [`VcpuOps::programs`](crate::VcpuOps::programs) loads.
    Programs,
    /// Machine code in normal VMs, and guest programs in VMs of every technology: a vCPU of a normal
    /// VM is a processor until a program is loaded into it.
    Both,
}

impl Runs {
    /// True if vCPUs of normal VMs execute machine code.
    pub const fn machine_code(self) -> bool {
        matches!(self, Self::Processor | Self::Both)
    }

    /// True if vCPUs take guest programs.
    pub const fn programs(self) -> bool {
        matches!(self, Self::Programs | Self::Both)
    }
}
