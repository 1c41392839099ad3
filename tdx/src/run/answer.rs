//! The embedder's answer to the last exit, put into the guest's registers.

use kvm_ops::{Answer, Error, ExitKind, Field, Result};

use super::vmcall::{INVALID_OPERAND, SUCCESS};
use super::{Pending, Run};

impl Run {
    /// Takes the embedder's answer to the last exit.
    pub(crate) fn take_answer(&mut self, answer: Answer) -> Result<()> {
        match self.exit {
            Some(exit) if answer.fits(exit) => {
                self.answer = Some(answer);
                Ok(())
            }
            exit => {
                let kind = exit.unwrap_or(ExitKind::Unknown);
                Err(Error::Invalid(Field::Answer, kind as u64))
            }
        }
    }

    /// The value of an [`Answer::Value`]; 0 by default.
    pub(super) const fn value(&self) -> u64 {
        match self.answer {
            Some(Answer::Value(value)) => value,
            _ => 0,
        }
    }

    /// Finishes the TDG.VP.VMCALL that the guest is in.
    pub(super) fn finish(&mut self, pending: Pending) {
        let (value, answer) = (self.value(), self.answer);
        let regs = &mut self.regs;
        match pending {
            Pending::Nothing | Pending::MapGpa(_) | Pending::Halt | Pending::ShutDown => {}
            Pending::Success => regs.r10 = SUCCESS,
            Pending::Read => {
                let little_endian = |value, byte: &u8| value << 8 | u64::from(*byte);
                let value = self.data.iter().rev().fold(0, little_endian);
                (regs.r10, regs.r11) = (SUCCESS, value);
            }
            Pending::Hypercall => regs.r10 = value,
            // The embedder's errno becomes a negative one.
            Pending::MapGpaHypercall => regs.r10 = value.wrapping_neg(),
            Pending::Request { default, values } => {
                let (status, given) = match answer {
                    Some(Answer::Tdx { status, values }) => (status, values),
                    _ => (default, [0; 4]),
                };
                regs.r10 = status;
                if values {
                    [regs.r11, regs.r12, regs.r13, regs.r14] = given;
                }
            }
            // An MSR that would give #GP is an operand that the host does not take (GHCI,
            // "TDG.VP.VMCALL<Instruction.RDMSR>").
            Pending::MsrRead | Pending::MsrWrite if answer == Some(Answer::InjectGp) => {
                regs.r10 = INVALID_OPERAND;
            }
            Pending::MsrRead => {
                let value = match answer {
                    Some(Answer::Msr(value)) => value,
                    _ => 0,
                };
                (regs.r10, regs.r11) = (SUCCESS, value);
            }
            Pending::MsrWrite => regs.r10 = SUCCESS,
        }
    }
}
