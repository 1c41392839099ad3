//! A normal VM on Intel VT-x.

use kvm_ops::{Gpa, Host, PlainVm, Result, Tech, VmId, VmParams, VmPort};

use crate::VmxVcpu;

/// Where the pages for real mode lie: the top of the 4 GiB space below the firmware's largest ROM
/// (16 MiB), where Linux VMMs put them too. Three pages of TSS follow one page of identity map.
const IDENTITY_MAP: Gpa = Gpa::new(0xfeff_c000);
const TSS: Gpa = Gpa::new(0xfeff_d000);

/// A normal VM on Intel VT-x.
#[derive(Debug)]
pub struct VmxVm<H: Host> {
    plain: PlainVm<H>,
}

impl<H: Host> VmxVm<H> {
    /// Creates it on its host.
    ///
    /// # Errors
    /// Parameters out of range, and what the host answers.
    pub fn create(host: &H, id: VmId, params: &VmParams) -> Result<Self> {
        PlainVm::create(host, id, Tech::Vmx, params).map(|plain| Self { plain })
    }

    /// The VM below, for what only its platform offers.
    #[inline]
    pub fn port(&self) -> &H::Vm {
        self.plain.port()
    }
}

/// A processor without "unrestricted guest" runs real mode in virtual-8086 mode, with a TSS and an
/// identity-mapped page table that guests must not use (Linux api.rst, KVM_SET_TSS_ADDR and
/// KVM_SET_IDENTITY_MAP_ADDR). Both must be placed before the first vCPU.
fn set_up<P: VmPort>(port: &P) -> Result<()> {
    port.set_identity_map_addr(IDENTITY_MAP)?;
    port.set_tss_addr(TSS)
}

kvm_ops::plain_vm_ops!(VmxVm, VmxVcpu, Tech::Vmx, set_up);
