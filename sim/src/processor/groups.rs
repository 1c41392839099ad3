//! The register state of a processor, by group.

use kvm_ops::{
    CpuidEntry, DebugRegs, Error, Events, Field, Interrupt, InterruptShadow, Irqchip, MpState, Msr,
    Nmi, OpName, Regs, Result, Smi, Sregs, Xcrs, Xsave, cr0,
};
use kvm_ops_cpu::{Cpu, CpuidLeaf, CpuidTable, XSAVE_BYTES, XsaveError};

use crate::irq::Waiting;
use crate::processor::{Processor, state};
use crate::sev;

const IA32_TSC: u32 = 0x10;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_EFER: u32 = 0xc000_0080;
const IA32_TSC_AUX: u32 = 0xc000_0103;
/// IA32_MISC_ENABLE: branch trace and PEBS are unavailable.
const UNAVAILABLE: u64 = 1 << 11 | 1 << 12;
/// EFER: SCE, LME, LMA, NXE.
const EFER_BITS: u64 = 1 | state::LME | state::LMA | 1 << 11;
const CR4_PAE: u64 = 1 << 5;

static SMM: OpName = OpName("system-management mode");

impl Processor {
    pub(crate) fn regs(&self) -> Regs {
        state::regs(&self.cpu.registers())
    }

    /// An exit that waits for its answer goes on with the new registers, unless they are at another
    /// instruction.
    pub(crate) fn set_regs(&mut self, regs: &Regs) {
        let mut registers = self.cpu.registers();
        if registers.rip != regs.rip {
            self.give_up();
        }
        state::load_regs(&mut registers, regs);
        self.cpu.set_registers(&registers);
    }

    pub(crate) fn sregs(&self) -> Sregs {
        let waiting = match self.vm.irqchip() {
            Irqchip::None => self.wake.waiting().vectors,
            _ => [0; 4],
        };
        Sregs {
            apic_base: self.cpu.apic_base(),
            interrupt_bitmap: waiting,
            ..state::sregs(&self.cpu.registers())
        }
    }

    pub(crate) fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        sregs.validate()?;
        if sregs.efer & !EFER_BITS != 0 {
            return Err(Error::Invalid(Field::Msr, IA32_EFER.into()));
        }
        let long = sregs.efer & state::LME != 0 && sregs.cr0 & cr0::PG != 0;
        if sregs.cr4 & !Cpu::cr4_bits() != 0 || long && sregs.cr4 & CR4_PAE == 0 {
            return Err(Error::Invalid(Field::Cr4, sregs.cr4));
        }
        if !self.cpu.set_apic_base(sregs.apic_base) {
            return Err(Error::Invalid(Field::Msr, IA32_APIC_BASE.into()));
        }
        let mut registers = self.cpu.registers();
        state::load_sregs(&mut registers, sregs);
        self.cpu.set_registers(&registers);
        if self.vm.irqchip() == Irqchip::None {
            let vectors = sregs.interrupt_bitmap;
            self.wake.change(|waiting, _| waiting.vectors = vectors);
        }
        Ok(())
    }

    pub(crate) fn xsave(&self) -> Xsave {
        let mut xsave = Xsave::initial();
        xsave.as_bytes_mut()[..XSAVE_BYTES].copy_from_slice(&self.cpu.save_xsave());
        xsave
    }

    pub(crate) fn set_xsave(&mut self, xsave: &Xsave) -> Result<()> {
        let loaded = self.cpu.load_xsave(xsave.as_bytes());
        loaded.map_err(|error| match error {
            XsaveError::Short(bytes) => Error::Invalid(Field::BufferLength, bytes as u64),
            XsaveError::Components(bits) => Error::Invalid(Field::Xstate, bits),
            XsaveError::Mxcsr(value) => Error::Invalid(Field::Xstate, value.into()),
        })
    }

    pub(crate) fn events(&self) -> Events {
        let (waiting, activity) = (self.wake.waiting(), self.cpu.activity());
        // With an irqchip, interrupts wait in the local APIC.
        let vector = waiting.interrupt().filter(|_| !self.has_apic());
        Events {
            exception: self.exception,
            interrupt: vector.map(|vector| Interrupt {
                vector,
                soft: false,
            }),
            shadow: InterruptShadow {
                mov_ss: false,
                sti: activity.shadow,
            },
            nmi: Nmi {
                injected: false,
                pending: activity.nmi_pending || waiting.nmi,
                masked: activity.nmi_blocked,
            },
            triple_fault: self.triple_fault,
            ..Events::default()
        }
    }

    pub(crate) fn set_events(&mut self, events: &Events) -> Result<()> {
        if let Some(exception) = &events.exception
            && (exception.vector > 31 || exception.vector == crate::irq::NMI)
        {
            return Err(Error::Invalid(Field::Vector, exception.vector.into()));
        }
        if events.smi != Smi::default() {
            return Err(Error::HostLacks(&SMM));
        }
        if events.sipi_vector.is_some() {
            return kvm_ops::not_offered!("set_events with a start-up interrupt");
        }
        self.exception = events.exception;
        self.triple_fault = events.triple_fault;
        let (nmi, shadow) = (events.nmi, events.shadow.any());
        self.change_activity(|activity| {
            activity.nmi_pending = nmi.pending || nmi.injected;
            activity.nmi_blocked = nmi.masked;
            activity.shadow = shadow;
        });
        let (interrupt, apic) = (events.interrupt, self.has_apic());
        self.wake.change(|waiting, _| {
            waiting.set_nmi(false);
            if !apic {
                *waiting = Waiting::default();
            }
            if let Some(Interrupt { vector, .. }) = interrupt {
                waiting.vectors[usize::from(vector / 64)] |= 1 << (vector % 64);
            }
        });
        Ok(())
    }

    pub(crate) fn debug_regs(&self) -> DebugRegs {
        let registers = self.cpu.registers();
        DebugRegs {
            db: registers.breakpoints,
            dr6: registers.dr6,
            dr7: registers.dr7,
        }
    }

    pub(crate) fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        if regs.dr7 >> 32 != 0 || regs.dr6 >> 32 != 0 {
            return Err(Error::Invalid(Field::Dr7, regs.dr7));
        }
        let mut registers = self.cpu.registers();
        registers.breakpoints = regs.db;
        (registers.dr6, registers.dr7) = (regs.dr6, regs.dr7);
        self.cpu.set_registers(&registers);
        Ok(())
    }

    /// As KVM_GET_MSRS: the clock of a processor that did not execute for a while is behind the VM's, and CPUID hides
    /// nothing.
    pub(crate) fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        let behind = self.vm.turns.clock().saturating_sub(self.cpu.clock());
        for msr in msrs {
            let value = match msr.index {
                IA32_TSC_AUX => Some(self.cpu.tsc_aux().into()),
                IA32_TSC => self
                    .cpu
                    .read_msr(IA32_TSC)
                    .map(|tsc| tsc.wrapping_add(behind)),
                index => self.cpu.read_msr(index),
            };
            msr.value = value.ok_or(Error::Invalid(Field::Msr, msr.index.into()))?;
        }
        Ok(())
    }

    pub(crate) fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        for &Msr { index, value } in msrs {
            let done = match index {
                IA32_APIC_BASE => self.cpu.set_apic_base(value).then_some(()),
                // As KVM_SET_MSRS: each is set alone, whereas the guest's WRMSR changes both.
                IA32_TSC => {
                    self.cpu.advance_to(self.vm.turns.clock());
                    self.cpu.set_tsc(value);
                    Some(())
                }
                // What is unavailable stays so, whereas the guest's WRMSR that would change it is refused.
                IA32_MISC_ENABLE => self.cpu.write_msr(index, value | UNAVAILABLE),
                // There also where CPUID hides it from the guest.
                IA32_TSC_AUX => u32::try_from(value)
                    .ok()
                    .map(|aux| self.cpu.set_tsc_aux(aux)),
                IA32_TSC_ADJUST => {
                    self.cpu.set_tsc_adjust(value);
                    Some(())
                }
                _ => self.cpu.write_msr(index, value),
            };
            done.ok_or(Error::Invalid(Field::Msr, index.into()))?;
        }
        Ok(())
    }

    pub(crate) fn xcrs(&self) -> Xcrs {
        Xcrs {
            xcr0: self.cpu.registers().xcr0,
        }
    }

    pub(crate) fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        match self.cpu.set_xcr0(xcrs.xcr0) {
            true => Ok(()),
            false => Err(Error::Invalid(Field::Xcr0, xcrs.xcr0)),
        }
    }

    pub(crate) fn mp_state(&self) -> MpState {
        let activity = self.cpu.activity();
        match (activity.waiting, self.uninitialized) {
            (true, true) => MpState::Uninitialized,
            (true, false) => MpState::InitReceived,
            (false, _) if activity.halted => MpState::Halted,
            (false, _) => MpState::Runnable,
        }
    }

    pub(crate) fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        if state != MpState::Runnable && !self.has_apic() {
            return kvm_ops::not_offered!("set_mp_state without an irqchip in the platform");
        }
        let (waiting, halted) = match state {
            MpState::Runnable => (false, false),
            MpState::Halted => (false, true),
            MpState::Uninitialized | MpState::InitReceived => (true, false),
            _ => return kvm_ops::not_offered!("set_mp_state to a state of firmware's or SEV's"),
        };
        self.uninitialized = state == MpState::Uninitialized;
        self.change_activity(|activity| {
            (activity.waiting, activity.halted) = (waiting, halted);
        });
        Ok(())
    }

    pub(crate) fn set_cpuid(&mut self, entries: &[CpuidEntry]) {
        let mut table = CpuidTable::empty();
        for entry in entries {
            let subleaf = match entry.subleaf_significant {
                true => entry.subleaf,
                false => 0,
            };
            let [eax, ebx, ecx, edx] = entry.regs;
            table.set(entry.leaf, subleaf, CpuidLeaf { eax, ebx, ecx, edx });
        }
        let table = sev::change_cpuid(self, table);
        self.cpu.set_cpuid(table);
    }

    /// The answer to CPUID, as the guest sees it.
    pub(crate) fn cpuid_leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let CpuidLeaf { eax, ebx, ecx, edx } = self.cpuid_answer(leaf, subleaf);
        [eax, ebx, ecx, edx]
    }

    pub(crate) fn inject_nmi(&mut self) {
        self.cpu.nmi();
    }

    pub(crate) fn ask_window(&mut self) {
        self.window = true;
    }
}
