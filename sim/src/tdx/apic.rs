//! The local APIC of a TD's vCPU, as far as it is the host's: KVM's `lapic.c` with a protected APIC.
//!
//! The guest has task priority, requests and interrupts in service in its virtual APIC page. All other registers are
//! here, reached by TDG.VP.VMCALL. What they lead to, an interrupt of the timer or one for another vCPU, is posted: the
//! processor takes it over before the next instruction.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ops::{Error, Field, Irqchip, Result, TdApic, VcpuId};
use kvm_ops_cpu::{Apic, ApicAddress, ApicEffect};

use crate::irq::{State, Wake};
use crate::processor::{Command, Kind, Sleeper, To, Turns};
use crate::registers::X2APIC_MODE;
use crate::vm::VmInner;

/// Physical-address bits of the base.
const ADDRESS_BITS: u8 = 52;

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;

/// The destination shorthand of an interrupt command for the sender itself.
const TO_SELF: u64 = 1;

/// The longest time that a halted vCPU waits at once: then its back end looks for kicks.
const WAIT: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(crate) struct HostApic {
    id: u32,
    apic: Mutex<Apic>,
    wake: Arc<Wake>,
    /// At the last exit the virtual APIC page had an interrupt that the guest's priority lets through.
    deliverable: AtomicBool,
}

impl HostApic {
    pub(super) fn new(id: u32, wake: &Arc<Wake>) -> Self {
        let mut apic = Apic::new(id);
        let base = apic.base() | X2APIC_MODE;
        // The mode changes nothing that the register can not hold.
        let _ = apic.load_base(base, ADDRESS_BITS);
        wake.accept(apic.enabled());
        Self {
            id,
            apic: Mutex::new(apic),
            wake: Arc::clone(wake),
            deliverable: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Apic> {
        // The registers are plain values.
        self.apic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn address(&self) -> ApicAddress {
        self.lock().address()
    }

    /// Sets the clock ticks of the timer's input clock.
    pub(super) fn set_ticks(&self, ticks: u64) {
        let mut apic = self.lock();
        *apic = apic.clone().ticks(ticks);
    }

    /// RDMSR. `None` for the MSR of another device.
    pub(super) fn read(&self, index: u32, now: u64) -> Result<Option<u64>> {
        let apic = self.lock();
        match index {
            APIC_BASE => Ok(Some(apic.base())),
            TSC_DEADLINE => Ok(Some(apic.tsc_deadline())),
            0x800..=0x8ff => apic
                .read_x2(index, now)
                .filter(|_| !is_the_guests(index))
                .map(Some)
                .ok_or(fault(index)),
            _ => Ok(None),
        }
    }

    /// WRMSR. False for the MSR of another device.
    pub(super) fn write(&self, vm: &VmInner, index: u32, value: u64, now: u64) -> Result<bool> {
        let mut apic = self.lock();
        let effect = match index {
            // A TD cannot leave x2APIC mode.
            APIC_BASE if value == apic.base() => ApicEffect::None,
            APIC_BASE => return Err(fault(index)),
            TSC_DEADLINE => {
                // The guest's TSC is the clock.
                apic.set_tsc_deadline(value, now, now);
                ApicEffect::None
            }
            0x800..=0x8ff if is_the_guests(index) => return Err(fault(index)),
            0x800..=0x8ff => apic.write_x2(index, value, now).ok_or(fault(index))?,
            _ => return Ok(false),
        };
        self.wake.accept(apic.enabled());
        drop(apic);
        if let ApicEffect::Command(icr) = effect {
            self.send(vm, icr);
        }
        self.post_due(now);
        Ok(true)
    }

    /// Sends an interrupt command. No INIT and no start-up interrupt reaches the vCPU of a TD: the module blocks the
    /// first, and all vCPUs start by themselves.
    fn send(&self, vm: &VmInner, icr: u64) {
        let mut command = Command::from_icr(icr);
        if icr >> 18 & 3 == TO_SELF {
            command.to = To::Named {
                destination: self.id,
                logical: false,
            };
        }
        if matches!(command.kind, Some(Kind::Init | Kind::Start)) {
            let vcpu = self.id;
            tracing::debug!(
                technology = "tdx",
                vcpu,
                icr,
                "INIT or SIPI does nothing in a TD"
            );
            return;
        }
        // Its own messages come the same way as all others.
        let sender = (command.to == To::Others).then_some(self.id);
        vm.processors().deliver(&command, sender);
        vm.turns.heard();
    }

    /// Posts the timer's interrupt, if its time has come.
    pub(super) fn post_due(&self, now: u64) {
        let mut apic = self.lock();
        while let Some(vector) = apic.fire(now) {
            self.wake.post(vector);
        }
    }

    /// Everything of it, for another machine.
    pub(super) fn state(&self, now: u64) -> TdApic {
        // A timer that fires posts its interrupt under this lock.
        let apic = self.lock();
        let waiting = self.wake.waiting();
        TdApic {
            registers: apic.save(now),
            tsc_deadline: apic.tsc_deadline(),
            posted: waiting.vectors,
            nmi: waiting.nmi,
            deliverable: self.deliverable.load(Ordering::Relaxed),
        }
    }

    /// Takes over what another machine had.
    pub(super) fn set_state(&self, state: &TdApic, now: u64) {
        let mut apic = self.lock();
        apic.load(&state.registers, now);
        apic.set_tsc_deadline(state.tsc_deadline, now, now);
        self.wake.accept(apic.enabled());
        self.wake.change(|waiting, _| {
            waiting.vectors = state.posted;
            waiting.nmi = state.nmi;
        });
        self.note_deliverable(state.deliverable);
    }

    /// The clock at which the timer fires next.
    pub(super) fn next(&self) -> Option<u64> {
        self.lock().expires()
    }

    /// Notes at an exit whether the virtual APIC page has an interrupt for the guest.
    pub(super) fn note_deliverable(&self, deliverable: bool) {
        self.deliverable.store(deliverable, Ordering::Relaxed);
    }

    /// The longest time that the halted vCPU may sleep at once: no longer than up to its timer, if time does not wait for it.
    fn patience(&self, turns: &Turns) -> Duration {
        let left = |now: u64| {
            self.next()
                .map(|at| Duration::from_nanos(at.saturating_sub(now)))
        };
        let timer = turns.host_clock().and_then(left);
        timer.map_or(WAIT, |timer| timer.min(WAIT))
    }

    /// Lets the halted vCPU sleep for a while. True if an event ends the halt. While every vCPU sleeps, time jumps to the
    /// next timer, unless it is the host's.
    pub(super) fn wait(&self, turns: &Turns, interrupts: bool) -> bool {
        let began = Instant::now();
        loop {
            self.post_due(turns.clock());
            let held = interrupts && self.deliverable.load(Ordering::Relaxed);
            if held || self.wake.with(|state| state.ends_halt(interrupts)) {
                turns.rise(self.id);
                return true;
            }
            let sleeper = Sleeper {
                until: self.next(),
                wake: Arc::clone(&self.wake),
                hears: match interrupts {
                    true => |state| state.ends_halt(true),
                    false => |state| state.ends_halt(false),
                },
            };
            turns.sleep(self.id, sleeper);
            let event = |state: &mut State| {
                let due = state.take_due();
                (due || state.ends_halt(interrupts)).then_some(())
            };
            let woken = self.wake.wait_for(self.patience(turns), event);
            if woken.is_none() && began.elapsed() >= WAIT {
                return false;
            }
        }
    }
}

impl VmInner {
    /// The host's part of a TD vCPU's local APIC, if it has one.
    pub(crate) fn td_apic(&self, vcpu: VcpuId) -> Option<Arc<HostApic>> {
        self.vcpus().get(&vcpu)?.apic.clone()
    }

    /// Gives a TD vCPU that part, if the VM has local APICs in the platform and the vCPU has none.
    pub(crate) fn set_td_apic(
        &self,
        vcpu: VcpuId,
        make: impl FnOnce() -> HostApic,
    ) -> Option<Arc<HostApic>> {
        let mut vcpus = self.vcpus();
        let slot = &mut vcpus.entry(vcpu).or_default().apic;
        if self.irqchip() != Irqchip::None && slot.is_none() {
            *slot = Some(Arc::new(make()));
        }
        slot.clone()
    }

    /// Takes it away: a guest program has mail and no registers.
    pub(crate) fn drop_td_apic(&self, vcpu: VcpuId) {
        let mut vcpus = self.vcpus();
        if let Some(mailbox) = vcpus.get_mut(&vcpu)
            && mailbox.apic.take().is_some()
        {
            mailbox.wake.accept(true);
            self.processors().remove(vcpu.0);
        }
    }
}

/// Registers of the virtual APIC page: task and processor priority, end of interrupt, and the three bitmaps.
const fn is_the_guests(index: u32) -> bool {
    matches!(index, 0x808 | 0x80a | 0x80b | 0x810..=0x827)
}

const fn fault(index: u32) -> Error {
    Error::Invalid(Field::Msr, index as u64)
}
