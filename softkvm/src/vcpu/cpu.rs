//! What holds a vCPU's registers.

use kvm_ops::{Error, MpState, Msr, VcpuOps, Xcrs};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::state::{Regs, Sregs, mp_state};

use super::held::Held;
use super::{convert, sev};
use crate::machine::Processor;
use crate::refusal::Result;
use crate::system::lists::{MISC_ENABLE, MISC_ENABLE_RESET};
use crate::tdx;

/// IA32_APIC_BASE: the processor boots.
const BSP: u64 = 1 << 8;
/// XCR0: x87, which is always on, SSE, AVX, which needs SSE, and PKRU.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const PKRU: u64 = 1 << 9;
/// IA32_TIME_STAMP_COUNTER.
pub(super) const TSC: u32 = 0x10;

/// A value that XCR0 can have on these processors.
const fn is_xcr0(value: u64) -> bool {
    let known = value & !(X87 | SSE | AVX | PKRU) == 0;
    known && value & X87 != 0 && (value & AVX == 0 || value & SSE != 0)
}

pub(crate) enum Cpu {
    /// Nothing executes its code.
    Held(Box<Held>),
    /// A processor of the software machine.
    Processor(Box<Processor>),
}

impl Cpu {
    pub(crate) fn held(mp_state: u32) -> Self {
        Self::Held(Box::new(Held::new(mp_state)))
    }

    /// A processor. `boot` is the number of the one that boots.
    pub(crate) fn processor(mut vcpu: Processor, boot: u32) -> Result<Self> {
        let id = vcpu.id().0;
        // The software machine boots with number 0.
        if boot != 0 && (id == 0 || id == boot) {
            let mut sregs = vcpu.sregs()?;
            sregs.apic_base ^= BSP;
            vcpu.set_sregs(&sregs)?;
            let state = match id == boot {
                true => MpState::Runnable,
                false => MpState::Uninitialized,
            };
            // Without local APICs all of them run.
            let _ = vcpu.set_mp_state(state);
        }
        // The software machine's own value has fast strings on.
        vcpu.set_msrs(&[Msr::write(MISC_ENABLE, MISC_ENABLE_RESET)])?;
        Ok(Self::Processor(Box::new(vcpu)))
    }

    /// The VM became a guest of SEV: its vCPU goes on with the registers of this one, unless they are the guest's
    /// secret and came with it.
    pub(super) fn become_guest_of_sev(&mut self, new: Processor) {
        let old = std::mem::replace(self, Self::Processor(Box::new(new)));
        // What cannot be read or set is left as it is: user space sets registers after a move.
        let _ = old.sregs().and_then(|sregs| self.set_sregs(sregs));
        let _ = old.regs().and_then(|regs| self.set_regs(regs));
        let _ = old.xcrs().and_then(|xcrs| self.set_xcrs(&xcrs));
        if let (Self::Processor(old), Self::Processor(new)) = (&old, self) {
            let _ = old.xsave().and_then(|xsave| new.set_xsave(&xsave));
        }
    }

    /// True if the registers are the guest's secret.
    pub(super) fn is_protected(&self) -> bool {
        matches!(self, Self::Processor(vcpu) if sev::is_protected(vcpu))
    }

    /// The processor, for groups of registers that are not kept.
    pub(super) fn require_processor(&mut self) -> Result<&mut Processor> {
        match self {
            Self::Processor(vcpu) => Ok(vcpu),
            Self::Held(_) => Err(Errno::EINVAL.into()),
        }
    }

    pub(super) fn regs(&self) -> Result<Regs> {
        match self {
            Self::Held(held) => Ok(held.regs),
            Self::Processor(vcpu) => Ok(convert::to_regs(&sev::or_nothing(vcpu.regs())?)),
        }
    }

    pub(super) fn set_regs(&mut self, regs: Regs) -> Result<()> {
        match self {
            Self::Held(held) => held.regs = regs,
            Self::Processor(vcpu) => {
                sev::or_nothing(vcpu.set_regs(&convert::from_regs(&regs)))?;
            }
        }
        Ok(())
    }

    pub(super) fn sregs(&self) -> Result<Sregs> {
        match self {
            Self::Held(held) => Ok(held.sregs),
            Self::Processor(vcpu) => Ok(convert::to_sregs(&sev::or_nothing(vcpu.sregs())?)),
        }
    }

    pub(super) fn set_sregs(&mut self, sregs: Sregs) -> Result<()> {
        match self {
            Self::Held(held) => held.sregs = sregs,
            Self::Processor(vcpu) => {
                let set = sev::or_nothing(vcpu.set_sregs(&convert::from_sregs(&sregs)));
                set.map_err(|_| Errno::EINVAL)?;
            }
        }
        Ok(())
    }

    pub(super) fn xcrs(&self) -> Result<Xcrs> {
        match self {
            Self::Held(held) => Ok(Xcrs { xcr0: held.xcr0 }),
            Self::Processor(vcpu) => Ok(sev::or_nothing(vcpu.xcrs())?),
        }
    }

    pub(super) fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        match self {
            Self::Held(held) if is_xcr0(xcrs.xcr0) => held.xcr0 = xcrs.xcr0,
            Self::Held(_) => return Err(Errno::EINVAL.into()),
            Self::Processor(vcpu) => {
                sev::or_nothing(vcpu.set_xcrs(xcrs)).map_err(|_| Errno::EINVAL)?;
            }
        }
        Ok(())
    }

    pub(super) fn mp_state(&self) -> Result<u32> {
        Ok(match self {
            Self::Held(held) => held.mp_state,
            Self::Processor(vcpu) => {
                let state = sev::mp_state(vcpu)?;
                let known = MpState::ALL.iter().find(|(known, _)| *known == state);
                known.map_or(mp_state::RUNNABLE, |(_, number)| *number)
            }
        })
    }

    pub(super) fn set_mp_state(&mut self, number: u32) -> Result<()> {
        match self {
            Self::Held(held) if number <= mp_state::SIPI_RECEIVED => held.mp_state = number,
            Self::Held(_) => return Err(Errno::EINVAL.into()),
            Self::Processor(vcpu) => {
                let known = MpState::ALL.iter().find(|(_, known)| *known == number);
                let (state, _) = known.ok_or(Errno::EINVAL)?;
                // Without a local APIC, or to a state that these processors do not have.
                vcpu.set_mp_state(*state).map_err(|_| Errno::EINVAL)?;
            }
        }
        Ok(())
    }

    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        match self {
            Self::Held(held) => held.msrs.get(&index).copied(),
            Self::Processor(vcpu) => {
                let mut msr = [Msr::read(index)];
                match vcpu.msrs(&mut msr) {
                    Err(Error::Protected(_)) => return sev::secret_msr(index),
                    read => read.ok()?,
                }
                Some(msr[0].value)
            }
        }
    }

    /// False for an MSR that there is not, or a value that it cannot have.
    pub(super) fn set_msr(&mut self, index: u32, value: u64) -> bool {
        match self {
            Self::Held(held) => {
                let msr = held.msrs.get_mut(&index);
                msr.map(|msr| *msr = value).is_some()
            }
            Self::Processor(vcpu) => match vcpu.set_msrs(&[Msr::write(index, value)]) {
                Err(Error::Protected(_)) => sev::secret_msr(index).is_some(),
                set => set.is_ok(),
            },
        }
    }

    /// The VM's clock, in ticks of the TSC. `None` without a processor.
    pub(crate) fn clock(&self) -> Option<u64> {
        match self {
            Self::Held(_) => None,
            Self::Processor(vcpu) => vcpu.clock(),
        }
    }

    /// Sets the TSC. A guest whose registers are its secret keeps its own.
    pub(crate) fn set_tsc(&mut self, value: u64) {
        let _ = self.set_msr(TSC, value);
    }

    /// An MSR of a TD's vCPU that KVM keeps.
    pub(super) fn td_msr(&self, index: u32) -> Option<u64> {
        let value = self.msr(index).unwrap_or(0);
        tdx::has_emulated_msr(index, false).then_some(value)
    }

    /// False for an MSR that user space cannot write.
    pub(super) fn set_td_msr(&mut self, index: u32, value: u64) -> bool {
        match self {
            Self::Held(held) if tdx::has_emulated_msr(index, true) => {
                held.msrs.insert(index, value);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_has_x87_and_no_avx_without_sse() {
        let known: Vec<u64> = (0..0x400).filter(|value| is_xcr0(*value)).collect();
        assert_eq!(known, [1, 3, 7, 0x201, 0x203, 0x207]);
    }
}
