//! A way to the interrupt controllers of a VM, for whoever emulates what is in front of them: inputs, messages,
//! registers, and the ends of interrupts.

use std::fmt;
use std::sync::{Arc, MutexGuard, OnceLock, Weak};

use kvm_ops::{Error, Msi, Result, Step};

use crate::SimVm;
use crate::chips::{Chips, IoApicState, PicState, Pin, PitState, TimerParts, Took};
use crate::vm::VmInner;

/// The end of an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Of an input, which is told before it is looked at again. With a full irqchip.
    Pin(Pin),
    /// Of a vector of a local APIC, whose I/O APIC is not in the platform.
    Vector(u8),
}

type Hook = Box<dyn Fn(u32, Ended) + Send + Sync>;

/// Told of ends of interrupts.
#[derive(Default)]
pub(crate) struct EndHook(OnceLock<Hook>);

impl EndHook {
    pub(crate) fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    pub(crate) fn call(&self, vcpu: u32, ended: Ended) {
        if let Some(hook) = self.0.get() {
            hook(vcpu, ended);
        }
    }
}

impl fmt::Debug for EndHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EndHook").field(&self.is_set()).finish()
    }
}

/// The interrupt controllers of a VM. It does not keep the VM, after whose end all operations answer
/// [`Error::WrongState`].
#[derive(Clone, Debug)]
pub struct Wires {
    vm: Weak<VmInner>,
}

impl SimVm {
    /// The way to the interrupt controllers.
    pub fn wires(&self) -> Wires {
        Wires {
            vm: Arc::downgrade(&self.inner),
        }
    }
}

impl Wires {
    fn vm(&self) -> Result<Arc<VmInner>> {
        let vm = self.vm.upgrade();
        vm.ok_or(Error::WrongState(Step::Drained))
    }

    fn with_chips<T>(&self, work: impl FnOnce(&VmInner, MutexGuard<'_, Chips>) -> T) -> Result<T> {
        let vm = self.vm()?;
        let chips = vm.require_chips()?;
        Ok(work(&vm, chips))
    }

    /// Sets the level of an input, as one of the sources 0 to 6 has it. The input is high if one of them is. An
    /// input that there is not is left alone. Returns what became of the level.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without a full irqchip in the platform.
    pub fn set_pin(&self, pin: Pin, source: u8, high: bool) -> Result<Took> {
        self.with_chips(|vm, mut chips| {
            let took = chips.set_pin(pin, source, high);
            vm.send_from(chips);
            took
        })
    }

    /// Makes the timer drive these inputs, in place of those of line 0.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn set_timer_pins(&self, pins: Vec<Pin>) -> Result<()> {
        self.with_chips(|_, mut chips| chips.set_timer_pins(pins))
    }

    /// Sets the parts of the timer that the VM has. Ports of the others leave to the embedder.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn set_timer_parts(&self, parts: TimerParts) -> Result<()> {
        self.with_chips(|_, mut chips| chips.set_timer_parts(parts))
    }

    /// Sends an interrupt message. `true` if it names a vCPU, also if its guest has the local APIC disabled.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is none of a message.
    pub fn signal_msi(&self, msi: Msi) -> Result<bool> {
        self.vm()?.signal_msi(msi)
    }

    /// Sets a function that is called with the number of a vCPU when its guest ends an interrupt. Only the first one
    /// counts. It is called in the turn of the processor: it may set pins, and waits for nothing that waits for
    /// a turn.
    ///
    /// # Errors
    /// Only that the VM is gone.
    pub fn on_end(&self, hook: impl Fn(u32, Ended) + Send + Sync + 'static) -> Result<()> {
        let _ = self.vm()?.end_hook.0.set(Box::new(hook));
        Ok(())
    }

    /// Reads the registers of the first 8259A or the second.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin); so for the methods below.
    pub fn pic(&self, second: bool) -> Result<PicState> {
        self.with_chips(|_, chips| chips.pic_state(second))
    }

    /// Loads them.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn set_pic(&self, second: bool, state: &PicState) -> Result<()> {
        self.with_chips(|vm, mut chips| {
            chips.set_pic_state(second, state);
            vm.send_from(chips);
        })
    }

    /// Reads the registers of the I/O APIC.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn ioapic(&self) -> Result<IoApicState> {
        self.with_chips(|_, chips| chips.ioapic_state())
    }

    /// Loads them. Inputs that are high interrupt as if they rose.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn set_ioapic(&self, state: &IoApicState) -> Result<()> {
        self.with_chips(|vm, mut chips| {
            chips.set_ioapic_state(state);
            vm.send_from(chips);
        })
    }

    /// Reads the registers of the timer.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn pit(&self) -> Result<PitState> {
        self.with_chips(|_, chips| chips.pit_state())
    }

    /// Loads them. Counts that were loaded begin again now.
    ///
    /// # Errors
    /// As [`set_pin`](Self::set_pin).
    pub fn set_pit(&self, state: &PitState) -> Result<()> {
        self.with_chips(|vm, mut chips| chips.set_pit_state(state, vm.turns.clock()))
    }
}
