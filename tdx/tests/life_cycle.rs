//! A life in order, what each step costs in SEAMCALLs, and what is refused.

mod common;

use common::TestHost;
use common::audit::{all_accounted, mirror_equals_secure_ept};
use common::life::{create, destroy, initial_page, initialized, runnable};
use kvm_ops_core::kit::{self, Subject};
use kvm_ops_core::{
    Backend, Error, Field, Gfn, Gpa, HostRange, InitialPageKind, Privacy, Result, Step, VcpuId,
    VcpuOps, VmOps,
};
use kvm_ops_tdx::TdxVm;

/// Calls per leaf as text, without TDH.SYS.RD.
fn calls(host: &TestHost) -> Vec<(&'static str, u64)> {
    let counts = host.take_counts();
    counts
        .into_iter()
        .filter(|(leaf, _)| *leaf != "TDH.SYS.RD")
        .collect()
}

/// Packages, TDCS pages and TDCX pages of a vCPU of the test machine.
const P: u64 = 2;
const N: u64 = 6;
const M: u64 = 5;

#[test]
fn each_step_costs_no_more_seamcalls_than_linux() {
    let host = TestHost::new();
    let mut vm = create(&host);
    assert_eq!(calls(&host), [], "creation alone asks the module nothing");

    vm.vm_init().unwrap();
    let counts = host.take_counts();
    assert_eq!(
        counts["TDH.SYS.RD"], 8,
        "the module's limits, read for the machine's first TD as Linux reads them at boot"
    );
    let without_rd = counts.values().sum::<u64>() - 8;
    assert_eq!(without_rd, P + N + 2);
    vm.set_memory_slot(&common::life::slot(&host)).unwrap();

    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let used: u64 = calls(&host).iter().map(|c| c.1).sum();
    assert_eq!(used, M + 2);
    assert!(used <= M + 5, "Linux");

    vm.add_initial_page(&initial_page(0x1000, InitialPageKind::Measured))
        .unwrap();
    assert_eq!(
        calls(&host),
        [
            ("TDH.MEM.PAGE.ADD", 1),
            ("TDH.MEM.SEPT.ADD", 3),
            ("TDH.MR.EXTEND", 16)
        ]
    );
    vm.add_initial_page(&initial_page(0x2000, InitialPageKind::Unmeasured))
        .unwrap();
    assert_eq!(calls(&host), [("TDH.MEM.PAGE.ADD", 1)]);
    vm.measure_initial_page(Gpa::new(0x2000)).unwrap();
    assert_eq!(calls(&host), [("TDH.MR.EXTEND", 16)]);
    let absent = Error::NotFound(Field::Gpa, 0x3000);
    assert_eq!(vm.measure_initial_page(Gpa::new(0x3000)), Err(absent));
    assert_eq!(calls(&host), [], "what is not there is not measured");

    vm.vm_finalize().unwrap();
    assert_eq!(calls(&host), [("TDH.MR.FINALIZE", 1)]);

    // Faults: one call, the missing tables, nothing when it is there.
    assert_eq!(vm.pre_fault_memory(Gfn::new(3), 1), Ok(1));
    assert_eq!(calls(&host), [("TDH.MEM.PAGE.AUG", 1)]);
    assert_eq!(vm.pre_fault_memory(Gfn::new(1), 3), Ok(3));
    assert_eq!(calls(&host), [], "spurious faults are free");
    assert_eq!(vm.pre_fault_memory(Gfn::new(0x200), 2), Ok(2));
    assert_eq!(
        calls(&host),
        [("TDH.MEM.PAGE.AUG", 2), ("TDH.MEM.SEPT.ADD", 1)]
    );

    // Removal of n pages: 3n + 1 calls, where Linux takes 4n.
    for n in [1u64, 7, 100] {
        assert_eq!(vm.pre_fault_memory(Gfn::new(0x400), n), Ok(n));
        host.take_log();
        let done = vm.set_memory_attributes(Gfn::new(0x400), 0x200, Privacy::Shared);
        assert_eq!(done, Ok(0x200));
        assert_eq!(
            calls(&host),
            [
                ("TDH.MEM.PAGE.REMOVE", n),
                ("TDH.MEM.RANGE.BLOCK", n),
                ("TDH.MEM.TRACK", 1),
                ("TDH.PHYMEM.PAGE.WBINVD", n)
            ]
        );
        assert!(3 * n < 4 * n, "Linux");
        vm.set_memory_attributes(Gfn::new(0x400), 0x200, Privacy::Private)
            .unwrap();
        assert_eq!(calls(&host), [], "attributes are the host's");
        mirror_equals_secure_ept(&host, &vm);
    }
    vm.set_memory_attributes(Gfn::new(0x800), 0x200, Privacy::Shared)
        .unwrap();
    assert_eq!(calls(&host), [], "what is not there costs nothing");

    // The end: one reclaim for each page that the TD has.
    let held = host.taken().len() as u64;
    let stats = vm.private_stats();
    let control = 1 + N + M + 1;
    assert_eq!(held, stats.pages_4k + stats.tables + control);
    let report = destroy(vm);
    assert_eq!(
        calls(&host),
        [
            ("TDH.MNG.KEY.FREEID", 1),
            ("TDH.MNG.VPFLUSHDONE", 1),
            ("TDH.PHYMEM.CACHE.WB", P),
            ("TDH.PHYMEM.PAGE.RECLAIM", held),
            ("TDH.PHYMEM.PAGE.WBINVD", 1),
            ("TDH.VP.FLUSH", 1),
        ]
    );
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.keys_freed, 1);
    all_accounted(&host, &report);
    drop(vcpu);
}

#[test]
fn from_the_second_td_of_a_machine_on_creation_costs_less_than_in_linux() {
    let host = TestHost::new();
    for first in [true, false, false] {
        let mut vm = create(&host);
        vm.vm_init().unwrap();
        let used: u64 = host.take_counts().values().sum();
        assert_eq!(used, P + N + 2 + if first { 8 } else { 0 });
        assert!(first || used <= P + N + 4, "Linux");
        assert!(destroy(vm).is_clean());
        host.take_counts();
    }
}

#[test]
fn the_teardown_reclaims_guest_pages_then_tables_then_vcpus_and_the_tdr_last() {
    use soft_tdx_module::PageType as T;
    // The trace shows which page each reclaim was about.
    let host = TestHost::with(|builder| builder.trace(1 << 12));
    let vm = runnable(&host);
    vm.pre_fault_memory(Gfn::new(0), 3).unwrap();
    let kinds: std::collections::BTreeMap<u64, T> = host
        .taken()
        .iter()
        .map(|page| {
            let pa = page.get() << 12;
            let view = host.platform().page(pa, soft_tdx_module::PageSize::Size4K);
            (pa, view.unwrap().page_type)
        })
        .collect();
    assert!(destroy(vm).is_clean());
    let reclaimed: Vec<T> = host
        .platform()
        .trace()
        .into_iter()
        .filter_map(|entry| match entry.event {
            soft_tdx_module::TraceEvent::Seamcall { input, .. } if input.rax == 28 => {
                Some(kinds[&input.rcx])
            }
            _ => None,
        })
        .collect();
    let mut order = reclaimed.clone();
    order.dedup();
    assert_eq!(
        order,
        [T::Reg, T::Ept, T::Tdcx, T::Tdvpr, T::Tdcx, T::Tdr],
        "{reclaimed:?}"
    );
}

#[test]
fn a_life_can_end_at_every_step_and_gives_everything_back() {
    for (n, make) in [create, initialized, runnable].into_iter().enumerate() {
        let host = TestHost::new();
        let vm = make(&host);
        let step = [Step::Created, Step::Initialized, Step::Runnable][n];
        assert_eq!(vm.step(), step);
        let report = destroy(vm);
        assert!(report.is_clean(), "{step}: {report:?}");
        assert_eq!(report.keys_freed, u32::from(n > 0), "{step}");
        all_accounted(&host, &report);
    }
}

struct Tds(TestHost);

impl Subject for Tds {
    type Vm = TdxVm<TestHost>;

    fn create(&mut self) -> Result<Self::Vm> {
        use kvm_ops_core::Host;
        TdxVm::create(&self.0, self.0.next_vm_id(), &common::life::params())
    }

    fn memory(&mut self) -> Option<HostRange> {
        Some(self.0.memory())
    }

    fn live(&mut self) -> Option<u64> {
        Some(self.0.live())
    }
}

#[test]
fn the_kit_passes() {
    let report = kit::run(&mut Tds(TestHost::new()));
    assert!(report.passed(), "{report}");
    let skipped = report.to_string().matches("skipped  ").count();
    assert_eq!(skipped, 0, "{report}");
}

#[test]
fn a_vcpu_outlives_its_td_and_answers() {
    let host = TestHost::new();
    let mut vm = initialized(&host);
    let mut vcpu = vm.create_vcpu(VcpuId(2)).unwrap();
    vm.vm_finalize().unwrap();
    vcpu.inject_nmi().unwrap();
    let kick = vcpu.kick_handle();
    assert!(destroy(vm).is_clean());
    kick.kick();
    assert!(vcpu.inject_nmi().is_err());
    assert!(vcpu.load_mmu_pgd(common::root(0x1000)).is_err());
    assert_eq!(host.live(), 0);
    vcpu.vcpu_free().unwrap();
}
