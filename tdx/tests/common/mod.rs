//! A machine for tests: the software TDX module below the ports, every call counted, any of them
//! made to fail, every page and key accounted for.

// Each test uses a part; the module is no interface.
#![allow(dead_code, unreachable_pub)]

pub mod audit;
pub mod life;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_core::kit::NullVcpu;
use kvm_ops_core::{
    CpuId, Error, Gpa, Hkid, Host, Hpa, KeyPool, Level, MemSlot, NoPort, PackageId, PagePort, Pfn,
    Result, SeamPort, SeamRegs, Tech, VcpuId, Vendor, VmId, VmIds, VmParams, VmPort,
};
use kvm_ops_tdx::Leaf;
use soft_tdx_module::{LpError, PageSize, PageType, Platform, PlatformBuilder, Regs};

extern crate kvm_ops_core as kvm_ops;

/// Where the TDMR of the default machine begins, in frames, and where large pages are taken from.
const FIRST_FRAME: u64 = 0x4000_0000 >> 12;
const FIRST_LARGE_FRAME: u64 = 0x6000_0000 >> 12;

/// The machine. Clones are handles.
#[derive(Clone)]
pub struct TestHost(pub Arc<Machine>);

pub struct Machine {
    pub platform: Platform,
    ids: VmIds,
    keys: KeyPool,
    frames: Mutex<Frames>,
    faults: Mutex<Vec<Fault>>,
    /// Leaf and status of every call, in order.
    log: Mutex<Vec<(Leaf, u64)>>,
    pub live_ports: AtomicU64,
    /// Whether waits give way to other threads; without any, that is time lost.
    pub threads: AtomicBool,
    offline: Mutex<Vec<CpuId>>,
    next_cpu: AtomicU32,
}

#[derive(Default)]
struct Frames {
    next: u64,
    next_large: u64,
    free: Vec<u64>,
    taken: BTreeMap<u64, Level>,
    /// So many more pages may be taken.
    left: Option<u64>,
}

/// What a call is made to answer instead of what the module would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Status(u64),
    /// The port does not get onto the processor.
    Port(Error),
}

/// From the `nth` call of `leaf` from now on (1 is the next), `times` calls are not made.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub leaf: Leaf,
    pub nth: u64,
    pub times: u64,
    pub answer: Answer,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestHost {
    pub fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub fn with(change: impl FnOnce(PlatformBuilder) -> PlatformBuilder) -> Self {
        let platform = change(Platform::builder().seed(1).encrypt_memory(false))
            .build()
            .expect("a machine");
        platform.bring_up().expect("bring-up");
        let (_, last) = platform.config().private_hkids;
        let first = platform.config().global_hkid + 1;
        Self(Arc::new(Machine {
            ids: VmIds::new(),
            keys: KeyPool::new(first.into()..u32::from(last) + 1),
            frames: Mutex::default(),
            faults: Mutex::default(),
            log: Mutex::default(),
            live_ports: AtomicU64::new(0),
            threads: AtomicBool::new(false),
            offline: Mutex::default(),
            next_cpu: AtomicU32::new(0),
            platform,
        }))
    }

    /// Arms a fault.
    pub fn fail(&self, leaf: Leaf, nth: u64, times: u64, answer: Answer) {
        lock(&self.0.faults).push(Fault {
            leaf,
            nth,
            times,
            answer,
        });
    }

    /// Disarms all faults. Answers whether any was still waiting to happen.
    pub fn heal(&self) -> bool {
        lock(&self.0.faults).drain(..).any(|fault| fault.nth > 0)
    }

    /// The calls since the last look: leaf and status.
    pub fn take_log(&self) -> Vec<(Leaf, u64)> {
        std::mem::take(&mut *lock(&self.0.log))
    }

    /// The calls since the last look, per leaf.
    pub fn take_counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for (leaf, _) in self.take_log() {
            *counts.entry(leaf.name()).or_default() += 1;
        }
        counts
    }

    /// How many more pages the machine has.
    pub fn limit_pages(&self, left: Option<u64>) {
        lock(&self.0.frames).left = left;
    }

    /// The 4 KiB frames that are out of the host's use.
    pub fn taken(&self) -> Vec<Pfn> {
        let frames = lock(&self.0.frames);
        let each = frames
            .taken
            .iter()
            .flat_map(|(first, level)| (0..level.frames()).map(move |n| Pfn::new(first + n)));
        each.collect()
    }

    /// Every frame that was ever taken.
    pub fn ever_taken(&self) -> impl Iterator<Item = Pfn> {
        let frames = lock(&self.0.frames);
        let small = FIRST_FRAME..FIRST_FRAME + frames.next;
        let large = FIRST_LARGE_FRAME..FIRST_LARGE_FRAME + frames.next_large;
        small.chain(large).map(Pfn::new)
    }

    pub fn key_pool(&self) -> &KeyPool {
        &self.0.keys
    }

    pub fn set_offline(&self, cpu: u32, offline: bool) {
        let mut list = lock(&self.0.offline);
        list.retain(|c| c.0 != cpu);
        if offline {
            list.push(CpuId(cpu));
        }
        self.0.platform.set_offline(cpu as usize, offline);
    }

    /// What lives: ports, pages, keys.
    pub fn live(&self) -> u64 {
        self.0.live_ports.load(Ordering::SeqCst)
            + self.taken().len() as u64
            + u64::from(self.0.keys.in_use())
    }
}

impl Host for TestHost {
    type Vm = TestVm;
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
        self.0.ids.next()
    }

    fn create_vm(&self, _: Tech, _: &VmParams) -> Result<TestVm> {
        self.0.live_ports.fetch_add(1, Ordering::SeqCst);
        Ok(TestVm(Arc::clone(&self.0)))
    }

    fn seam(&self) -> Option<&Machine> {
        Some(&self.0)
    }

    fn pages(&self) -> Option<&Machine> {
        Some(&self.0)
    }
}

/// A VM below that holds no memory.
pub struct TestVm(Arc<Machine>);

impl VmPort for TestVm {
    type Vcpu = NullVcpu;

    fn create_vcpu(&self, _: VcpuId) -> Result<NullVcpu> {
        kvm_ops::unsupported!("create_vcpu")
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        Ok(())
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        Ok(())
    }

    fn dirty_log(&self, _: &MemSlot, _: &mut [u64]) -> Result<()> {
        kvm_ops::unsupported!("dirty_log")
    }

    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, _: u32) -> bool {
        false
    }

    fn deliver_interrupt(&self, _: VcpuId, _: u8) -> Result<()> {
        Ok(())
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        self.0.live_ports.fetch_sub(1, Ordering::SeqCst);
    }
}

thread_local! {
    static CPU: Cell<Option<u32>> = const { Cell::new(None) };
}

impl Machine {
    /// The fault that this call meets, if any.
    fn fault(&self, leaf: Leaf) -> Option<Answer> {
        let mut faults = lock(&self.faults);
        let mut met = None;
        for fault in faults.iter_mut().filter(|fault| fault.leaf == leaf) {
            if fault.nth > 0 {
                fault.nth -= 1;
            }
            if fault.nth == 0 && fault.times > 0 && met.is_none() {
                fault.times -= 1;
                met = Some(fault.answer);
            }
        }
        met
    }
}

impl SeamPort for Machine {
    fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        let leaf = Leaf::ALL.iter().copied().find(|leaf| leaf.rax() == rax);
        let leaf = leaf.expect("a leaf that the back end declares");
        match self.fault(leaf) {
            Some(Answer::Status(status)) => {
                lock(&self.log).push((leaf, status));
                return Ok(status);
            }
            Some(Answer::Port(error)) => return Err(error),
            None => {}
        }
        let mut all = Regs {
            rax,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rbx: regs.rbx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            ..Regs::default()
        };
        loop {
            match self.platform.seamcall(cpu.0 as usize, &mut all) {
                Ok(status) => {
                    lock(&self.log).push((leaf, status.0));
                    *regs = SeamRegs {
                        rcx: all.rcx,
                        rdx: all.rdx,
                        rbx: all.rbx,
                        rsi: all.rsi,
                        rdi: all.rdi,
                        r8: all.r8,
                        r9: all.r9,
                        r10: all.r10,
                        r11: all.r11,
                        r12: all.r12,
                        r13: all.r13,
                        r14: all.r14,
                        r15: all.r15,
                    };
                    return Ok(status.0);
                }
                Err(LpError::Busy { .. }) => std::thread::yield_now(),
                Err(_) => return Err(Error::Invalid(kvm_ops::Field::Cpu, cpu.0.into())),
            }
        }
    }

    fn package_of(&self, cpu: CpuId) -> Option<PackageId> {
        let package = self.platform.config().lp_package.get(cpu.0 as usize)?;
        let online = !lock(&self.offline).contains(&cpu);
        online.then_some(PackageId(*package as u32))
    }

    fn cpus(&self) -> u32 {
        self.platform.config().lp_package.len() as u32
    }

    fn packages(&self) -> u32 {
        self.platform.config().packages as u32
    }

    fn this_cpu(&self) -> CpuId {
        let cpu = CPU.get().unwrap_or_else(|| {
            let cpu = self.next_cpu.fetch_add(1, Ordering::SeqCst);
            CPU.set(Some(cpu));
            cpu
        });
        (0..self.cpus())
            .map(|n| CpuId((cpu + n) % self.cpus()))
            .find(|cpu| self.package_of(*cpu).is_some())
            .expect("an online processor")
    }

    fn kick(&self, cpu: CpuId) {
        self.platform.kick(cpu.0 as usize);
    }

    fn relax(&self) {
        if self.threads.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }

    fn key_ids(&self) -> &KeyPool {
        &self.keys
    }

    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa {
        let config = self.platform.config();
        let key = key.map_or(config.global_hkid, |key| key.0);
        Hpa::new(page.get() | u64::from(key) << (52 - config.keyid_bits))
    }
}

impl PagePort for Machine {
    fn alloc(&self, level: Level) -> Result<Pfn> {
        let mut frames = lock(&self.frames);
        match &mut frames.left {
            Some(0) => return Err(Error::NoMemory),
            Some(left) => *left -= 1,
            None => {}
        }
        let first = match level {
            Level::Size4K => frames.free.pop().unwrap_or_else(|| {
                frames.next += 1;
                FIRST_FRAME + frames.next - 1
            }),
            Level::Size2M => {
                frames.next_large += level.frames();
                FIRST_LARGE_FRAME + frames.next_large - level.frames()
            }
            _ => return Err(Error::Invalid(kvm_ops::Field::Level, level as u64)),
        };
        frames.taken.insert(first, level);
        Ok(Pfn::new(first))
    }

    fn free(&self, page: Pfn, level: Level) {
        for frame in page.get()..page.get() + level.frames() {
            let view = self.platform.page(frame << 12, PageSize::Size4K);
            assert_eq!(
                view.map(|view| view.page_type),
                Some(PageType::Nda),
                "frame {frame:#x} is freed while the module has it"
            );
        }
        let mut frames = lock(&self.frames);
        let was = frames.taken.remove(&page.get());
        assert_eq!(was, Some(level), "{page:?} is freed as it was taken");
        if level == Level::Size4K {
            frames.free.push(page.get());
        }
    }

    fn write(&self, at: Hpa, data: &[u8]) -> Result<()> {
        let refused = |_| Error::Invalid(kvm_ops::Field::HostAddress, at.get());
        self.platform.write_memory(at.get(), data).map_err(refused)
    }

    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()> {
        let refused = |_| Error::Invalid(kvm_ops::Field::HostAddress, at.get());
        self.platform.read_memory(at.get(), data).map_err(refused)
    }
}
