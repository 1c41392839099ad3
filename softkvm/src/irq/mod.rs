//! Interrupts and events of a VM: routes from lines (GSIs) to inputs of chips and to messages, eventfds that
//! interrupt, and eventfds that guests' writes signal.
//!
//! | file | part |
//! |---|---|
//! | `routes` | the table, and `KVM_SET_GSI_ROUTING` |
//! | `lines` | `KVM_IRQ_LINE`, `KVM_IRQ_LINE_STATUS`, `KVM_SIGNAL_MSI` |
//! | `irqfd` | `KVM_IRQFD`, and the ends of interrupts |
//! | `ioevents` | `KVM_IOEVENTFD` |
//! | `coalesced` | `KVM_REGISTER_COALESCED_MMIO`: writes that wait in a ring |
//! | `chips` | `KVM_GET_IRQCHIP`, `KVM_SET_IRQCHIP`, `KVM_GET_PIT2`, `KVM_SET_PIT2` |
//!
//! All of it is outside of the VM's lock: the end of an interrupt is told by a processor in the middle of its
//! turn, for which whoever holds that lock may wait.

mod chips;
mod coalesced;
mod ioevents;
mod irqfd;
mod lines;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_ops::Msi;
use kvm_ops::sim::{Ended, Pin, TimerParts, Took, Wires};

pub(crate) use chips::{get_chip, get_pit, set_chip, set_pit};
pub(crate) use coalesced::{coalesce, do_not_coalesce};
pub(crate) use ioevents::{At, ioeventfd};
pub(crate) use irqfd::irqfd;
pub(crate) use lines::{irq_line, signal_msi};
pub(crate) use routes::set_routes;

use coalesced::Coalesced;
use ioevents::IoEvents;
use irqfd::Irqfds;
use routes::{Route, Routes};

use crate::{EventFd, RunArea};

/// Who drives a line: a line is high while one of them holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// User space, and irqfds that pulse.
    User = 0,
    /// irqfds with a level.
    Resample = 1,
}

/// The interrupts and events of a VM.
#[derive(Default)]
pub(crate) struct Irq {
    state: Mutex<State>,
    ioevents: IoEvents,
    coalesced: Coalesced,
    irqfds: Mutex<Irqfds>,
    /// Ends of interrupts that user space's I/O APIC is to be told: how many.
    told: AtomicUsize,
}

/// A VM has no timer before `KVM_CREATE_PIT2`.
const NO_TIMER: TimerParts = TimerParts {
    timer: false,
    speaker: false,
};

#[derive(Default)]
struct State {
    /// What `KVM_CREATE_PIT2` made.
    timer: Option<TimerParts>,
    /// The interrupt controllers of the back end, once there is one.
    wires: Option<Wires>,
    routes: Routes,
    /// Messages have 32 bits for their destination (`KVM_X2APIC_API_USE_32BIT_IDS`).
    x2apic_format: bool,
    /// Nanoseconds of a tick of local APICs' timers (`KVM_CAP_X86_APIC_BUS_CYCLES_NS`).
    apic_bus_cycle: Option<u64>,
    /// Of a split irqchip: the GSIs below are inputs of user space's I/O APIC.
    reserved: u32,
    /// Vectors that ended, by vCPU.
    ends: BTreeMap<u32, BTreeSet<u8>>,
}

impl Irq {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn irqfds(&self) -> MutexGuard<'_, Irqfds> {
        self.irqfds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A full irqchip has routes from the start.
    pub(crate) fn set_full(&self) {
        self.lock().routes = Routes::of_full_irqchip();
    }

    /// A split irqchip has none.
    pub(crate) fn set_split(&self, reserved: u32) {
        self.lock().reserved = reserved;
    }

    /// The timer is there from now on.
    pub(crate) fn set_timer(&self, speaker: bool) {
        let mut state = self.lock();
        state.timer = Some(TimerParts {
            timer: true,
            speaker,
        });
        state.tell_timer();
    }

    pub(crate) fn set_x2apic_format(&self) {
        self.lock().x2apic_format = true;
    }

    pub(crate) fn set_apic_bus_cycle(&self, nanoseconds: u64) {
        self.lock().apic_bus_cycle = Some(nanoseconds);
    }

    pub(crate) fn apic_bus_cycle(&self) -> Option<u64> {
        self.lock().apic_bus_cycle
    }

    pub(crate) fn has_x2apic_format(&self) -> bool {
        self.lock().x2apic_format
    }

    /// The back end is there.
    pub(crate) fn attach(this: &Arc<Self>, wires: Wires) {
        let irq: Weak<Self> = Arc::downgrade(this);
        let hook = move |vcpu, ended| {
            if let Some(irq) = irq.upgrade() {
                irq.ended(vcpu, ended);
            }
        };
        if let Err(error) = wires.on_end(hook) {
            tracing::error!(%error, "the ends of interrupts are not told");
        }
        let mut state = this.lock();
        state.wires = Some(wires);
        state.tell_timer();
    }

    /// The interrupt controllers of the back end.
    fn wires(&self) -> Option<Wires> {
        self.lock().wires.clone()
    }

    /// Sets the level of a line. Returns the number of messages and inputs that took it: 0 if it was merged with an interrupt that
    /// waits, -1 if it leads nowhere or to masked inputs.
    fn set_line(&self, gsi: u32, source: Source, high: bool) -> i32 {
        let (wires, routes, wide) = {
            let state = self.lock();
            let routes = state.routes.of(gsi).to_vec();
            (state.wires.clone(), routes, state.x2apic_format)
        };
        let Some(wires) = wires else { return -1 };
        let mut taken = -1;
        for route in routes {
            let took = match route {
                Route::Pin(pin) => match wires.set_pin(pin, source as u8, high) {
                    Ok(Took::Taken) => Some(1),
                    Ok(Took::Merged) => Some(0),
                    Ok(Took::Masked) | Err(_) => None,
                },
                Route::Message(msi) => (high && signal(&wires, msi, wide)).then_some(1),
            };
            if let Some(took) = took {
                taken = taken.max(0) + took;
            }
        }
        taken
    }

    /// Sends a message. True if a local APIC is meant.
    fn send(&self, msi: Msi) -> bool {
        let (wires, wide) = {
            let state = self.lock();
            (state.wires.clone(), state.x2apic_format)
        };
        wires.is_some_and(|wires| signal(&wires, msi, wide))
    }

    /// A guest ended an interrupt.
    fn ended(&self, vcpu: u32, ended: Ended) {
        match ended {
            Ended::Pin(pin) => self.resample(pin),
            Ended::Vector(vector) => {
                let mut state = self.lock();
                if state.routes.has_level(vector, state.reserved)
                    && state.ends.entry(vcpu).or_default().insert(vector)
                {
                    self.told.fetch_add(1, Ordering::Release);
                }
            }
        }
    }

    /// True if the vCPU has to leave for the end of an interrupt.
    pub(crate) fn has_end(&self, vcpu: u32) -> bool {
        self.told.load(Ordering::Acquire) != 0 && self.lock().ends.contains_key(&vcpu)
    }

    /// Takes the vector of an interrupt that ended, for user space's I/O APIC.
    pub(crate) fn take_end(&self, vcpu: u32) -> Option<u8> {
        if self.told.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut state = self.lock();
        let vectors = state.ends.get_mut(&vcpu)?;
        let vector = vectors.pop_first()?;
        if vectors.is_empty() {
            state.ends.remove(&vcpu);
        }
        self.told.fetch_sub(1, Ordering::Release);
        Some(vector)
    }

    /// Signals the eventfd that takes a write of the guest, or puts it into the ring of coalesced writes, in the run area of
    /// its vCPU. False if neither takes it: it leaves to user space.
    pub(crate) fn take_write(&self, at: At, data: &[u8], area: &dyn RunArea) -> bool {
        self.ioevents.take_write(at, data) || self.coalesced.take_write(at, data, area)
    }
}

impl State {
    /// The timer, if there is one, drives line 0.
    fn tell_timer(&self) {
        let Some(wires) = &self.wires else { return };
        let pins = self.routes.of(0).iter().filter_map(|route| match route {
            Route::Pin(pin) => Some(*pin),
            Route::Message(_) => None,
        });
        // Refused without a full irqchip, which has no timer.
        let _ = wires.set_timer_pins(pins.collect::<Vec<Pin>>());
        let _ = wires.set_timer_parts(self.timer.unwrap_or(NO_TIMER));
    }
}

/// Sends a message, whose destination has 32 bits or 8. Linux does not look at bits 31:20 of its address, and QEMU gives
/// the offset from 0xfee00000 alone (Linux `kvm_msi_to_lapic_irq`, QEMU `kvm_apic_mem_write`).
fn signal(wires: &Wires, mut msi: Msi, wide: bool) -> bool {
    const MESSAGES: u64 = 0xfee0_0000;
    const IGNORED: u64 = 0xfff0_0000;
    if !wide {
        msi.address &= u64::from(u32::MAX);
    }
    msi.address = msi.address & !IGNORED | MESSAGES;
    wires.signal_msi(msi).unwrap_or(false)
}

/// True for two handles of one eventfd.
fn is_same(a: &Arc<dyn EventFd>, b: &Arc<dyn EventFd>) -> bool {
    a.id() == b.id()
}
