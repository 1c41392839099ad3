//! The gate at the entry into the guest, which a move of the guest closes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

use kvm_ops::{Kick, VcpuId};

/// Lets vCPUs into the guest, and knows all that were created.
#[derive(Default)]
pub(crate) struct Gate {
    /// Held for reading by each vCPU that is inside.
    inside: RwLock<()>,
    closing: AtomicBool,
    vcpus: Mutex<Vec<Known>>,
}

/// A vCPU that was created. The system keeps it as long as the VM, with its handle or without.
struct Known {
    id: VcpuId,
    kick: Arc<dyn Kick>,
    waits: Arc<AtomicBool>,
}

/// A gate that is closed as long as this lives: no vCPU is inside, and none comes in.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
    _none_inside: RwLockWriteGuard<'a, ()>,
}

impl Gate {
    /// Adds a vCPU. `waits` is true while its last exit waits for an answer.
    pub(crate) fn add(&self, id: VcpuId, kick: Arc<dyn Kick>, waits: Arc<AtomicBool>) {
        self.vcpus().push(Known { id, kick, waits });
    }

    fn vcpus(&self) -> MutexGuard<'_, Vec<Known>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers of the vCPUs, in the order in which they were created.
    pub(crate) fn ids(&self) -> Vec<VcpuId> {
        self.vcpus().iter().map(|vcpu| vcpu.id).collect()
    }

    /// Enters; waits while the gate is closed.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        loop {
            let inside = self.inside.read().unwrap_or_else(PoisonError::into_inner);
            // A vCPU that came in between the kick and the write lock goes out again.
            if !self.closing.load(Ordering::SeqCst) {
                return inside;
            }
            drop(inside);
            thread::yield_now();
        }
    }

    /// Makes every vCPU leave the guest once, and keeps all of them out.
    pub(crate) fn close(&self) -> Closed<'_> {
        self.closing.store(true, Ordering::SeqCst);
        for vcpu in self.vcpus().iter() {
            vcpu.kick.kick();
        }
        Closed {
            gate: self,
            _none_inside: self.inside.write().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl Closed<'_> {
    /// True if the last exit of a vCPU waits for its answer.
    pub(crate) fn waits(&self) -> bool {
        let vcpus = self.gate.vcpus();
        vcpus.iter().any(|vcpu| vcpu.waits.load(Ordering::SeqCst))
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.closing.store(false, Ordering::SeqCst);
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("vcpus", &self.ids())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// A guest that runs until it is kicked.
    #[derive(Default)]
    struct Endless(AtomicBool);

    impl Kick for Endless {
        fn kick(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    impl Endless {
        fn run(&self) {
            while !self.0.swap(false, Ordering::SeqCst) {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn a_closed_gate_has_no_vcpu_inside_and_lets_them_in_when_it_opens() {
        const ROUNDS: u32 = 200;
        let gate = Gate::default();
        let (inside, over) = (AtomicU32::new(0), AtomicBool::new(false));
        let vcpus: Vec<_> = (0..2).map(|_| Arc::new(Endless::default())).collect();
        for (id, vcpu) in vcpus.iter().enumerate() {
            gate.add(VcpuId(id as u32), vcpu.clone(), Arc::default());
        }
        thread::scope(|scope| {
            for vcpu in &vcpus {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        let entered = gate.enter();
                        inside.fetch_add(1, Ordering::SeqCst);
                        vcpu.run();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(entered);
                    }
                });
            }
            for _ in 0..ROUNDS {
                while inside.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
                let closed = gate.close();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                assert!(!closed.waits());
            }
            over.store(true, Ordering::SeqCst);
            vcpus.iter().for_each(|vcpu| vcpu.kick());
        });
    }
}
