//! TSC deadlines of L2 VMs, kept with the VMX-preemption timer.

use super::vmcs::{NONE, PerVm, Vmcs};
use crate::platform::Platform;
use crate::vcpu::VcpuContext;

const ACTIVATE: u64 = 1 << 6;
const IA32_VMX_MISC: u32 = 0x485;

/// Sets the timer to the VM's deadline, or switches it off.
pub(crate) fn arm(p: &Platform, ctx: &mut VcpuContext, vm: usize) {
    let controls = ctx.vmcs(vm, Vmcs::PinBasedControls);
    if ctx.per_vm(PerVm::TscDeadline, vm) == NONE {
        ctx.set_vmcs(vm, Vmcs::PinBasedControls, controls & !ACTIVATE);
        return;
    }
    // Half of the range of a 64-bit clock is past.
    let left = ctx
        .per_vm(PerVm::NativeTscDeadline, vm)
        .wrapping_sub(p.machine.tsc());
    let left = if left > left.wrapping_neg() { 0 } else { left };
    let ticks_shift = p.cfg.native_msr(IA32_VMX_MISC) & 0x1F;
    let ticks = (left >> ticks_shift).min(u64::from(u32::MAX));
    ctx.set_vmcs(vm, Vmcs::PreemptionTimer, ticks);
    ctx.set_vmcs(vm, Vmcs::PinBasedControls, controls | ACTIVATE);
}
