//! Refusals, by name and without a call.

mod common;

use common::audit::{all_accounted, mirror_equals_secure_ept};
use common::life::{create, destroy, initial_page, initialized, runnable, slot};
use common::{Injected, TestHost};
use kvm_ops_core::{
    Backend, CpuidEntry, EncParams, Error, Field, Gfn, Gpa, Gpaw, GuestDebug, Host,
    InitialPageKind, Irqchip, Level, MemSlot, MpState, Pfn, Privacy, PrivateSpte, SlotId,
    SpteChange, Step, TdParams, VcpuId, VcpuOps, VmOps, VmParams,
};
use kvm_ops_tdx::status::Class;
use kvm_ops_tdx::{Leaf, TdxVm};

fn with_td(host: &TestHost, td: TdParams) -> TdxVm<TestHost> {
    let params = VmParams {
        enc: EncParams::Td(Box::new(td)),
        ..VmParams::new(4)
    };
    TdxVm::create(host, host.next_vm_id(), &params).expect("create")
}

#[test]
fn addresses_that_a_td_cannot_have_privately_are_refused_without_a_call() {
    for gpaw in [Gpaw::Bits48, Gpaw::Bits52] {
        let host = TestHost::new();
        let mut vm = with_td(
            &host,
            TdParams {
                gpaw,
                ..TdParams::default()
            },
        );
        vm.vm_init().unwrap();
        let shared = vm.shared_mask().bits();
        assert_eq!(
            shared,
            if gpaw == Gpaw::Bits48 {
                1 << 47
            } else {
                1 << 51
            }
        );
        vm.set_memory_slot(&slot(&host)).unwrap();
        vm.create_vcpu(VcpuId(0)).unwrap();
        host.take_log();
        for gpa in [
            1,
            0xfff,
            0x1008,
            shared,
            shared | 0x1000,
            shared << 1,
            u64::MAX,
        ] {
            let page = initial_page(gpa, InitialPageKind::Measured);
            let error = Error::Invalid(Field::Gpa, gpa);
            assert_eq!(vm.add_initial_page(&page), Err(error), "{gpa:#x}");
        }
        // Beyond every slot.
        let page = initial_page(1 << 40, InitialPageKind::Measured);
        let error = Error::NotFound(Field::Gpa, 1 << 40);
        assert_eq!(vm.add_initial_page(&page), Err(error));
        for kind in [
            InitialPageKind::Zero,
            InitialPageKind::Secrets,
            InitialPageKind::Cpuid,
        ] {
            assert!(vm.add_initial_page(&initial_page(0, kind)).is_err());
        }
        let last = Gfn::new((shared >> 12) - 1);
        for (first, pages, field) in [
            (0, 0, Error::Invalid(Field::Size, 0)),
            (last.get(), 2, Error::Invalid(Field::Gfn, last.get())),
            (shared >> 12, 1, Error::Invalid(Field::Gfn, shared >> 12)),
            (1, u64::MAX, Error::Invalid(Field::Gfn, 1)),
            (u64::MAX, 1, Error::Invalid(Field::Gfn, u64::MAX)),
        ] {
            let done = vm.set_memory_attributes(Gfn::new(first), pages, Privacy::Shared);
            assert_eq!(done, Err(field));
        }
        let slot_at = |gpa| MemSlot::new(SlotId(1), Gpa::new(gpa), host.memory());
        for gpa in [shared, shared - 0x1000, u64::MAX << 30] {
            let refused = vm.set_memory_slot(&slot_at(gpa));
            assert!(matches!(refused, Err(Error::Invalid(..))), "{gpa:#x}");
        }
        assert_eq!(host.take_log(), []);
        assert_eq!(vm.step(), Step::Initialized);
        assert!(destroy(vm).is_clean());
    }
}

#[test]
fn a_page_is_added_once_and_only_while_the_td_is_initialised() {
    let host = TestHost::new();
    let mut vm = create(&host);
    let page = initial_page(0x5000, InitialPageKind::Unmeasured);
    assert_eq!(
        vm.add_initial_page(&page),
        Err(Error::WrongState(Step::Created))
    );
    vm.vm_init().unwrap();
    vm.set_memory_slot(&slot(&host)).unwrap();
    vm.create_vcpu(VcpuId(0)).unwrap();
    vm.add_initial_page(&page).unwrap();
    assert_eq!(
        vm.add_initial_page(&page),
        Err(Error::Exists(Field::Gpa, 0x5000))
    );
    // Shared memory has no private page.
    vm.set_memory_attributes(Gfn::new(6), 1, Privacy::Shared)
        .unwrap();
    assert_eq!(
        vm.add_initial_page(&initial_page(0x6000, InitialPageKind::Measured)),
        Err(Error::NotFound(Field::Gpa, 0x6000))
    );
    assert_eq!(
        vm.pre_fault_memory(Gfn::new(5), 1),
        Err(Error::WrongState(Step::Initialized))
    );
    vm.vm_finalize().unwrap();
    assert_eq!(
        vm.add_initial_page(&page),
        Err(Error::WrongState(Step::Runnable))
    );
    assert_eq!(
        vm.create_vcpu(VcpuId(1)).err(),
        Some(Error::WrongState(Step::Runnable))
    );
    mirror_equals_secure_ept(&host, &vm);
    assert!(destroy(vm).is_clean());
}

#[test]
fn a_td_without_a_vcpu_is_not_finalised() {
    let host = TestHost::new();
    let mut vm = initialized(&host);
    host.take_log();
    assert_eq!(vm.vm_finalize(), Err(Error::Invalid(Field::VcpuCount, 0)));
    assert_eq!(host.take_log(), []);
    assert!(destroy(vm).is_clean());
}

#[test]
fn parameters_that_the_module_does_not_allow_are_named_and_the_vm_can_go_on() {
    let ok = TdParams::default();
    let cases = [
        (
            TdParams {
                attributes: 1 << 5,
                ..ok.clone()
            },
            Error::Invalid(Field::TdAttributes, 1 << 5),
        ),
        (
            TdParams {
                xfam: 1 << 40 | 3,
                ..ok.clone()
            },
            Error::Invalid(Field::Xfam, 1 << 40),
        ),
        (
            TdParams {
                tsc_khz: 1_000_001,
                ..ok.clone()
            },
            Error::Invalid(Field::TscKhz, 1_000_001),
        ),
        (
            TdParams {
                cpuid: vec![CpuidEntry {
                    leaf: 0x77,
                    ..CpuidEntry::default()
                }],
                ..ok.clone()
            },
            Error::Invalid(Field::CpuidLeaf, 0x77),
        ),
    ];
    for (td, error) in cases {
        let host = TestHost::new();
        let mut vm = with_td(&host, td);
        assert_eq!(vm.vm_init(), Err(error));
        assert_eq!((vm.step(), vm.tdr()), (Step::Created, None));
        let report = destroy(vm);
        assert!(report.is_clean());
        all_accounted(&host, &report);
    }
}

#[test]
fn the_module_has_the_parameters_that_the_td_was_created_with() {
    use soft_tdx_module::{HostLeaf, Regs};
    let host = TestHost::new();
    let mut vm = with_td(
        &host,
        TdParams {
            attributes: 1 << 28 | 1,
            xfam: 0b111,
            gpaw: Gpaw::Bits52,
            tsc_khz: 2_500_000,
            ..TdParams::default()
        },
    );
    vm.vm_init().unwrap();
    let tdr = vm.tdr().unwrap().get();
    let read = |field| {
        let operands = Regs {
            rcx: tdr,
            rdx: field,
            ..Regs::default()
        };
        let out = host.platform().call(0, HostLeaf::MngRd, operands);
        out.expect("a field of the TD").r8
    };
    assert_eq!(read(0x1110_0003_0000_0000), 1 << 28 | 1, "ATTRIBUTES");
    assert_eq!(read(0x1110_0003_0000_0001), 0b111, "XFAM");
    assert_eq!(read(0x1110_0002_0000_0002), 4, "MAX_VCPUS");
    assert_eq!(read(0x1110_0000_0000_0003), 1, "GPAW");
    assert_eq!(read(0x1110_0001_0000_000c), 100, "TSC_FREQUENCY");
    assert!(destroy(vm).is_clean());
}

#[test]
fn every_cpuid_row_that_the_module_publishes_is_taken_by_it() {
    let host = TestHost::new();
    let config = host.platform().config();
    let cpuid = config
        .cpuid_configs
        .iter()
        // Leaf 1 takes the processor's own family only, and 1F a consistent topology.
        .filter(|row| row.leaf != 1 && row.leaf != 0x1f)
        .map(|row| CpuidEntry {
            leaf: row.leaf,
            subleaf: if row.subleaf == u32::MAX {
                0
            } else {
                row.subleaf
            },
            subleaf_significant: row.subleaf != u32::MAX,
            regs: config.reported_cpuid(row.leaf, row.subleaf),
        })
        .collect();
    let mut vm = with_td(
        &host,
        TdParams {
            cpuid,
            ..TdParams::default()
        },
    );
    vm.vm_init().unwrap();
    assert!(destroy(vm).is_clean());
}

#[test]
fn creation_is_refused_with_the_reason() {
    let host = TestHost::new();
    let id = host.next_vm_id();
    let refused = |params: &VmParams| TdxVm::create(&host, id, params).err().unwrap();
    assert_eq!(
        refused(&VmParams::new(0)),
        Error::Invalid(Field::VcpuCount, 0)
    );
    let sev = VmParams {
        enc: EncParams::Sev(Box::default()),
        ..VmParams::new(1)
    };
    assert_eq!(refused(&sev).errno(), 95);
    let full = VmParams {
        irqchip: Irqchip::Full,
        ..VmParams::new(1)
    };
    assert_eq!(refused(&full).errno(), 95);
    let none = kvm_ops_sim::SimHost::new(kvm_ops_core::Vendor::Amd);
    assert!(TdxVm::create(&none, id, &VmParams::new(1)).is_err());

    // More vCPUs than the module allows a TD: known once the module is asked.
    let mut vm = TdxVm::create(&host, id, &VmParams::new(577)).unwrap();
    assert_eq!(vm.vm_init(), Err(Error::Invalid(Field::VcpuCount, 577)));
    assert!(destroy(vm).is_clean());
}

fn change(gfn: u64, level: Level, old: PrivateSpte, new: PrivateSpte) -> SpteChange {
    // SAFETY: every change made here is refused, so no page is used.
    unsafe { SpteChange::new(Gfn::new(gfn), level, old, new) }
}

#[test]
fn changes_that_are_none_and_pages_that_do_not_exist_are_refused_without_a_call() {
    let host = TestHost::new();
    let vm = runnable(&host);
    host.take_log();
    let (a, b) = (Pfn::new(0x40_000), Pfn::new(0x40_001));
    let none = [
        (PrivateSpte::Absent, PrivateSpte::Absent),
        (PrivateSpte::Absent, PrivateSpte::Blocked(a)),
        (PrivateSpte::Mapped(a), PrivateSpte::Mapped(b)),
        (PrivateSpte::Mapped(a), PrivateSpte::Blocked(b)),
        (PrivateSpte::Mapped(a), PrivateSpte::Absent),
        (PrivateSpte::Table(a), PrivateSpte::Absent),
        (PrivateSpte::Table(a), PrivateSpte::BlockedTable(b)),
    ];
    for (old, new) in none {
        let change = change(0, Level::Size4K, old, new);
        assert!(matches!(
            vm.set_private_spte(&change),
            Err(Error::Invalid(..))
        ));
    }
    for (gfn, level) in [
        (1, Level::Size2M),
        (1 << 35, Level::Size4K),
        (u64::MAX, Level::Size4K),
    ] {
        let change = change(gfn, level, PrivateSpte::Absent, PrivateSpte::Mapped(a));
        assert_eq!(
            vm.set_private_spte(&change),
            Err(Error::Invalid(Field::Gfn, gfn))
        );
    }
    assert_eq!(host.take_log(), []);
    assert_eq!(vm.step(), Step::Runnable);
    assert!(destroy(vm).is_clean());
}

#[test]
fn a_poisoned_td_does_nothing_but_end() {
    let host = TestHost::new();
    let mut vm = runnable(&host);
    let status = Class::TD_FATAL.with(0).get();
    host.fail(Leaf::MemTrack, 1, 1, Injected::Status(status));
    assert_eq!(vm.flush_private_tlb(), Err(Error::Firmware(status)));
    assert_eq!(vm.step(), Step::Poisoned);
    host.take_log();
    assert_eq!(vm.pre_fault_memory(Gfn::new(0), 1), Err(Error::Poisoned));
    let converted = vm.set_memory_attributes(Gfn::new(0), 1, Privacy::Shared);
    assert_eq!(converted, Err(Error::Poisoned));
    assert_eq!(vm.set_memory_slot(&slot(&host)), Err(Error::Poisoned));
    assert_eq!(vm.flush_private_tlb(), Err(Error::Poisoned));
    assert_eq!(vm.vm_finalize(), Err(Error::Poisoned));
    assert_eq!(vm.create_vcpu(VcpuId(1)).err(), Some(Error::Poisoned));
    assert_eq!(host.take_log(), []);
    assert!(destroy(vm).is_clean());
}

#[test]
fn a_foreign_token_leaks_the_td_whole_and_says_so() {
    let host = TestHost::new();
    let (mut a, mut b) = (runnable(&host), runnable(&host));
    let key = b.mmu_release_hkid().unwrap();
    let of_b = b.drain_private(key).unwrap();
    let key = a.mmu_release_hkid().unwrap();
    let of_a = a.drain_private(key).unwrap();
    let id = b.id();
    let report = a.vm_free(of_b);
    assert!(!report.is_clean());
    assert!(
        report
            .leaks
            .iter()
            .all(|leak| leak.error == Error::Invalid(Field::Token, id.0))
    );
    let leaked = report.leaks.len();
    let report = b.vm_free(of_a);
    assert_eq!(host.taken().len(), leaked + report.leaks.len());
}

/// A slot is known by its memory, not by its number alone: two VMs may use one number.
#[test]
fn a_slot_is_deleted_and_changed_only_by_its_own_address_and_memory() {
    let host = TestHost::new();
    let vm = initialized(&host);
    let known = slot(&host);
    let moved = MemSlot {
        gpa: Gpa::new(1 << 30),
        ..known
    };
    assert_eq!(
        vm.set_memory_slot(&moved),
        Err(Error::Exists(Field::Slot, 0))
    );
    assert_eq!(
        vm.delete_memory_slot(&moved),
        Err(Error::NotFound(Field::Slot, 0))
    );
    let mut read_only = known;
    read_only.flags.read_only = true;
    vm.set_memory_slot(&read_only).unwrap();
    vm.delete_memory_slot(&read_only).unwrap();
    assert!(destroy(vm).is_clean());
}

/// A request that the host cannot carry out on a TD's vCPU is refused with its name: none succeeds
/// in silence.
#[test]
fn the_state_of_a_tds_vcpu_is_protected_before_and_after_its_launch() {
    let host = TestHost::new();
    let mut vm = initialized(&host);
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    for launched in [false, true] {
        let refused = [
            vcpu.regs().err(),
            vcpu.sregs().err(),
            vcpu.xsave().err(),
            vcpu.events().err(),
            vcpu.debug_regs().err(),
            vcpu.msrs(&mut []).err(),
            vcpu.xcrs().err(),
            vcpu.mp_state().err(),
            vcpu.set_msrs(&[]).err(),
            vcpu.set_mp_state(MpState::Runnable).err(),
            vcpu.set_cpuid(&[]).err(),
            vcpu.set_guest_debug(GuestDebug::default()).err(),
            vcpu.inject_irq(0x20).err(),
            vcpu.enable_irq_window().err(),
            vcpu.write_tsc_offset(1).err(),
            vcpu.write_tsc_multiplier(1).err(),
            vcpu.setup_mce(1).err(),
            vcpu.vcpu_reset(true).err(),
        ];
        for (n, error) in refused.into_iter().enumerate() {
            assert!(matches!(error, Some(Error::Protected(_))), "{n}: {error:?}");
        }
        assert_eq!(vcpu.vcpu_reset(false), Ok(()));
        if !launched {
            vm.vm_finalize().unwrap();
        }
    }
    assert!(destroy(vm).is_clean());
}

#[test]
fn the_measurement_is_mrtd_and_there_is_none_before_the_td_is_final() {
    let host = TestHost::new();
    let mut vm = initialized(&host);
    vm.create_vcpu(VcpuId(0)).unwrap();
    vm.add_initial_page(&initial_page(0, InitialPageKind::Measured))
        .unwrap();
    let early = Error::WrongState(Step::Initialized);
    assert_eq!(vm.measurement(), Err(early));
    vm.vm_finalize().unwrap();
    let tdr = vm.tdr().unwrap().get();
    let mrtd = host.platform().td(tdr).expect("the TD").mrtd;
    assert_eq!(vm.measurement().unwrap().bytes(), &mrtd);
    host.fail(
        Leaf::MngRd,
        3,
        1,
        Injected::Status(Class::TD_FATAL.with(0).get()),
    );
    assert!(vm.measurement().is_err());
    let key = vm.mmu_release_hkid().unwrap();
    assert_eq!(vm.measurement(), Err(Error::WrongState(Step::KeyReleased)));
    let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
    assert!(vm.vm_free(drained).is_clean());
}

/// Two hosts number their VMs alike. Their tokens are not each other's.
#[test]
fn a_token_of_a_vm_of_the_same_number_on_another_host_proves_nothing() {
    let (here, there) = (TestHost::new(), TestHost::new());
    let (mut a, mut b) = (runnable(&here), runnable(&there));
    assert_eq!(a.id(), b.id());
    let of_b = b.mmu_release_hkid().unwrap();
    let _of_a = a.mmu_release_hkid().unwrap();
    let (error, of_b) = a.drain_private(of_b).unwrap_err();
    assert_eq!(error, Error::Invalid(Field::Token, b.id().0));
    let drained = b.drain_private(of_b).map_err(|(error, _)| error).unwrap();
    assert!(b.vm_free(drained).is_clean());
    assert!(destroy(a).is_clean());
}

/// Tokens that were dropped are made again, so that no VM is stuck in its teardown.
#[test]
fn each_call_of_the_teardown_may_come_again() {
    let host = TestHost::new();
    let mut vm = runnable(&host);
    vm.pre_fault_memory(Gfn::new(0), 3).unwrap();
    drop(vm.mmu_release_hkid().unwrap());
    host.take_log();
    let key = vm.mmu_release_hkid().unwrap();
    assert_eq!(host.take_log(), [], "the key is gone already");
    drop(vm.drain_private(key).map_err(|(error, _)| error).unwrap());
    host.take_log();
    let key = vm.mmu_release_hkid().unwrap();
    let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
    assert_eq!(host.take_log(), [], "the pages are gone already");
    let report = vm.vm_free(drained);
    assert!(report.is_clean());
    all_accounted(&host, &report);
}
