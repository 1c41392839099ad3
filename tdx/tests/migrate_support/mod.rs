//! Two TDs on one machine or two, of which one migrates into the other, and a migration TD on each
//! machine that hands the session's keys over.

// Each test file uses a part.
#![allow(dead_code, unreachable_pub)]

pub mod keys;
pub mod link;
pub mod matrix;
pub mod stream;
pub mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ops_core::{
    Backend, EncParams, Error, FreeReport, Gfn, MemSlot, Result, TdParams, VcpuId, VcpuOps, VmOps,
    VmParams,
};
use kvm_ops_tdx::migrate::{Bundle, Incoming, Outgoing};
use kvm_ops_tdx::{TdxVcpu, TdxVm};

use crate::common::TestHost;
use crate::common::life::{destroy, slot};
use keys::Keeper;
use writer::Writer;

pub type Vm = TdxVm<TestHost>;
pub type Vcpu = TdxVcpu<TestHost>;

/// ATTRIBUTES.MIGRATABLE.
const MIGRATABLE: u64 = 1 << 29;

pub fn params(vcpus: u32) -> VmParams {
    with(vcpus, |_| ())
}

/// The same, changed.
pub fn with(vcpus: u32, change: impl FnOnce(&mut TdParams)) -> VmParams {
    let mut td = TdParams {
        attributes: MIGRATABLE,
        ..TdParams::default()
    };
    change(&mut td);
    VmParams {
        enc: EncParams::Td(Box::new(td)),
        ..VmParams::new(vcpus)
    }
}

/// A machine whose memory is encrypted, or is not.
pub fn machine(encrypted: bool, seed: u64) -> TestHost {
    let host = TestHost::with(|builder| builder.seed(seed).encrypt_memory(encrypted));
    host.0.threads.store(true, Ordering::Relaxed);
    host
}

/// A migration in the making. Fields are dropped in this order.
pub struct Pair {
    pub vcpus: Vec<Vcpu>,
    pub source: Vm,
    pub target: Vm,
    pub keepers: [Keeper; 2],
    pub hosts: [TestHost; 2],
    /// The last count of the guest's program.
    pub counted: Arc<AtomicU64>,
    /// The first frame that the program uses.
    pub first: Gfn,
}

/// Pages that the guest's program writes, after the one that holds its count.
pub const PAGES: u64 = 40;

impl Pair {
    /// A source whose guest has memory, an empty target, keys exchanged.
    pub fn new(hosts: [TestHost; 2], vcpus: u32) -> Self {
        let keepers = hosts.each_ref().map(Keeper::new);
        let mut source = Vm::create(&hosts[0], kvm_ops_core::VmId(1), &params(vcpus)).unwrap();
        source.vm_init().unwrap();
        source.set_memory_slot(&memory(&hosts[0])).unwrap();
        let target = empty_target(&hosts[1], vcpus);
        let bindings = [
            source.bind_migration_td(&keepers[0].vm, 0).unwrap(),
            target.bind_migration_td(&keepers[1].vm, 0).unwrap(),
        ];
        let handles = (0..vcpus).map(|id| source.create_vcpu(VcpuId(id)).unwrap());
        let vcpus = handles.collect();
        for page in 0..=PAGES {
            let page = kvm_ops_core::InitialPage {
                gpa: kvm_ops_core::Gpa::new(page << 12),
                contents: &[0; 4096],
                kind: kvm_ops_core::InitialPageKind::Unmeasured,
            };
            source.add_initial_page(&page).unwrap();
        }
        source.vm_finalize().unwrap();
        let mut pair = Self {
            vcpus,
            source,
            target,
            keepers,
            hosts,
            counted: Arc::default(),
            first: Gfn::new(0),
        };
        pair.exchange_keys(bindings);
        pair
    }

    /// Another target in the place of one that was given up, and fresh keys.
    pub fn renew_target(&mut self) {
        let vcpus = self.vcpus.len() as u32;
        let old = std::mem::replace(&mut self.target, empty_target(&self.hosts[1], vcpus));
        clean(destroy(old));
        let bindings = [
            self.source
                .bind_migration_td(&self.keepers[0].vm, 0)
                .unwrap(),
            self.target
                .bind_migration_td(&self.keepers[1].vm, 0)
                .unwrap(),
        ];
        self.exchange_keys(bindings);
    }

    pub fn on_two(encrypted: bool) -> Self {
        Self::new([machine(encrypted, 1), machine(encrypted, 2)], 1)
    }

    fn exchange_keys(&mut self, [at_source, at_target]: [kvm_ops_tdx::migrate::Binding; 2]) {
        let [source, target] = &mut self.keepers;
        let forward = source.read_key(at_source);
        let backward = target.read_key(at_target);
        target.write_key(at_target, forward);
        source.write_key(at_source, backward);
    }

    /// Loads the guest's program, which goes on from what is in memory.
    pub fn load(&self, vcpu: &mut Vcpu) {
        load(vcpu, self.first, &self.counted);
    }

    /// Runs the source's first vCPU until its program has counted so far, or the VM says that it is
    /// stopped.
    pub fn run_source(&mut self, at_least: u64) -> Result<()> {
        let mut vcpu = self.vcpus.remove(0);
        self.load(&mut vcpu);
        let done = run_until(&mut vcpu, &self.counted, at_least);
        self.vcpus.insert(0, vcpu);
        done
    }

    /// Runs the guest at its target from where it left, and returns its first count there.
    pub fn run_target(&mut self) -> u64 {
        let mut vcpu = self.target.create_vcpu(VcpuId(0)).unwrap();
        self.counted.store(0, Ordering::SeqCst);
        self.load(&mut vcpu);
        run_until(&mut vcpu, &self.counted, 1).unwrap();
        let first = self.counted.load(Ordering::SeqCst);
        run_until(&mut vcpu, &self.counted, first + 3 * PAGES).unwrap();
        first
    }

    /// Tears everything down: nothing leaks on either side.
    pub fn destroy(self) {
        let Self {
            vcpus,
            source,
            target,
            keepers,
            hosts,
            ..
        } = self;
        drop(vcpus);
        clean(destroy(source));
        clean(destroy(target));
        keepers.into_iter().for_each(Keeper::destroy);
        for host in hosts {
            assert_eq!(host.live(), 0, "every page, key and VM is given back");
        }
    }
}

fn empty_target(host: &TestHost, vcpus: u32) -> Vm {
    let params = with(vcpus, |td| td.arrives = true);
    let mut target = Vm::create(host, kvm_ops_core::VmId(2), &params).unwrap();
    target.vm_init().unwrap();
    target.set_memory_slot(&memory(host)).unwrap();
    target
}

fn clean(report: FreeReport) {
    assert!(report.is_clean(), "{report:?}");
}

fn memory(host: &TestHost) -> MemSlot {
    slot(host)
}

/// Loads the guest's program, which goes on from what is in memory from a frame on and tells its count.
pub fn load(vcpu: &mut Vcpu, first: Gfn, counted: &Arc<AtomicU64>) {
    let writer = Writer::new(first, PAGES, Arc::clone(counted));
    let programs = vcpu.programs().expect("the software machine runs programs");
    programs.load_program(Box::new(writer)).unwrap();
}

/// Runs a vCPU until its program has counted so far.
pub fn run_until(vcpu: &mut Vcpu, counted: &Arc<AtomicU64>, at_least: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while counted.load(Ordering::SeqCst) < at_least {
        assert!(Instant::now() < end, "the guest makes no progress");
        let exit = vcpu.vcpu_run()?;
        assert!(
            matches!(
                exit,
                kvm_ops_core::Exit::IoOut {
                    port: writer::TICK,
                    ..
                }
            ),
            "{exit:?}, last count {counted:?}"
        );
    }
    Ok(())
}

/// Pages of a TD, by the mirror.
pub fn private_pages(vm: &Vm) -> Vec<Gfn> {
    let mut pages = Vec::new();
    vm.for_each_private(|gfn, _, entry| {
        if let kvm_ops_core::PrivateSpte::Mapped(_) = entry {
            pages.push(gfn);
        }
    });
    pages
}

/// Carries a bundle to the target, through its bytes.
pub fn carry(to: &mut Incoming<'_, TestHost>, bundle: Bundle) -> Result<(), Error> {
    let mut bytes = Vec::new();
    bundle.encode(&mut bytes);
    assert_eq!(bytes.len(), bundle.len());
    assert!(bytes.len() <= Bundle::MAX_BYTES);
    let came = Bundle::decode(&bytes).expect("what was encoded");
    assert_eq!(came, bundle);
    to.take(&came)
}

/// Carries the pages of one round.
pub fn round(
    from: &mut Outgoing<'_, TestHost>,
    to: &mut Incoming<'_, TestHost>,
) -> Result<u64, Error> {
    let mut pages = 0;
    let streams = from.streams();
    for stream in (0..streams).cycle() {
        let Some(bundle) = from.pages(stream)? else {
            break;
        };
        pages += bundle.guest_pages() as u64;
        carry(to, bundle)?;
    }
    carry(to, from.end_round()?)?;
    Ok(pages)
}

/// Stops the source and carries everything that is left, up to the start token.
pub fn finish(
    from: &mut Outgoing<'_, TestHost>,
    to: &mut Incoming<'_, TestHost>,
) -> Result<(), Error> {
    from.stop()?;
    while from.pages_left() > 0 {
        round(from, to)?;
    }
    carry(to, from.td_state()?)?;
    let last = from.streams() - 1;
    for vcpu in from.vcpus() {
        carry(to, from.vcpu_state(vcpu, last)?)?;
    }
    carry(to, from.start_token()?)
}
