//! What the embedder left in the last exit, put into the guest's registers.

use super::vmcall::{INVALID_OPERAND, SUCCESS};
use super::{Pending, Run};

impl Run {
    /// Answers the TDG.VP.VMCALL that the guest is in.
    pub(super) fn answer(&mut self, pending: Pending) {
        let regs = &mut self.regs;
        match pending {
            Pending::Nothing | Pending::MapGpa(_) | Pending::Halt | Pending::ShutDown => {}
            Pending::Success => regs.r10 = SUCCESS,
            Pending::Read(size) => {
                let mut value = [0; 8];
                value[..size].copy_from_slice(&self.data[..size]);
                (regs.r10, regs.r11) = (SUCCESS, u64::from_le_bytes(value));
            }
            Pending::Ret => regs.r10 = self.ret,
            Pending::RetAndValues => {
                regs.r10 = self.ret;
                [regs.r11, regs.r12, regs.r13, regs.r14] = self.values;
            }
            // An MSR that would give #GP is an operand that the host does not take (GHCI,
            // "TDG.VP.VMCALL<Instruction.RDMSR>").
            Pending::MsrRead | Pending::MsrWritten if self.error != 0 => {
                regs.r10 = INVALID_OPERAND;
            }
            Pending::MsrRead => (regs.r10, regs.r11) = (SUCCESS, self.values[0]),
            Pending::MsrWritten => regs.r10 = SUCCESS,
            Pending::HypercallErrno => regs.r10 = self.ret.wrapping_neg(),
        }
    }
}
