//! A TD's record of each vCPU. It outlives the handle: the firmware owns the pages until the TD is
//! torn down.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use kvm_ops::{CpuId, Hpa, VcpuId};
use kvm_ops_mmu::Mutex;

use super::seat::{Resume, Seat};

/// A vCPU of a TD.
#[derive(Debug)]
pub(crate) struct VcpuRecord {
    pub(crate) id: VcpuId,
    /// The TDVPR page, by which SEAMCALLs name the vCPU.
    pub(crate) tdvpr: Hpa,
    /// The processor that the vCPU is associated with: its state may be in that processor's
    /// registers and VMCS cache. Held while it changes, so that two processors never claim it.
    pub(crate) associated: Mutex<Option<CpuId>>,
    /// Odd while the vCPU is inside the TD or about to be. It moves at each entry and each exit.
    entries: AtomicU64,
    /// The processor of the last entry, for kicks.
    cpu: AtomicU32,
    /// A kick that no `vcpu_run` has answered yet.
    kicked: AtomicBool,
    /// An interrupt or NMI came that may end a halt.
    woken: AtomicBool,
    /// The state of the vCPU while no `vcpu_run` has it.
    pub(crate) seat: Seat,
}

/// A vCPU while it is built.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unfinished {
    pub(crate) tdvpr: Hpa,
    /// The number of pages that the module has for it, the TDVPR among them.
    pub(crate) pages: u32,
}

impl VcpuRecord {
    pub(crate) fn new(id: VcpuId, tdvpr: Hpa, associated: CpuId) -> Self {
        Self {
            id,
            tdvpr,
            associated: Mutex::new(Some(associated)),
            entries: AtomicU64::new(0),
            cpu: AtomicU32::new(associated.0),
            kicked: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            seat: Seat::new(Resume::default()),
        }
    }

    /// The record for another VM of this vCPU, which is claimed. Old handles keep the old record,
    /// whose kicks reach nothing. `relax` passes a turn of waiting.
    pub(crate) fn give(&self, relax: impl Fn()) -> Self {
        // Whoever writes a field of the vCPU holds this, and looks at the gate under it.
        let associated = self.associated.lock(&relax).take();
        let resume = self.seat.give(relax);
        Self {
            id: self.id,
            tdvpr: self.tdvpr,
            associated: Mutex::new(associated),
            entries: AtomicU64::new(0),
            cpu: AtomicU32::new(self.cpu.load(Ordering::SeqCst)),
            kicked: AtomicBool::new(false),
            woken: AtomicBool::new(self.take_wake()),
            seat: Seat::new(resume),
        }
    }

    /// Says that the vCPU goes inside on that processor.
    pub(crate) fn going_in(&self, cpu: CpuId) {
        self.cpu.store(cpu.0, Ordering::SeqCst);
        self.entries.fetch_add(1, Ordering::SeqCst);
    }

    /// Says that it is out.
    pub(crate) fn came_out(&self) {
        self.entries.fetch_add(1, Ordering::SeqCst);
    }

    /// The count of this stay inside, `None` while it is out.
    pub(crate) fn stay(&self) -> Option<u64> {
        Some(self.entries.load(Ordering::SeqCst)).filter(|n| n % 2 == 1)
    }

    /// The processor where it is inside, or was last.
    pub(crate) fn cpu(&self) -> CpuId {
        CpuId(self.cpu.load(Ordering::SeqCst))
    }

    /// Asks the next or current `vcpu_run` to return
    /// [`Exit::Interrupted`](kvm_ops::Exit::Interrupted).
    pub(crate) fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
    }

    /// Takes a kick that no run has answered. Returns whether there was one.
    pub(crate) fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Returns whether a kick is unanswered.
    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Returns whether a halt ends at once.
    pub(crate) fn is_woken(&self) -> bool {
        self.woken.load(Ordering::SeqCst)
    }

    /// Ends the current halt, or the next.
    pub(crate) fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
    }

    /// Takes the request to end a halt. Returns whether there was one.
    pub(crate) fn take_wake(&self) -> bool {
        self.woken.swap(false, Ordering::SeqCst)
    }
}
