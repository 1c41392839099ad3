//! The guest, its vCPUs and its host together.

use super::builder::TestSevBuilder;
use super::hypervisor::World;
use super::launch::{Machine, Technology};
use super::{Exit, Host, Hypervisor, Stopped, Vcpu};
use crate::running;
use crate::sync::lock;
use kvm_ops_guest::sev::{Pvalidate, Validated};
use std::sync::{Arc, Mutex};

/// All of a guest. The host's lock is taken first.
pub(super) struct Inner {
    pub(super) machine: Machine,
    pub(super) host: Mutex<Box<dyn Host>>,
    pub(super) world: Mutex<World>,
    pub(super) coherent: bool,
    exits: Mutex<Vec<Exit>>,
    pvalidates: Mutex<Vec<(Pvalidate, Validated)>>,
}

impl Inner {
    pub(super) fn is_ram(&self, page: u64) -> bool {
        page < self.machine.ram
    }

    pub(super) fn note(&self, exit: Exit) {
        lock(&self.exits).push(exit);
    }

    pub(super) fn note_pvalidate(&self, operation: Pvalidate, result: Validated) {
        lock(&self.pvalidates).push((operation, result));
    }
}

/// A guest of SEV, SEV-ES or SNP on a software AMD SP, for tests of code that runs in such guests.
///
/// Its vCPUs are values: [`vcpu`](Self::vcpu) gives one, with the ports of
/// [`SevGuest`](kvm_ops_guest::sev::SevGuest). Code under test runs wherever the test calls it; what exits
/// runs the host on the same thread. Clones are the same guest.
///
/// ```
/// use kvm_ops_guest::GpaRange;
/// use kvm_ops_guest_test::sev::TestSev;
///
/// let guest = TestSev::snp().assigned(0x8000..0xa000).build()?;
/// let mut cpu = guest.vcpu();
/// cpu.kernel().validate(GpaRange::new(0x8000, 0x2000)?)?;
/// cpu.write(0x8000, b"mine")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct TestSev {
    pub(super) inner: Arc<Inner>,
}

impl TestSev {
    /// Makes an SNP guest.
    pub fn snp() -> TestSevBuilder {
        TestSevBuilder::new(Technology::Snp)
    }

    /// Makes an SEV-ES guest.
    pub fn sev_es() -> TestSevBuilder {
        TestSevBuilder::new(Technology::SevEs)
    }

    /// Makes an SEV guest.
    pub fn sev() -> TestSevBuilder {
        TestSevBuilder::new(Technology::Sev)
    }

    pub(super) fn new(machine: Machine, world: World, host: Box<dyn Host>, coherent: bool) -> Self {
        let inner = Inner {
            machine,
            host: Mutex::new(host),
            world: Mutex::new(world),
            coherent,
            exits: Mutex::default(),
            pvalidates: Mutex::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A vCPU at VMPL0. A guest has as many as are asked for, on any threads.
    pub fn vcpu(&self) -> Vcpu {
        Vcpu::new(Arc::clone(&self.inner), 0)
    }

    /// Runs code of the guest on a vCPU, on this thread.
    ///
    /// # Errors
    /// The host did not enter the vCPU again in a call that has no other way to say so, VMGEXIT for
    /// instance: [`Stopped`] says why.
    pub fn run<R>(&self, guest: impl FnOnce(&mut Vcpu) -> R) -> Result<R, Stopped> {
        running::run(|| guest(&mut self.vcpu()))
    }

    /// Replaces the host.
    pub fn set_host(&self, host: impl Host + 'static) {
        *lock(&self.inner.host) = Box::new(host);
    }

    /// The host's hands, between exits.
    pub fn hypervisor(&self) -> Hypervisor<'_> {
        Hypervisor { inner: &self.inner }
    }

    /// The exits so far, in order; they are forgotten.
    pub fn take_exits(&self) -> Vec<Exit> {
        std::mem::take(&mut lock(&self.inner.exits))
    }

    /// The PVALIDATEs that completed so far, in order; they are forgotten.
    pub fn take_pvalidates(&self) -> Vec<(Pvalidate, Validated)> {
        std::mem::take(&mut lock(&self.inner.pvalidates))
    }
}

impl std::fmt::Debug for TestSev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestSev")
            .field("technology", &self.inner.machine.technology)
            .field("memory", &self.inner.machine.ram)
            .finish_non_exhaustive()
    }
}
