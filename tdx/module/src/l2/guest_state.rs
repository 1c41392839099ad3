//! L2_ENTER_GUEST_STATE: the registers of an L2 VM in L1's memory.

use super::vmcs::{NONE, PerVm, Vmcs};
use crate::memory::IntegrityFailure;
use crate::platform::Platform;
use crate::regs::Regs;
use crate::td::Td;
use crate::vcpu::VcpuContext;

/// Alignment of the structure.
pub(crate) const ALIGNMENT: u64 = 256;
/// Bytes in use: 16 registers in encoding order, RFLAGS, RIP, SSP and the 16 bits of the interrupt status.
const SIZE: usize = 154;
const WORDS: usize = SIZE / 8;

/// Address of the structure, if it has been translated.
fn address(p: &Platform, ctx: &VcpuContext, vm: usize) -> Option<u64> {
    match ctx.per_vm(PerVm::StateHpa, vm) {
        NONE => None,
        hpa => Some(p.cfg.strip(hpa)),
    }
}

/// Loads a VM's registers.
pub(crate) fn load(
    p: &Platform,
    td: &Td,
    ctx: &mut VcpuContext,
    vm: usize,
) -> Result<(), IntegrityFailure> {
    let mut bytes = [0; SIZE];
    if let Some(at) = address(p, ctx, vm) {
        p.mem.private_read(at, &mut bytes, td.key().as_deref())?;
    }
    let (words, status) = bytes.split_at(WORDS * 8);
    let mut state = [0; WORDS];
    for (word, bytes) in state.iter_mut().zip(words.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
    }
    let [gprs @ .., rflags, rip, ssp] = state;
    ctx.set_vmcs(vm, Vmcs::Rsp, gprs[4]);
    ctx.set_vmcs(vm, Vmcs::Rflags, rflags);
    ctx.set_vmcs(vm, Vmcs::Rip, rip);
    ctx.set_vmcs(vm, Vmcs::Ssp, ssp);
    let status = status.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
    ctx.set_vmcs(vm, Vmcs::InterruptStatus, status);
    // RSP is the VMCS's, not one of the registers that software saves.
    ctx.gprs = Regs {
        rsp: 0,
        ..Regs::from_array(gprs)
    };
    Ok(())
}

/// Stores a VM's registers.
pub(crate) fn store(
    p: &Platform,
    td: &Td,
    ctx: &VcpuContext,
    vm: usize,
) -> Result<(), IntegrityFailure> {
    let Some(at) = address(p, ctx, vm) else {
        return Ok(());
    };
    let gprs = Regs {
        rsp: ctx.vmcs(vm, Vmcs::Rsp),
        ..ctx.gprs
    };
    let beside = [Vmcs::Rflags, Vmcs::Rip, Vmcs::Ssp].map(|field| ctx.vmcs(vm, field));
    let status = ctx.vmcs(vm, Vmcs::InterruptStatus) as u16;
    let mut bytes = [0; SIZE];
    let words = gprs.to_array().into_iter().chain(beside);
    for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    bytes[WORDS * 8..].copy_from_slice(&status.to_le_bytes());
    p.mem.private_write(at, &bytes, td.key().as_deref())
}
