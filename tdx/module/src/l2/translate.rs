//! Addresses of L1 that the module itself uses: the page of an L2 VM's state and its virtual APIC page. They are
//! translated when a VM is entered, and kept while no page can have been taken away.

use super::vmcs::{NONE, PerVm, Vmcs};
use crate::pamt::PageSize;
use crate::platform::Platform;
use crate::sept::SeptState;
use crate::td::Td;
use crate::vcpu::VcpuContext;

/// Translates both addresses where needed; the error is the GPA that cannot be.
pub(crate) fn translate(
    p: &Platform,
    td: &Td,
    ctx: &mut VcpuContext,
    vm: usize,
) -> Result<(), u64> {
    translate_state(p, td, ctx, vm)?;
    if ctx.per_vm(PerVm::VapicHpa, vm) == NONE {
        let gpa = ctx.per_vm(PerVm::VapicGpa, vm);
        let hpa = leaf_address(p, td, gpa).ok_or(gpa)?;
        ctx.set_per_vm(PerVm::VapicHpa, vm, hpa);
        ctx.set_vmcs(vm, Vmcs::VirtualApicPage, hpa);
    }
    Ok(())
}

/// Translates the address of the state only.
pub(crate) fn translate_state(
    p: &Platform,
    td: &Td,
    ctx: &mut VcpuContext,
    vm: usize,
) -> Result<(), u64> {
    if ctx.per_vm(PerVm::StateHpa, vm) == NONE {
        let gpa = ctx.per_vm(PerVm::StateGpa, vm);
        let hpa = leaf_address(p, td, gpa).ok_or(gpa)?;
        ctx.set_per_vm(PerVm::StateHpa, vm, hpa);
    }
    Ok(())
}

/// The host address, with the TD's key id, of memory that L1 can access.
fn leaf_address(p: &Platform, td: &Td, gpa: u64) -> Option<u64> {
    if !td.is_valid_private_gpa(gpa) {
        return None;
    }
    let walked = td.walk(&p.tables, gpa, 0)?;
    let size = PageSize::from_level(walked.level)?;
    (walked.content.state() == SeptState::Mapped).then(|| {
        let hpa = walked.content.hpa() + (gpa & (size.bytes() - 1));
        hpa | u64::from(td.hkid()) << (52 - p.cfg.keyid_bits)
    })
}
