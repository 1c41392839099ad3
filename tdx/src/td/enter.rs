//! Passing the gate, association with a processor, and emptying an epoch.

use alloc::sync::Arc;
use alloc::vec::Vec;

use kvm_ops::{CpuId, Error, Host, Result, SeamPort, Step, VcpuId};

use super::gate::{GateState, Held};
use super::{Td, Vcpu};
use crate::seamcall::Outcome;
use crate::vcpu::VcpuRecord;

/// Turns of waiting after which a processor is kicked again: the first kick may have come just
/// before the processor went into the TD, where a real interrupt would have waited for it.
const KICK_AGAIN: u32 = 64;

/// A vCPU that may execute TDH.VP.ENTER. Dropped at each exit, before it is handled: whoever
/// empties the TD waits for that.
#[must_use]
pub(crate) struct Inside<'a> {
    vcpu: &'a VcpuRecord,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.vcpu.came_out();
    }
}

impl<H: Host> Td<H> {
    /// Takes a vCPU through the gate, to enter the TD on `cpu`, and flushes it off the processor that
    /// it is associated with if that is another one. `None` while others work with all vCPUs out: try
    /// again.
    pub(crate) fn enter<'a>(&self, vcpu: &'a VcpuRecord, cpu: CpuId) -> Result<Option<Inside<'a>>> {
        self.life.require(Step::Runnable)?;
        match self.gate.look() {
            GateState::Open => {}
            // For the rest of an export, which may be long.
            GateState::Held if self.journey.is_stopped() => return Err(Error::Busy),
            GateState::Held => return Ok(None),
            GateState::Closed => return Err(Error::WrongState(Step::KeyReleased)),
        }
        let mut associated = self.lock(&vcpu.associated);
        self.move_to(vcpu, &mut associated, cpu)
            .map_err(|failed| self.failed(&failed))?;
        vcpu.going_in(cpu);
        // From here on whoever moves the gate waits for this vCPU.
        let inside = Inside { vcpu };
        if self.gate.look() != GateState::Open {
            return Ok(None);
        }
        *associated = Some(cpu);
        Ok(Some(inside))
    }

    /// `Ok` until the teardown begins.
    pub(crate) fn require_open(&self) -> Result<()> {
        match self.gate.look() {
            GateState::Closed => Err(Error::WrongState(Step::KeyReleased)),
            GateState::Open | GateState::Held => Ok(()),
        }
    }

    /// Takes a vCPU's state off another processor than `cpu`.
    fn move_to(&self, vcpu: &VcpuRecord, associated: &mut Option<CpuId>, cpu: CpuId) -> Outcome {
        match *associated {
            Some(other) if other != cpu => self.flush_vcpu(vcpu, associated),
            _ => Ok(()),
        }
    }

    /// TDH.VP.FLUSH on the processor that the vCPU is associated with, if any.
    pub(crate) fn flush_vcpu(&self, vcpu: &VcpuRecord, associated: &mut Option<CpuId>) -> Outcome {
        let Some(cpu) = *associated else {
            return Ok(());
        };
        self.calls_for(crate::Leaf::VpFlush)?
            .vp_flush(cpu, vcpu.tdvpr)?;
        *associated = None;
        Ok(())
    }

    /// Runs `f` with the vCPU associated with `cpu`, as TDH.VP.WR makes it anyway.
    pub(crate) fn on_cpu_of<T>(
        &self,
        vcpu: &VcpuRecord,
        cpu: CpuId,
        f: impl FnOnce() -> Outcome<T>,
    ) -> Outcome<T> {
        let mut associated = self.lock(&vcpu.associated);
        // `end_key` closes the gate, then flushes every vCPU under this lock: if it is open here, the
        // association is undone there.
        self.require_open()
            .map_err(|error| crate::seamcall::Failed::port(crate::Leaf::VpWr, error))?;
        self.move_to(vcpu, &mut associated, cpu)?;
        *associated = Some(cpu);
        f()
    }

    /// The vCPUs that are ready to run.
    pub(crate) fn ready_vcpus(&self) -> Vec<Arc<VcpuRecord>> {
        let vcpus = self.lock(&self.vcpus);
        let ready = vcpus.values().filter_map(|vcpu| match vcpu {
            Vcpu::Ready(record) | Vcpu::Arrived(record) => Some(Arc::clone(record)),
            Vcpu::Unfinished(_) => None,
        });
        ready.collect()
    }

    /// Ends the halt of a vCPU, the current or the next.
    pub(crate) fn wake(&self, id: VcpuId) {
        // One that came with its TD may halt before it has a handle here.
        if let Some(Vcpu::Ready(vcpu) | Vcpu::Arrived(vcpu)) = self.lock(&self.vcpus).get(&id) {
            vcpu.wake();
        }
    }

    /// Lets a halted vCPU wait for a while. True if an event ends the halt.
    pub(crate) fn wait_for_event(&self, id: VcpuId, interrupts: bool) -> bool {
        let woken = self.on_td_port(|port| Ok(port.td_wait(id, interrupts))) == Ok(true);
        if !woken {
            self.idle();
        }
        woken
    }

    /// Takes an NMI that the machine below has for a vCPU.
    pub(crate) fn takes_nmi(&self, id: VcpuId) -> bool {
        self.on_td_port(|port| Ok(port.td_take_nmi(id))) == Ok(true)
    }

    /// Makes every vCPU that is inside come out. Does not wait.
    pub(crate) fn kick_all(&self) {
        let Some(seam) = self.host.seam() else { return };
        for vcpu in self.ready_vcpus() {
            if vcpu.stay().is_some() {
                seam.kick(vcpu.cpu());
            }
        }
    }

    /// Waits until every vCPU that is inside now has been out. It may be in again.
    pub(crate) fn empty_epoch(&self) {
        let Some(seam) = self.host.seam() else { return };
        let vcpus = self.ready_vcpus();
        let stays: Vec<_> = vcpus.iter().map(|vcpu| vcpu.stay()).collect();
        // All are kicked before any is waited for, so that they leave side by side.
        for (vcpu, stay) in vcpus.iter().zip(&stays) {
            if stay.is_some() {
                seam.kick(vcpu.cpu());
            }
        }
        for (vcpu, stay) in vcpus.iter().zip(stays) {
            let mut turns = 0u32;
            while stay.is_some() && vcpu.stay() == stay {
                seam.relax();
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(KICK_AGAIN) {
                    seam.kick(vcpu.cpu());
                }
            }
        }
    }

    /// Gets every vCPU out and keeps them out until the value is dropped.
    pub(crate) fn hold_out(&self) -> Held<'_> {
        let held = self.gate.hold();
        self.empty_epoch();
        held
    }

    /// Gets every vCPU out for ever.
    pub(crate) fn close_gate(&self) {
        self.gate.close();
        self.empty_epoch();
    }

    /// Calls, for functions whose failures are those of calls.
    pub(crate) fn calls_for(
        &self,
        leaf: crate::Leaf,
    ) -> Outcome<crate::seamcall::Calls<'_, H::Seam>> {
        self.calls()
            .map_err(|error| crate::seamcall::Failed::port(leaf, error))
    }

    /// Makes a call that vCPUs of this TD may be in the way of: if they are, they are kept out for
    /// one more try.
    pub(crate) fn without_vcpus<T>(&self, call: impl Fn() -> Outcome<T>) -> Outcome<T> {
        match call() {
            Err(failed) if failed.wants_kick() => {
                let _held = self.hold_out();
                call()
            }
            done => done,
        }
    }
}
