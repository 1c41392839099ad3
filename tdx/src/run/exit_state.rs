//! What the host owes a vCPU at its next entry, for a TD that goes on at another host.

use kvm_ops::{Error, Field, Host, Result, SeamRegs};

use super::{Pending, Run};
use crate::TdxVcpu;

/// The host's side of a vCPU between an exit and the next entry: the answer to the TDG.VP.VMCALL that the
/// guest is in, or that it halted or shut down. The module has everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitState {
    rest: Rest,
    /// RCX is the TDVPR, which is another one there.
    regs: SeamRegs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Rest {
    Nothing = 0,
    Halted = 1,
    ShutDown = 2,
}

impl ExitState {
    /// Bytes of its encoded form.
    pub const BYTES: usize = 1 + 12 * 8;

    const fn words(regs: &SeamRegs) -> [u64; 12] {
        [
            regs.rdx, regs.rbx, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10, regs.r11, regs.r12,
            regs.r13, regs.r14, regs.r15,
        ]
    }

    /// A byte that says whether the vCPU halted or shut down, then RDX, RBX, RSI, RDI and R8 to R15,
    /// little-endian.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [self.rest as u8; Self::BYTES];
        let words = Self::words(&self.regs);
        for (bytes, word) in out[1..].chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown first byte. Registers may hold anything: the guest gets only
    /// those that it named itself.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let rest = match bytes[0] {
            0 => Rest::Nothing,
            1 => Rest::Halted,
            2 => Rest::ShutDown,
            other => return Err(Error::Invalid(Field::Flags, other.into())),
        };
        let (words, _) = bytes[1..].as_chunks::<8>();
        let word = |n: usize| words.get(n).map_or(0, |word| u64::from_le_bytes(*word));
        let regs = SeamRegs {
            rcx: 0,
            rdx: word(0),
            rbx: word(1),
            rsi: word(2),
            rdi: word(3),
            r8: word(4),
            r9: word(5),
            r10: word(6),
            r11: word(7),
            r12: word(8),
            r13: word(9),
            r14: word(10),
            r15: word(11),
        };
        Ok(Self { rest, regs })
    }
}

impl<H: Host> TdxVcpu<H> {
    /// What is owed to the guest, once its TD is stopped for the rest of a migration: give it to the vCPU
    /// of the same number at the target. The last exit has its answer by then; one that has none gets the
    /// default, as with the next run. A MapGPA that is half done is answered RETRY, so that the guest calls
    /// again for the rest.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that is not stopped: the vCPU would go on with it here.
    pub fn exit_state(&mut self) -> Result<ExitState> {
        if !self.td.journey.is_stopped() {
            return Err(Error::WrongState(self.td.life.step()));
        }
        let pending = core::mem::take(&mut self.run.pending);
        self.run.finish(pending);
        self.run.data.clear();
        let rest = match pending {
            Pending::Halt => Rest::Halted,
            Pending::ShutDown => Rest::ShutDown,
            Pending::MapGpa(piece) => {
                // A kick ends a conversion after the piece that was answered.
                let kicked = self.record.is_kicked();
                self.record.kick();
                let _ = self.map_gpa_answered(piece);
                if !kicked {
                    self.record.take_kick();
                }
                Rest::Nothing
            }
            _ => Rest::Nothing,
        };
        // The source goes on from here if the migration is aborted.
        self.run.pending = rest.pending();
        let regs = SeamRegs {
            rcx: 0,
            ..self.run.regs
        };
        Ok(ExitState { rest, regs })
    }

    /// Takes over what another host owed to the guest, before the first run of a vCPU that came.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a vCPU of a TD that was launched here, or that ran already.
    pub fn set_exit_state(&mut self, state: &ExitState) -> Result<()> {
        if !self.td.journey.awaits() || self.run.exit.is_some() {
            return Err(Error::WrongState(self.td.life.step()));
        }
        self.sit()?;
        self.run = Run {
            regs: state.regs,
            pending: state.rest.pending(),
            ..Run::default()
        };
        self.stand();
        Ok(())
    }
}

impl Rest {
    const fn pending(self) -> Pending {
        match self {
            Self::Nothing => Pending::Nothing,
            Self::Halted => Pending::Halt,
            Self::ShutDown => Pending::ShutDown,
        }
    }
}
