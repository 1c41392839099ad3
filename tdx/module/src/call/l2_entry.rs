//! TDH.VP.ENTER of a vCPU that left the TD from an L2 VM: back to that VM, or to L1.

use crate::l2::exit_info::{entry_to_exit, l1_intercepts_entry, l1_registers, redeliver};
use crate::l2::translate::translate_state;
use crate::l2::vmcs::Vmcs;
use crate::l2::{Routing, guest_state};
use crate::platform::Platform;
use crate::regs::Regs;
use crate::status::Code;
use crate::td::Td;
use crate::vcpu::{LastExit, VcpuContext};
use std::sync::atomic::Ordering;

const EPT_VIOLATION: u64 = 48;
const TDCALL_LENGTH: u64 = 4;

/// Returns true if the last exit was an EPT violation on a private GPA, which L1 must be notified of.
pub(super) fn left_by_private_violation(td: &Td, ctx: &VcpuContext) -> bool {
    let vm = ctx.vm();
    vm != 0
        && ctx.vmcs(vm, Vmcs::ExitReason) & 0xFFFF == EPT_VIOLATION
        && ctx.vmcs(vm, Vmcs::GuestPhysicalAddress) & td.shared_bit() == 0
}

impl VcpuContext {
    /// Lets L1 run instead of the VM. This lasts until L1 runs, over entries that fail.
    pub(super) fn route_to_l1(&mut self) {
        if self.routing() == Routing::None {
            self.set_routing(match self.last_exit {
                LastExit::Vmcall { .. } => Routing::Vmcall,
                _ => Routing::Asynchronous,
            });
        }
    }

    /// Copies the registers that the host returns for TDG.VP.VMCALL.
    pub(super) fn take_vmcall_results(&mut self, host: &Regs, mask: u64) {
        let host = host.to_array();
        let mut guest = self.gprs.to_array();
        for (n, slot) in guest.iter_mut().enumerate() {
            if mask >> n & 1 != 0 {
                *slot = host[n];
            }
        }
        self.gprs = Regs {
            rax: 0,
            rcx: mask,
            ..Regs::from_array(guest)
        };
    }
}

/// Completes the exit to L1 if there is to be one. The error is a GPA that cannot be translated.
pub(super) fn reenter(
    p: &Platform,
    td: &Td,
    ctx: &mut VcpuContext,
    host: &Regs,
) -> Result<(), u64> {
    let vm = ctx.vm();
    if ctx.routing() == Routing::None {
        redeliver(ctx);
    }
    if l1_intercepts_entry(ctx) {
        entry_to_exit(ctx);
        ctx.route_to_l1();
    }
    let code = match ctx.routing() {
        Routing::None => return Ok(()),
        Routing::Asynchronous => Code::L2_EXIT_HOST_ROUTED_ASYNC,
        Routing::Vmcall => Code::L2_EXIT_HOST_ROUTED_TDVMCALL,
    };
    if let LastExit::Vmcall { mask } = ctx.last_exit {
        ctx.take_vmcall_results(host, mask);
        ctx.last_exit = LastExit::Other;
    }
    if ctx.routing() == Routing::Vmcall {
        translate_state(p, td, ctx, vm)?;
        if guest_state::store(p, td, ctx, vm).is_err() {
            td.fatal.store(true, Ordering::Release);
        }
    }
    ctx.gprs = l1_registers(ctx, code, 0);
    ctx.set_routing(Routing::None);
    ctx.curr_vm = 0;
    ctx.step_over(TDCALL_LENGTH);
    Ok(())
}
