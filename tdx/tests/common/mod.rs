//! A machine for tests: the software platform, with every call counted, any of them made to fail,
//! and every page and key accounted for.

// Each test uses a part; the module is no interface.
#![allow(dead_code, unreachable_pub)]

pub mod audit;
pub mod life;
pub mod plausible;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_core::{
    CpuId, Error, Fault, FaultInjector, FaultPlan, FieldCache, Hkid, Host, HostRange, Hpa, KeyPool,
    Level, NoPort, PackageId, Page, PagePort, Pfn, PortId, Result, Runs, SeamPort, SeamRegs,
    TableRoot, Tech, Vendor, VmId, VmParams,
};
use kvm_ops_sim::{SimHost, SimVm, SoftPages, SoftSeam};
use kvm_ops_tdx::Leaf;
use soft_tdx_module::{PageSize, PageType, Platform, PlatformBuilder};
use vm_memory::MmapRegion;

/// The machine. Clones are handles.
#[derive(Clone)]
pub struct TestHost(pub Arc<Machine>);

/// The layer between the back end and the software platform.
pub struct Machine {
    sim: SimHost,
    seam: FaultInjector<SoftSeam>,
    memory_port: FaultInjector<SoftPages>,
    plan: Arc<FaultPlan>,
    /// The number of faults that are armed, and of calls that had failed before.
    armed: Mutex<(u64, u64)>,
    /// Guest memory for slots.
    memory: MmapRegion<()>,
    pages: Mutex<Pages>,
    /// Leaf and status of every call, in order.
    log: Mutex<Vec<(Leaf, u64)>>,
    /// Set if waits yield to other threads; without other threads that is time lost.
    pub threads: AtomicBool,
}

#[derive(Default)]
struct Pages {
    /// The frames that are out.
    taken: BTreeSet<u64>,
    ever_taken: BTreeSet<u64>,
    /// The number of frames taken in all, each time counted.
    takings: u64,
}

/// The injected answer of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    Status(u64),
    /// The port does not get onto the processor.
    Port(Error),
}

/// Bytes of guest memory: slots cover guest-physical 0 up to here.
pub const MEMORY_BYTES: u64 = 1 << 30;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestHost {
    pub fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub fn with(change: impl FnOnce(PlatformBuilder) -> PlatformBuilder) -> Self {
        let builder = change(Platform::builder().seed(1).encrypt_memory(false));
        let sim = SimHost::builder(Vendor::Intel).tdx(builder).build();
        let sim = sim.expect("a machine");
        let plan = Arc::new(FaultPlan::new());
        let seam = sim.seam().expect("an Intel machine").clone();
        let pages = sim.pages().expect("an Intel machine").clone();
        Self(Arc::new(Machine {
            seam: FaultInjector::new(seam, plan.clone()),
            memory_port: FaultInjector::new(pages, plan.clone()),
            plan,
            armed: Mutex::default(),
            sim,
            memory: MmapRegion::new(MEMORY_BYTES as usize).expect("address space"),
            pages: Mutex::default(),
            log: Mutex::default(),
            threads: AtomicBool::new(false),
        }))
    }

    /// The software TDX module.
    pub fn platform(&self) -> &Platform {
        self.0.sim.tdx_platform().expect("an Intel machine")
    }

    /// Guest memory for slots.
    pub fn memory(&self) -> HostRange {
        let memory = &self.0.memory;
        // SAFETY: every VM holds its machine (the SEAMCALL port's owner) as long as it lives, and
        // with it the region; nothing refers to its contents.
        unsafe { HostRange::new(memory.as_ptr() as u64, memory.size() as u64) }.expect("a range")
    }

    /// Arms a fault: from the `nth` call of `leaf` from now on (1 is the next), `times` calls are not
    /// made and get `answer`.
    pub fn fail(&self, leaf: Leaf, nth: u64, times: u64, answer: Injected) {
        let fault = Fault::nth(nth).times(times).of(leaf as u64);
        self.arm(match answer {
            Injected::Status(status) => fault.status(status),
            Injected::Port(error) => fault.error(error),
        });
    }

    /// Arms a fault of a call of the ports ([`FaultPlan`] numbers them): the next one is not made.
    pub fn fail_call(&self, call: u64, error: Error) {
        self.arm(Fault::nth(1).of(call).error(error));
    }

    fn arm(&self, fault: Fault) {
        let mut armed = lock(&self.0.armed);
        if armed.0 == 0 {
            armed.1 = self.0.plan.happened();
        }
        armed.0 += 1;
        self.0.plan.arm(fault);
    }

    /// Returns whether a fault that is armed has happened.
    pub fn has_failed(&self) -> bool {
        self.0.plan.happened() > lock(&self.0.armed).1
    }

    /// Disarms all faults. Returns whether each of them happened.
    pub fn heal(&self) -> bool {
        let (armed, before) = std::mem::take(&mut *lock(&self.0.armed));
        self.0.plan.disarm();
        self.0.plan.happened() - before >= armed
    }

    /// The calls since the last look: leaf and status.
    pub fn take_log(&self) -> Vec<(Leaf, u64)> {
        std::mem::take(&mut *lock(&self.0.log))
    }

    /// Returns whether a leaf was called since the last look.
    pub fn called(&self, leaf: Leaf) -> bool {
        lock(&self.0.log).iter().any(|call| call.0 == leaf)
    }

    /// The calls since the last look, per leaf.
    pub fn take_counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for (leaf, _) in self.take_log() {
            *counts.entry(leaf.name()).or_default() += 1;
        }
        counts
    }

    /// Limits the number of pages that may still be taken, until [`heal`](Self::heal).
    pub fn limit_pages(&self, left: u64) {
        let fault = Fault::nth(left + 1).times(u64::MAX).of(FaultPlan::ALLOC);
        self.arm(fault.error(Error::NoMemory));
    }

    /// The 4 KiB frames that are out of the host's use.
    pub fn taken(&self) -> Vec<Pfn> {
        lock(&self.0.pages)
            .taken
            .iter()
            .map(|f| Pfn::new(*f))
            .collect()
    }

    /// The number of frames taken in all; a frame that came back and was taken again counts twice.
    pub fn takings(&self) -> u64 {
        lock(&self.0.pages).takings
    }

    /// Every frame that was ever taken.
    pub fn ever_taken(&self) -> Vec<Pfn> {
        lock(&self.0.pages)
            .ever_taken
            .iter()
            .map(|f| Pfn::new(*f))
            .collect()
    }

    pub fn key_pool(&self) -> &KeyPool {
        self.0.seam.key_ids()
    }

    /// The number of live VMs below, pages and keys.
    pub fn live(&self) -> u64 {
        self.0.sim.live_vms() as u64
            + self.taken().len() as u64
            + u64::from(self.key_pool().in_use())
    }
}

impl Host for TestHost {
    type Vm = FaultInjector<SimVm>;
    type Seam = Machine;
    type Psp = NoPort;
    type Pages = Machine;

    fn name(&self) -> &'static str {
        "test"
    }

    fn vendor(&self) -> Vendor {
        Vendor::Intel
    }

    fn next_vm_id(&self) -> VmId {
        self.0.sim.next_vm_id()
    }

    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<Self::Vm> {
        let vm = self.0.sim.create_vm(tech, params)?;
        Ok(FaultInjector::new(vm, self.0.plan.clone()))
    }

    fn runs(&self) -> Runs {
        self.0.sim.runs()
    }

    fn seam(&self) -> Option<&Machine> {
        Some(&self.0)
    }

    fn pages(&self) -> Option<&Machine> {
        Some(&self.0)
    }
}

impl SeamPort for Machine {
    unsafe fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        let leaf = Leaf::ALL.iter().copied().find(|leaf| leaf.rax() == rax);
        let leaf = leaf.expect("a leaf that the back end declares");
        // SAFETY: the caller keeps the contract, which is the same.
        let status = unsafe { self.seam.seamcall(cpu, rax, regs) }?;
        lock(&self.log).push((leaf, status));
        Ok(status)
    }

    fn package_of(&self, cpu: CpuId) -> Option<PackageId> {
        self.seam.package_of(cpu)
    }

    fn cpus(&self) -> u32 {
        self.seam.cpus()
    }

    fn packages(&self) -> u32 {
        self.seam.packages()
    }

    fn this_cpu(&self) -> CpuId {
        self.seam.this_cpu()
    }

    fn kick(&self, cpu: CpuId) {
        self.seam.kick(cpu);
    }

    fn relax(&self) {
        if self.threads.load(Ordering::Relaxed) {
            self.seam.relax();
        }
    }

    fn fields(&self) -> &FieldCache {
        self.seam.fields()
    }

    fn key_ids(&self) -> &KeyPool {
        self.seam.key_ids()
    }

    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa {
        self.seam.with_key_id(page, key)
    }
}

impl PagePort for Machine {
    fn id(&self) -> PortId {
        self.memory_port.id()
    }

    fn alloc(&self, level: Level) -> Result<Page> {
        let page = self.memory_port.alloc(level)?;
        let frames = page.pfn().get()..page.pfn().get() + level.frames();
        let mut pages = lock(&self.pages);
        pages.takings += level.frames();
        pages.taken.extend(frames.clone());
        pages.ever_taken.extend(frames);
        Ok(page)
    }

    fn free(&self, page: Page) -> Result<(), Page> {
        let mut pages = lock(&self.pages);
        for frame in page.pfn().get()..page.pfn().get() + page.level().frames() {
            let platform = self.sim.tdx_platform().expect("an Intel machine");
            let view = platform.page(frame << 12, PageSize::Size4K);
            assert_eq!(
                view.map(|view| view.page_type),
                Some(PageType::Nda),
                "frame {frame:#x} is freed while the module has it"
            );
            assert!(pages.taken.remove(&frame), "{frame:#x} is freed twice");
        }
        self.memory_port.free(page)
    }

    fn write(&self, at: Hpa, data: &[u8]) -> Result<()> {
        self.memory_port.write(at, data)
    }

    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()> {
        self.memory_port.read(at, data)
    }
}

/// The root of tables of shared memory.
pub fn root(at: u64) -> TableRoot {
    // SAFETY: the module of the software platform walks no tables of the host.
    unsafe { TableRoot::new(kvm_ops_core::Hpa::new(at), 4) }
}
