//! What the host owes a vCPU at its next entry, for a TD that goes on at another host.

use alloc::vec::Vec;

use kvm_ops::{Error, Field, Host, Result, SeamRegs, TdApic, TdVcpuState, VmPort};

use super::{Pending, Run};
use crate::TdxVcpu;
use crate::td::Td;
use crate::vcpu::{Resume, VcpuRecord};

/// The host's side of a vCPU between an exit and the next entry: the answer to the TDG.VP.VMCALL that the
/// guest is in, or that it halted or shut down, and what the machine keeps of the vCPU: time, and the host's part of the local
/// APIC. The module has everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitState {
    rest: Rest,
    /// RCX is the TDVPR, which is another one there.
    regs: SeamRegs,
    /// `None` from a machine that keeps nothing.
    machine: Option<TdVcpuState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Rest {
    Nothing = 0,
    Halted = 1,
    ShutDown = 2,
}

/// The byte that says what of the machine's state follows.
mod holds {
    pub(super) const NOTHING: u8 = 0;
    pub(super) const CLOCK: u8 = 1;
    pub(super) const CLOCK_AND_APIC: u8 = 2;
}

/// Flags of a local APIC.
const NMI: u8 = 1;
const DELIVERABLE: u8 = 1 << 1;

const REGS: usize = 12 * 8;
const APIC: usize = TdApic::REGISTERS + 8 + 4 * 8 + 1;

impl ExitState {
    /// The fewest and the most bytes of its encoded form.
    pub const MIN_BYTES: usize = 1 + REGS + 1;
    /// See [`MIN_BYTES`](Self::MIN_BYTES).
    pub const MAX_BYTES: usize = Self::MIN_BYTES + 8 + APIC;

    const fn words(regs: &SeamRegs) -> [u64; 12] {
        [
            regs.rdx, regs.rbx, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10, regs.r11, regs.r12,
            regs.r13, regs.r14, regs.r15,
        ]
    }

    /// A byte that says whether the vCPU halted or shut down; RDX, RBX, RSI, RDI and R8 to R15; a byte that says what of the
    /// machine's state follows: the time, then the local APIC (1024 bytes of registers, TSC deadline, bitmap of posted
    /// interrupts, a byte of flags). Numbers are little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::MAX_BYTES);
        out.push(self.rest as u8);
        for word in Self::words(&self.regs) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        let Some(machine) = &self.machine else {
            out.push(holds::NOTHING);
            return out;
        };
        out.push(match machine.apic {
            None => holds::CLOCK,
            Some(_) => holds::CLOCK_AND_APIC,
        });
        out.extend_from_slice(&machine.clock.to_le_bytes());
        if let Some(apic) = &machine.apic {
            out.extend_from_slice(&apic.registers);
            for word in [apic.tsc_deadline].iter().chain(&apic.posted) {
                out.extend_from_slice(&word.to_le_bytes());
            }
            let flags = [(apic.nmi, NMI), (apic.deliverable, DELIVERABLE)];
            let set = flags.into_iter().filter(|(is_set, _)| *is_set);
            out.push(set.fold(0, |all, (_, flag)| all | flag));
        }
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another length, or a byte of flags that is not known. Registers may hold anything: the guest gets
    /// only those that it named itself.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut from = Bytes(bytes);
        let [rest] = from.take()?;
        let rest = match rest {
            0 => Rest::Nothing,
            1 => Rest::Halted,
            2 => Rest::ShutDown,
            other => return Err(Error::Invalid(Field::Flags, other.into())),
        };
        let regs = SeamRegs {
            rcx: 0,
            rdx: from.word()?,
            rbx: from.word()?,
            rsi: from.word()?,
            rdi: from.word()?,
            r8: from.word()?,
            r9: from.word()?,
            r10: from.word()?,
            r11: from.word()?,
            r12: from.word()?,
            r13: from.word()?,
            r14: from.word()?,
            r15: from.word()?,
        };
        let [holds] = from.take()?;
        let machine = match holds {
            holds::NOTHING => None,
            holds::CLOCK => Some(TdVcpuState {
                clock: from.word()?,
                apic: None,
            }),
            holds::CLOCK_AND_APIC => Some(TdVcpuState {
                clock: from.word()?,
                apic: Some(from.apic()?),
            }),
            other => return Err(Error::Invalid(Field::Flags, other.into())),
        };
        match from.0 {
            [] => Ok(Self {
                rest,
                regs,
                machine,
            }),
            rest => Err(Error::Invalid(Field::BufferLength, rest.len() as u64)),
        }
    }
}

/// Bytes that are read from their beginning.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let short = Error::Invalid(Field::BufferLength, self.0.len() as u64);
        let (head, rest) = self.0.split_first_chunk().ok_or(short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn word(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn apic(&mut self) -> Result<TdApic> {
        let registers = self.take()?;
        let tsc_deadline = self.word()?;
        let posted = [self.word()?, self.word()?, self.word()?, self.word()?];
        let [flags] = self.take()?;
        if flags & !(NMI | DELIVERABLE) != 0 {
            return Err(Error::Invalid(Field::Flags, flags.into()));
        }
        Ok(TdApic {
            registers,
            tsc_deadline,
            posted,
            nmi: flags & NMI != 0,
            deliverable: flags & DELIVERABLE != 0,
        })
    }
}

impl<H: Host> TdxVcpu<H> {
    /// What is owed to the guest, once its TD is stopped for the rest of a migration: give it to the vCPU
    /// of the same number at the target. The last exit has its answer by then; one that has none gets the
    /// default, as with the next run. A MapGPA that is half done is answered RETRY, so that the guest calls
    /// again for the rest.
    ///
    /// [`Outgoing::exit_state`](crate::migrate::Outgoing::exit_state) asks for it without the handle.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that is not stopped: the vCPU would go on with it here; what the machine below answers.
    pub fn exit_state(&mut self) -> Result<ExitState> {
        if !self.td.journey.is_stopped() {
            return Err(Error::WrongState(self.td.life.step()));
        }
        let pending = core::mem::take(&mut self.run.pending);
        self.run.finish(pending);
        self.run.data.clear();
        let rest = match pending {
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
            pending => Rest::of(pending),
        };
        // The source goes on from here if the migration is aborted.
        self.run.pending = rest.pending();
        self.stand();
        self.td.exit_state(&self.record, self.run.regs, rest)
    }

    /// Takes over what another host owed to the guest, before the first run of a vCPU that came.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a vCPU of a TD that was launched here, or that ran already; as
    /// [`Incoming::set_exit_state`](crate::migrate::Incoming::set_exit_state).
    pub fn set_exit_state(&mut self, state: &ExitState) -> Result<()> {
        if !self.td.journey.awaits() || self.run.exit.is_some() {
            return Err(Error::WrongState(self.td.life.step()));
        }
        self.td.set_exit_state(&self.record, state)
    }
}

impl<H: Host> Td<H> {
    /// What is owed to the guest of a vCPU that is between two runs.
    pub(crate) fn exit_state_of(&self, vcpu: &VcpuRecord, resume: Resume) -> Result<ExitState> {
        let mut run = Run {
            regs: resume.regs,
            ..Run::default()
        };
        run.finish(resume.pending);
        self.exit_state(vcpu, run.regs, Rest::of(resume.pending))
    }

    fn exit_state(&self, vcpu: &VcpuRecord, regs: SeamRegs, rest: Rest) -> Result<ExitState> {
        let (mut regs, mut rest) = (SeamRegs { rcx: 0, ..regs }, rest);
        if rest == Rest::Halted && vcpu.is_woken() {
            // What ended the halt is with the module.
            rest = Rest::Nothing;
            regs.r10 = super::vmcall::SUCCESS;
        }
        let machine = self.on_port(|port| match port.td() {
            Some(td) => td.td_vcpu_state(vcpu.id),
            None => Ok(None),
        })?;
        Ok(ExitState {
            rest,
            regs,
            machine,
        })
    }

    /// Gives a vCPU that came what another host owed to it. It runs in no thread yet.
    pub(crate) fn set_exit_state(&self, vcpu: &VcpuRecord, state: &ExitState) -> Result<()> {
        if let Some(machine) = &state.machine {
            self.on_td_port(|port| port.set_td_vcpu_state(vcpu.id, vcpu.tdvpr, machine))?;
        }
        let resume = Resume {
            regs: state.regs,
            pending: state.rest.pending(),
        };
        vcpu.seat.stand(|| self.relax(), resume);
        Ok(())
    }
}

impl Rest {
    const fn of(pending: Pending) -> Self {
        match pending {
            Pending::Halt => Self::Halted,
            Pending::ShutDown => Self::ShutDown,
            _ => Self::Nothing,
        }
    }

    const fn pending(self) -> Pending {
        match self {
            Self::Nothing => Pending::Nothing,
            Self::Halted => Pending::Halt,
            Self::ShutDown => Pending::ShutDown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states() -> [ExitState; 3] {
        let clock = 0x1234_5678_9abc;
        let apic = TdApic {
            registers: core::array::from_fn(|n| n as u8),
            tsc_deadline: 7,
            posted: [1, 2, 3, 1 << 63],
            nmi: true,
            deliverable: false,
        };
        [None, Some(None), Some(Some(apic))].map(|machine| ExitState {
            rest: Rest::Halted,
            regs: SeamRegs {
                r10: 9,
                ..SeamRegs::default()
            },
            machine: machine.map(|apic| TdVcpuState { clock, apic }),
        })
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let lengths = states().map(|state| state.encode().len());
        let [min, with_clock, max] = lengths;
        assert_eq!(min, ExitState::MIN_BYTES);
        assert_eq!(with_clock, ExitState::MIN_BYTES + 8);
        assert_eq!(max, ExitState::MAX_BYTES);
        for state in states() {
            assert_eq!(ExitState::decode(&state.encode()), Ok(state));
        }
    }

    #[test]
    fn another_length_or_an_unknown_flag_is_refused() {
        for state in states() {
            let bytes = state.encode();
            for short in 0..bytes.len() {
                assert!(ExitState::decode(&bytes[..short]).is_err(), "{short}");
            }
            let long = [&bytes[..], &[0]].concat();
            assert!(ExitState::decode(&long).is_err());
            for (at, value) in [(0, 3), (ExitState::MIN_BYTES - 1, 3)] {
                let mut other = bytes.clone();
                other[at] = value;
                assert!(ExitState::decode(&other).is_err(), "byte {at}");
            }
        }
        let [_, _, with_apic] = states();
        let mut bytes = with_apic.encode();
        *bytes.last_mut().unwrap() = 4;
        assert_eq!(
            ExitState::decode(&bytes),
            Err(Error::Invalid(Field::Flags, 4))
        );
    }
}
