//! Events into a processor: messages of others, and what its embedder injects.

use kvm_ops::{Exit, Irqchip};
use kvm_ops_cpu::{Event, EventKind, Exception};

use crate::processor::exits::delivery_failed;
use crate::processor::{Next, Processor};

/// The vector of #DB, whose payload goes to DR6, and of #PF, whose payload goes to CR2.
const DB: u8 = 1;
/// The vectors of INT3 and INTO, instructions of a byte.
const BP: u8 = 3;
const OF: u8 = 4;
const PF: u8 = 14;

impl Processor {
    /// Takes the messages that came.
    pub(crate) fn take_mail(&mut self) {
        let mail = self.wake.take_mail(self.has_apic());
        if !self.start_protected(&mail) {
            if mail.init {
                self.reset(true);
            }
            if let Some(vector) = mail.start.filter(|_| !self.uninitialized) {
                self.cpu.start(vector);
            }
        }
        for ((i, word), levels) in (0..).zip(mail.vectors).zip(mail.levels) {
            for bit in (0..64).filter(|bit| word >> bit & 1 != 0) {
                match levels >> bit & 1 {
                    0 => self.cpu.interrupt(i * 64 + bit),
                    _ => self.cpu.level_interrupt(i * 64 + bit),
                }
            }
        }
        (0..mail.nmis).for_each(|_| self.cpu.nmi());
    }

    /// Injects what waits, as a VM entry does. `Some` if the processor does not execute now.
    pub(crate) fn inject(&mut self) -> Option<Next> {
        if std::mem::take(&mut self.triple_fault) {
            self.change_activity(|activity| activity.shutdown = true);
        }
        // The instruction under way comes first.
        if self.midway {
            self.cpu.controls_mut().interrupt_window = false;
            return None;
        }
        if let Some(exception) = self.exception.take() {
            let event = self.event_of(&exception);
            return self.deliver(event);
        }
        if self.cpu.debugger().hold_events {
            self.cpu.controls_mut().interrupt_window = false;
            return None;
        }
        let waiting = self.interrupt_line();
        if waiting
            && self.cpu.interruptible()
            && let Some(vector) = self.acknowledge()
        {
            return self.deliver(Event::interrupt(vector));
        }
        self.cpu.controls_mut().interrupt_window = waiting || self.window;
        None
    }

    fn event_of(&mut self, exception: &kvm_ops::Exception) -> Event {
        let (vector, code) = (exception.vector, exception.error);
        if matches!(vector, BP | OF) {
            // As if INT3 or INTO raised it: the handler returns behind the instruction.
            return Event {
                kind: EventKind::SoftwareException,
                vector,
                code: None,
                address: None,
                len: 1,
            };
        }
        let mut event = Event::exception(Exception {
            vector,
            code,
            address: None,
        });
        match (vector, exception.payload) {
            (PF, payload) => event.address = payload,
            (DB, Some(bits)) => {
                let mut registers = self.cpu.registers();
                registers.dr6 |= bits;
                self.cpu.set_registers(&registers);
            }
            _ => {}
        }
        event
    }

    pub(crate) fn deliver(&mut self, event: Event) -> Option<Next> {
        let exit = self.in_memory(|cpu| cpu.inject(event))?;
        if self.sev.is_some() {
            return Some(Next::Outside(exit));
        }
        Some(match exit.cause {
            kvm_ops_cpu::Cause::TripleFault => Next::Leave(Exit::Shutdown, Vec::new()),
            _ => delivery_failed(&exit),
        })
    }

    /// True if an interrupt waits that no local APIC holds.
    pub(crate) fn interrupt_line(&self) -> bool {
        match self.vm.irqchip() {
            Irqchip::None => self.wake.waiting().interrupt().is_some(),
            Irqchip::Full if self.boots() && self.cpu.takes_pic() => {
                self.vm.chips().is_some_and(|chips| chips.interrupts())
            }
            _ => false,
        }
    }

    /// The vector of that interrupt, which is taken.
    fn acknowledge(&mut self) -> Option<u8> {
        match self.vm.irqchip() {
            Irqchip::None => self.wake.take_interrupt(),
            _ => Some(self.vm.chips()?.acknowledge()),
        }
    }

    /// The answer to an interrupt window: an interrupt of the platform goes first.
    pub(crate) fn window_open(&mut self) -> Next {
        if self.interrupt_line() || !std::mem::take(&mut self.window) {
            return Next::Again;
        }
        Next::Leave(Exit::IrqWindow, Vec::new())
    }
}
