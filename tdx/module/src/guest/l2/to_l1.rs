//! The exit of an L2 VM to L1.

use super::super::{Guest, Next, TDCALL_LENGTH, TdExit};
use crate::l2::exit_info::l1_registers;
use crate::l2::guest_state;
use crate::l2::vmcs::{DEBUG_EXIT_TO_L1, PerVm};
use crate::status::Code;

impl Guest<'_> {
    /// Returns to L1 after the TDCALL that entered the VM, with the VM's exit in its registers: the VMCS fields of
    /// the exit and this extended qualification.
    pub(super) fn exit_to_l1(&mut self, code: Code, extended: u64) -> Next {
        let vm = self.ctx.vm();
        if self.ctx.per_vm(PerVm::DebugControls, vm) & DEBUG_EXIT_TO_L1 != 0 {
            return self.debug_exit(Code::TD_EXIT_ON_L2_TO_L1);
        }
        if guest_state::store(self.p, self.td, &self.ctx, vm).is_err() {
            return self.poisoned();
        }
        self.ctx.gprs = l1_registers(&self.ctx, code, extended);
        self.ctx.curr_vm = 0;
        self.ctx.step_over(TDCALL_LENGTH);
        Next::Done { length: 0 }
    }

    /// An exit to the host that a debugger asked for.
    pub(super) fn debug_exit(&mut self, code: Code) -> Next {
        let info = crate::l2::exit_info::of(&self.ctx);
        Next::Leave(Box::new(TdExit {
            rcx: info.qualification,
            r9: info.interruption,
            ..TdExit::new(code, info.reason)
        }))
    }
}
