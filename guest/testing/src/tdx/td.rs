//! The TD, its vCPUs and its host together.

use super::builder::{Quoting, TestTdBuilder};
use super::current::Current;
use super::machine::{Machine, Pool};
use super::processor::Processor;
use super::quoting::Quotes;
use super::{Exit, Host, Hypervisor, Stopped, Vcpu};
use crate::running;
use crate::sync::lock;
use kvm_ops_guest::{GpaRange, PageSize};
use soft_tdx_module::report::REPORT_LEN;
use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};

const PAGE: u64 = PageSize::Size4K.bytes();

/// All of a TD. Locks are taken in this order: host, pool, and then one of the others.
pub(super) struct Inner {
    pub(super) machine: Machine,
    pub(super) host: Mutex<Box<dyn Host>>,
    /// The host's free pages, and with them its processor.
    pub(super) pool: Mutex<Pool>,
    shared: Mutex<BTreeSet<u64>>,
    exits: Mutex<Vec<(usize, Exit)>>,
    pub(super) quotes: Mutex<Quotes>,
    pub(super) vcpus: Vec<Mutex<Processor>>,
}

impl Inner {
    pub(super) fn is_shared(&self, gpa: u64) -> bool {
        lock(&self.shared).contains(&(gpa & !(PAGE - 1)))
    }

    pub(super) fn set_shared(&self, range: GpaRange, shared: bool) {
        let mut set = lock(&self.shared);
        for page in (range.start()..range.end()).step_by(PAGE as usize) {
            match shared {
                true => set.insert(page),
                false => set.remove(&page),
            };
        }
    }

    /// MRTD and the RTMRs.
    fn measurements(&self) -> ([u8; 48], [[u8; 48]; 4]) {
        let view = self.machine.p.td(self.machine.tdr);
        // The TD lives as long as its machine.
        view.map_or(([0; 48], [[0; 48]; 4]), |td| (td.mrtd, td.rtmr))
    }

    pub(super) fn note(&self, vcpu: usize, exit: Exit) {
        lock(&self.exits).push((vcpu, exit));
    }
}

/// A TD that runs on a software TDX module, for tests of code that runs in TDs.
///
/// Its vCPUs are values: [`vcpu`](Self::vcpu) gives one, and it is a
/// [`TdcallPort`](kvm_ops_guest::tdx::TdcallPort). Code under test runs wherever the test calls it; an
/// instruction that exits runs the host on the same thread. Clones are the same TD.
///
/// ```
/// use kvm_ops_guest::GpaRange;
/// use kvm_ops_guest::tdx::TdGuest;
/// use kvm_ops_guest_test::tdx::TestTd;
///
/// let td = TestTd::builder().pending(0x8000..0xa000).build()?;
/// td.run(|cpu| {
///     let mut kernel = TdGuest::new(&mut *cpu)?;
///     kernel.accept(GpaRange::new(0x8000, 0x2000)?)?;
///     cpu.write(0x8000, b"mine")?;
///     Ok::<(), Box<dyn std::error::Error>>(())
/// })??;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct TestTd {
    pub(super) inner: Arc<Inner>,
}

impl TestTd {
    /// Makes one.
    pub fn builder() -> TestTdBuilder {
        TestTdBuilder::default()
    }

    pub(super) fn new(
        machine: Machine,
        pool: Pool,
        shared: BTreeSet<u64>,
        host: Box<dyn Host>,
        quoting: Option<Quoting>,
        quote_delay: u64,
    ) -> Self {
        let vcpus = machine.tdvprs.iter().map(|_| Mutex::default()).collect();
        let inner = Inner {
            machine,
            host: Mutex::new(host),
            pool: Mutex::new(pool),
            shared: Mutex::new(shared),
            exits: Mutex::default(),
            quotes: Mutex::new(Quotes::new(quoting, quote_delay)),
            vcpus,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A vCPU; `None` if there is none of this number. Two values of one vCPU take turns, an instruction
    /// at a time, which no code under test expects.
    pub fn vcpu(&self, index: usize) -> Option<Vcpu> {
        (index < self.inner.vcpus.len()).then(|| Vcpu::new(Arc::clone(&self.inner), index))
    }

    /// Runs code of the guest on vCPU 0, on this thread.
    ///
    /// # Errors
    /// The vCPU stopped before the code ended: [`Stopped`] says why.
    pub fn run<R>(&self, guest: impl FnOnce(&mut Vcpu) -> R) -> Result<R, Stopped> {
        self.run_on(0, guest)
    }

    /// Runs code of the guest on every vCPU at once, each on a thread.
    ///
    /// # Errors
    /// By vCPU: it stopped before the code ended.
    pub fn run_all<R: Send>(
        &self,
        guest: impl Fn(&mut Vcpu) -> R + Sync,
    ) -> Vec<Result<R, Stopped>> {
        let guest = &guest;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.inner.vcpus.len())
                .map(|vcpu| scope.spawn(move || self.run_on(vcpu, guest)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
                Ok(result) => result,
                Err(cause) => resume_unwind(cause),
            };
            threads.into_iter().map(join).collect()
        })
    }

    fn run_on<R>(&self, index: usize, guest: impl FnOnce(&mut Vcpu) -> R) -> Result<R, Stopped> {
        let mut vcpu = Vcpu::new(Arc::clone(&self.inner), index);
        let _current = Current::enter(&vcpu);
        running::run(|| guest(&mut vcpu))
    }

    /// Replaces the host.
    pub fn set_host(&self, host: impl Host + 'static) {
        *lock(&self.inner.host) = Box::new(host);
    }

    /// The host's hands, between exits.
    pub fn hypervisor(&self) -> Hypervisor<'_> {
        Hypervisor {
            inner: &self.inner,
            vcpu: 0,
        }
    }

    /// The exits so far that reached the host, with the vCPU, in order; they are forgotten.
    pub fn take_exits(&self) -> Vec<(usize, Exit)> {
        std::mem::take(&mut lock(&self.inner.exits))
    }

    /// MRTD: the measurement of the launch.
    pub fn mrtd(&self) -> [u8; 48] {
        self.inner.measurements().0
    }

    /// The four RTMRs.
    pub fn rtmrs(&self) -> [[u8; 48]; 4] {
        self.inner.measurements().1
    }

    /// Returns whether a TDREPORT was made on this platform, as a quoting enclave finds out.
    pub fn verify_report(&self, report: &[u8; REPORT_LEN]) -> bool {
        self.inner.machine.p.verify_report(report)
    }
}

impl std::fmt::Debug for TestTd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestTd")
            .field("vcpus", &self.inner.vcpus.len())
            .field("memory", &self.inner.machine.ram)
            .finish_non_exhaustive()
    }
}
