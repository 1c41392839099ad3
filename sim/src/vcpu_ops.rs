//! The operations of a vCPU of the software platform.

use std::sync::Arc;

use kvm_ops::guest::GuestProgram;
use kvm_ops::{
    Answer, CpuidEntry, DebugRegs, Error, Events, Exit, Field, GuestDebug, Interrupt, Kick,
    MpState, Msr, Nmi, Programs, Regs, Result, Sregs, VcpuId, VcpuOps, Xcrs, Xsave,
};
use kvm_ops_cpu::Debugger;

use crate::SimVcpu;
use crate::handle::{GuestCpu, lock};
use crate::irq::Waiting;
use crate::registers::{Registers, is_measured};
use crate::reported::Reported;
use crate::vcpu::State;

impl Programs for SimVcpu {
    fn load_program(&mut self, program: Box<dyn GuestProgram>) -> Result<()> {
        self.vm.require_open()?;
        self.guest = GuestCpu::Program;
        let mut core = self.core();
        core.program = Some(program);
        core.state = State::Report(Reported::Start);
        Ok(())
    }
}

impl VcpuOps for SimVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    /// # Errors
    /// [`Error::WrongState`] once the VM is closed; the error of a back end that could not resolve
    /// an access to private memory.
    fn vcpu_run(&mut self) -> Result<Exit> {
        let answered = std::mem::replace(&mut self.data, 0..0);
        self.exit = Exit::Interrupted;
        match self.run_processor() {
            Some(left) => left,
            None => self.run_program(answered),
        }
    }

    fn exit_data(&mut self) -> &mut [u8] {
        &mut self.buffer[self.data.clone()]
    }

    fn answer(&mut self, answer: Answer) -> Result<()> {
        let kind = self.exit.kind();
        match answer {
            Answer::Value(value) if answer.fits(kind) => {
                self.ret = value;
                Ok(())
            }
            Answer::Msr(value) if answer.fits(kind) => {
                self.ret = value;
                Ok(())
            }
            Answer::InjectGp if answer.fits(kind) => {
                if let Some(wait) = self.msr_wait() {
                    wait.faults = true;
                }
                Ok(())
            }
            Answer::SnpCertificates { errno, pages } if answer.fits(kind) => {
                self.ret = errno.into();
                self.buffer[..8].copy_from_slice(&pages.to_le_bytes());
                Ok(())
            }
            _ => Err(Error::Invalid(Field::Answer, kind as u64)),
        }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.wake) as Arc<dyn Kick>
    }

    fn programs(&mut self) -> Option<&mut dyn Programs> {
        Some(self)
    }

    fn instructions(&self) -> Option<u64> {
        self.executed()
    }

    fn clock(&self) -> Option<u64> {
        self.executed().map(|_| self.vm.turns.clock())
    }

    /// Power-on drops a program's progress with the registers; INIT keeps MSRs. In both cases the
    /// program has no way to start over, so it is gone: load it again.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        self.vm.require_open()?;
        let processor = self
            .processor_mut()
            .map(|processor| processor.reset(init_event));
        let mut core = lock(&self.core);
        match processor {
            Some(()) => {}
            None if init_event => core.registers.init(),
            None => core.registers = Registers::power_on(self.id.0 == 0),
        }
        core.program = None;
        core.state = State::Off;
        core.data = 0..0;
        drop(core);
        (self.exit, self.data) = (Exit::Interrupted, 0..0);
        self.wake.change(|waiting, nmi_masked| {
            (*waiting, *nmi_masked) = (Waiting::default(), false);
        });
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }

    fn regs(&self) -> Result<Regs> {
        if let Some(processor) = self.processor() {
            return Ok(processor.regs());
        }
        Ok(self.core().registers.regs)
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            processor.set_regs(regs);
            return Ok(());
        }
        self.core().registers.regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<Sregs> {
        if let Some(processor) = self.processor() {
            return Ok(processor.sregs());
        }
        let mut sregs = self.core().registers.sregs();
        if !self.has_irqchip() {
            sregs.interrupt_bitmap = self.wake.waiting().vectors;
        }
        Ok(sregs)
    }

    /// Control registers are checked; a guest program has no paging that they could change.
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_sregs(sregs);
        }
        self.core().registers.set_sregs(sregs)?;
        if !self.has_irqchip() {
            let vectors = sregs.interrupt_bitmap;
            self.wake.change(|waiting, _| waiting.vectors = vectors);
        }
        Ok(())
    }

    fn xsave(&self) -> Result<Xsave> {
        if let Some(processor) = self.processor() {
            return Ok(processor.xsave());
        }
        Ok(self.core().registers.xsave.clone())
    }

    fn set_xsave(&mut self, xsave: &Xsave) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_xsave(xsave);
        }
        self.core().registers.xsave = xsave.clone();
        Ok(())
    }

    fn events(&self) -> Result<Events> {
        if let Some(processor) = self.processor() {
            return Ok(processor.events());
        }
        let waiting = self.wake.waiting();
        // With an irqchip, interrupts wait in the local APIC.
        let vector = waiting.interrupt().filter(|_| !self.has_irqchip());
        let core = self.core();
        let held = &core.registers.events;
        Ok(Events {
            interrupt: vector.map(|vector| Interrupt {
                vector,
                soft: false,
            }),
            nmi: Nmi {
                pending: waiting.nmi,
                ..held.nmi
            },
            ..*held
        })
    }

    /// A guest program has no handlers: there, an exception shuts the vCPU down in the next run, and
    /// an NMI or an interrupt ends a halt.
    fn set_events(&mut self, events: &Events) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_events(events);
        }
        if let Some(exception) = &events.exception
            && exception.vector > 31
        {
            return Err(Error::Invalid(Field::Vector, exception.vector.into()));
        }
        let irqchip = self.has_irqchip();
        let (nmi, interrupt) = (events.nmi, events.interrupt);
        self.wake.change(|waiting, nmi_masked| {
            waiting.set_nmi(nmi.pending || nmi.injected);
            *nmi_masked = nmi.masked;
            if !irqchip {
                waiting.vectors = [0; 4];
            }
            if let Some(Interrupt { vector, .. }) = interrupt {
                waiting.vectors[usize::from(vector / 64)] |= 1 << (vector % 64);
            }
        });
        let registers = &mut self.core().registers;
        registers.events = Events {
            interrupt: None,
            ..*events
        };
        registers.events.nmi.injected = false;
        Ok(())
    }

    fn debug_regs(&self) -> Result<DebugRegs> {
        if let Some(processor) = self.processor() {
            return Ok(processor.debug_regs());
        }
        Ok(self.core().registers.debug)
    }

    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_debug_regs(regs);
        }
        self.core().registers.debug = *regs;
        Ok(())
    }

    fn set_guest_debug(&mut self, debug: GuestDebug) -> Result<()> {
        let debugger = match debug.enabled {
            true => Debugger {
                step: debug.single_step,
                int3: true,
                breakpoints: debug
                    .hardware
                    .map(|[d0, d1, d2, d3, dr7]| ([d0, d1, d2, d3], dr7)),
                hold_events: false,
            },
            false => Debugger::default(),
        };
        match self.set_debugger(debugger) {
            true => Ok(()),
            false => kvm_ops::not_offered!("set_guest_debug for a guest program"),
        }
    }

    /// An encrypted vCPU's MSRs beside its start state are the processor's, as KVM keeps them.
    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        if let Some(processor) = self.processor() {
            return processor.msrs(msrs);
        }
        let executing = self.guest.executing(self.id, &self.vm, &self.wake);
        for msr in msrs.chunks_mut(1) {
            match executing.filter(|_| !is_measured(msr[0].index)) {
                Some(processor) => processor.msrs(msr)?,
                None => self.core().registers.msrs(msr)?,
            }
        }
        Ok(())
    }

    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_msrs(msrs);
        }
        for msr in msrs.chunks(1) {
            let executing = self.guest.executing_mut(self.id, &self.vm, &self.wake);
            match executing.filter(|_| !is_measured(msr[0].index)) {
                Some(processor) => processor.set_msrs(msr)?,
                None => self.core().registers.set_msrs(msr)?,
            }
        }
        Ok(())
    }

    fn xcrs(&self) -> Result<Xcrs> {
        if let Some(processor) = self.processor() {
            return Ok(processor.xcrs());
        }
        Ok(self.core().registers.xcrs)
    }

    fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_xcrs(xcrs);
        }
        self.core().registers.xcrs = *xcrs;
        Ok(())
    }

    fn mp_state(&self) -> Result<MpState> {
        if let Some(processor) = self.processor() {
            return Ok(processor.mp_state());
        }
        // No part of encrypted register state.
        if let GuestCpu::Protected(cell) = &self.guest
            && let Some(processor) = cell.get()
        {
            return Ok(processor.mp_state());
        }
        let core = self.core();
        Ok(match (core.state, core.registers.mp_state) {
            (State::Halted, MpState::Runnable) if self.has_irqchip() => MpState::Halted,
            (_, state) => state,
        })
    }

    /// # Errors
    /// [`Error::NotOffered`] without an irqchip in the platform, where the embedder keeps this
    /// state, unless it is [`MpState::Runnable`].
    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        if let Some(processor) = self.processor_mut() {
            return processor.set_mp_state(state);
        }
        if state != MpState::Runnable && !self.has_irqchip() {
            return kvm_ops::not_offered!("set_mp_state without an irqchip in the platform");
        }
        let guest = &mut self.guest;
        if let Some(processor) = guest.executing_mut(self.id, &self.vm, &self.wake) {
            processor.set_mp_state(state)?;
        }
        let mut core = self.core();
        core.registers.mp_state = match (core.state, state) {
            // The program's halt waits for the same events.
            (State::Halted, MpState::Halted) => MpState::Runnable,
            _ => state,
        };
        Ok(())
    }

    /// A guest program does not execute CPUID, and takes anything.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let guest = &mut self.guest;
        if let Some(processor) = guest.executing_mut(self.id, &self.vm, &self.wake) {
            processor.set_cpuid(entries);
        }
        Ok(())
    }

    fn cpuid_leaf(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4]> {
        match self.guest.executing(self.id, &self.vm, &self.wake) {
            Some(processor) => Ok(processor.cpuid_leaf(leaf, subleaf)),
            None => kvm_ops::not_offered!("cpuid_leaf of a vCPU that runs guest programs"),
        }
    }

    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        if self.has_irqchip() {
            return kvm_ops::not_offered!("inject_irq with an irqchip in the platform");
        }
        if let Some(waiting) = self.wake.waiting().interrupt() {
            return Err(Error::Exists(Field::Vector, waiting.into()));
        }
        self.wake.post(vector);
        Ok(())
    }

    /// An NMI ends a program's halt as vector 2 does.
    fn inject_nmi(&mut self) -> Result<()> {
        let guest = &mut self.guest;
        if let Some(processor) = guest.processor_mut(self.id, &self.vm, &self.wake) {
            processor.inject_nmi();
            return Ok(());
        }
        self.wake.nmi();
        Ok(())
    }

    /// The window of a guest program opens when it halts.
    ///
    /// # Errors
    /// [`Error::NotOffered`] with an irqchip in the platform.
    fn enable_irq_window(&mut self) -> Result<()> {
        if self.has_irqchip() {
            return kvm_ops::not_offered!("enable_irq_window with an irqchip in the platform");
        }
        let guest = &mut self.guest;
        match guest.executing_mut(self.id, &self.vm, &self.wake) {
            Some(processor) => processor.ask_window(),
            None => self.core().irq_window = true,
        }
        Ok(())
    }
}
