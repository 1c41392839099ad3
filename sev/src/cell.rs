//! What the VM keeps of a vCPU: enough to launch it, to stop it, and to free what it left.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use kvm_ops::{DescTable, Kick, Pfn, SegmentName, VcpuId, VcpuOps};
use spin::{Mutex, MutexGuard};

use crate::sp::Held;
use crate::vmsa::{PAT_RESET, StartState};

const IA32_EFER: u32 = 0xc000_0080;
const IA32_PAT: u32 = 0x277;
/// CR0 as VMRUN gets it after power-on: ET. KVM clears CD and NW (`KVM_X86_QUIRK_CD_NW_CLEARED`).
pub(crate) const CR0_RESET: u64 = 1 << 4;

/// The page of an encrypted VMSA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmsaPage {
    pub(crate) page: Pfn,
    pub(crate) held: Held,
}

/// A vCPU as its VM knows it. It outlives the vCPU's handle: what is measured is measured.
pub(crate) struct Cell {
    pub(crate) id: VcpuId,
    pub(crate) kick: Arc<dyn Kick>,
    /// Set when its register state became the guest's secret (Linux `guest_state_protected`).
    protected: AtomicBool,
    state: Mutex<CellState>,
}

pub(crate) struct CellState {
    pub(crate) start: StartState,
    pub(crate) vmsa: Option<VmsaPage>,
}

impl Cell {
    pub(crate) fn new<V: VcpuOps>(vcpu: &V) -> Self {
        let state = CellState {
            start: StartState::of(vcpu, CR0_RESET, 0),
            vmsa: None,
        };
        Self {
            id: vcpu.id(),
            kick: vcpu.kick_handle(),
            protected: AtomicBool::new(false),
            state: Mutex::new(state),
        }
    }

    pub(crate) fn is_protected(&self) -> bool {
        self.protected.load(Ordering::Acquire)
    }

    pub(crate) fn protect(&self) {
        self.protected.store(true, Ordering::Release);
    }

    /// The register state that was received was given up.
    pub(crate) fn unprotect(&self) {
        self.protected.store(false, Ordering::Release);
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, CellState> {
        self.state.lock()
    }
}

impl StartState {
    /// What a vCPU of the port holds now. What it does not tell is what power-on leaves.
    pub(crate) fn of<V: VcpuOps>(vcpu: &V, cr0: u64, cr4: u64) -> Self {
        let table = |table: kvm_ops::Result<DescTable>| table.unwrap_or_default();
        Self {
            regs: vcpu.get_regs().unwrap_or_default(),
            segments: SegmentName::ALL.map(|name| vcpu.get_segment(name).unwrap_or_default()),
            gdt: table(vcpu.get_gdt()),
            idt: table(vcpu.get_idt()),
            cr0,
            cr4,
            efer: vcpu.get_msr(IA32_EFER).unwrap_or(0),
            pat: vcpu.get_msr(IA32_PAT).unwrap_or(PAT_RESET),
        }
    }
}
