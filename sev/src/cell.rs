//! The part of a vCPU that its VM keeps: enough to launch it, to stop it, and to free its VMSA.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

use kvm_ops::{Kick, Page, VcpuId, VcpuOps};
use spin::{Mutex, MutexGuard};

use crate::sp::Held;
use crate::vmsa::StartState;

/// The page of an encrypted VMSA.
#[derive(Debug)]
pub(crate) struct VmsaPage {
    pub(crate) page: Page,
    pub(crate) held: Held,
}

/// A vCPU of a VM. It outlives the vCPU's handle: its VMSA is measured and stays.
pub(crate) struct Cell {
    pub(crate) id: VcpuId,
    pub(crate) kick: Arc<dyn Kick>,
    /// The register state is the guest's secret (Linux `guest_state_protected`).
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
            start: StartState::of(vcpu),
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
