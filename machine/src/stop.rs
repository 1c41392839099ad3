//! Stopping a machine from another thread.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ops::{Kick, VcpuId};

/// Stops a machine from any thread. Cheap to clone; it may outlive the machine, and does nothing
/// then.
#[derive(Clone)]
pub struct Stopper(Arc<Control>);

/// The state that a machine shares with its stoppers.
pub(crate) struct Control {
    requested: AtomicBool,
    /// By the number of the vCPU.
    kicks: Vec<Arc<dyn Kick>>,
}

impl Stopper {
    pub(crate) fn new(kicks: Vec<Arc<dyn Kick>>) -> Self {
        Self(Arc::new(Control {
            requested: AtomicBool::new(false),
            kicks,
        }))
    }

    /// Ends the run that is under way, or the next one if there is none, as
    /// [`End::Stopped`](crate::End::Stopped). It does not wait for the end.
    pub fn stop(&self) {
        // Before the kicks, so that a vCPU that a kick brings out of the guest sees it.
        self.0.requested.store(true, Ordering::SeqCst);
        self.kick_all_but(None);
    }

    /// Kicks every vCPU but one that needs no kick, because it is the caller. A kick is never lost:
    /// it would end its next run once.
    pub(crate) fn kick_all_but(&self, caller: Option<VcpuId>) {
        for (id, kick) in (0..).map(VcpuId).zip(&self.0.kicks) {
            if caller != Some(id) {
                kick.kick();
            }
        }
    }

    /// Kicks one vCPU, if it exists.
    pub(crate) fn kick(&self, vcpu: VcpuId) {
        if let Some(kick) = self.0.kicks.get(vcpu.0 as usize) {
            kick.kick();
        }
    }

    pub(crate) fn requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Forgets a request: the run that it was meant for is over.
    pub(crate) fn clear(&self) {
        self.0.requested.store(false, Ordering::SeqCst);
    }
}

impl fmt::Debug for Stopper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopper")
            .field("vcpus", &self.0.kicks.len())
            .field("requested", &self.requested())
            .finish()
    }
}
