//! Random histories of private memory with failures thrown in: after every step the mirror equals
//! the module's Secure-EPT, and in the end everything is accounted for.

mod common;

use common::audit::{all_accounted, mirror_equals_secure_ept};
use common::life::{destroy, runnable};
use common::{Injected, TestHost};
use kvm_ops_core::{CpuId, Error, Gfn, Gpa, MemSlot, Privacy, SlotId, Step, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::status::Class;
use proptest::prelude::*;

/// A step of a history. Frames are counted from the start of three regions that share no table.
#[derive(Clone, Debug)]
enum Op {
    Fault {
        at: u64,
        pages: u64,
    },
    Convert {
        at: u64,
        pages: u64,
        to: Privacy,
    },
    DropSlot,
    BringSlot,
    Flush,
    Offline(u32),
    /// The next calls of a leaf fail with something that passes, so many times.
    Busy(Leaf, u64),
    /// The next call of a leaf fails for good.
    Break(Leaf),
}

const REGIONS: [u64; 3] = [0, 0x3f0, 0x2_0000];
/// The leaves of private memory.
const LEAVES: [Leaf; 7] = [
    Leaf::MemSeptAdd,
    Leaf::MemPageAug,
    Leaf::MemRangeBlock,
    Leaf::MemRangeUnblock,
    Leaf::MemTrack,
    Leaf::MemPageRemove,
    Leaf::MemSeptRemove,
];

fn ops() -> impl Strategy<Value = Op> {
    let place = (0..REGIONS.len(), 0..0x20u64).prop_map(|(region, n)| REGIONS[region] + n);
    let pages = 1..0x18u64;
    let privacy = prop_oneof![Just(Privacy::Private), Just(Privacy::Shared)];
    let leaf = (0..LEAVES.len()).prop_map(|n| LEAVES[n]);
    prop_oneof![
        6 => (place.clone(), pages.clone()).prop_map(|(at, pages)| Op::Fault { at, pages }),
        6 => (place, pages, privacy).prop_map(|(at, pages, to)| Op::Convert { at, pages, to }),
        1 => Just(Op::DropSlot),
        2 => Just(Op::BringSlot),
        1 => Just(Op::Flush),
        1 => (0..4u32).prop_map(Op::Offline),
        3 => (leaf.clone(), 1..4u64).prop_map(|(leaf, times)| Op::Busy(leaf, times)),
        1 => leaf.prop_map(Op::Break),
    ]
}

fn run(history: &[Op]) {
    let host = TestHost::new();
    let vm = runnable(&host);
    let slot = MemSlot::new(SlotId(0), Gpa::new(0), host.memory());
    let broken = Class::TD_FATAL.with(0).get();
    for op in history {
        let done = match op {
            Op::Fault { at, pages } => vm.pre_fault_memory(Gfn::new(*at), *pages).map(drop),
            Op::Convert { at, pages, to } => vm
                .set_memory_attributes(Gfn::new(*at), *pages, *to)
                .map(|done| assert_eq!(done, *pages)),
            Op::DropSlot => vm.delete_memory_slot(&slot),
            Op::BringSlot => vm.set_memory_slot(&slot),
            Op::Flush => vm.flush_private_tlb(),
            Op::Offline(cpu) => vm.disable_virtualization_cpu(CpuId(*cpu)),
            Op::Busy(leaf, times) => {
                let busy = Class::OPERAND_BUSY.with(146).get();
                host.fail(*leaf, 1, *times, Injected::Status(busy));
                Ok(())
            }
            Op::Break(leaf) => {
                host.fail(*leaf, 1, 1, Injected::Status(broken));
                Ok(())
            }
        };
        let expected = matches!(
            done,
            Ok(()) | Err(Error::Busy | Error::NotFound(..) | Error::Firmware(_))
        );
        assert!(expected, "{op:?}: {done:?}");
        mirror_equals_secure_ept(&host, &vm);
        if let Err(Error::Firmware(status)) = done {
            assert_eq!((status, vm.step()), (broken, Step::Poisoned));
            break;
        }
        assert_eq!(vm.step(), Step::Runnable);
    }
    host.heal();
    let report = destroy(vm);
    assert!(report.is_clean(), "{report:?}");
    all_accounted(&host, &report);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_mirror_equals_the_secure_ept_after_every_step(history in prop::collection::vec(ops(), 1..40)) {
        run(&history);
    }
}

/// The next fault or removal takes up the pages that a failed removal left blocked.
#[test]
fn a_removal_that_was_busy_is_taken_up_by_a_fault_or_by_the_next_removal() {
    for again in [true, false] {
        let host = TestHost::new();
        let vm = runnable(&host);
        vm.pre_fault_memory(Gfn::new(0), 4).unwrap();
        let busy = Class::OPERAND_BUSY.with(1).get();
        host.fail(Leaf::MemPageRemove, 2, 2, Injected::Status(busy));
        let all = |to| vm.set_memory_attributes(Gfn::new(0), 4, to);
        assert_eq!(all(Privacy::Shared), Err(Error::Busy));
        assert!(vm.private_stats().blocked > 0);
        mirror_equals_secure_ept(&host, &vm);
        host.take_log();
        if again {
            assert_eq!(all(Privacy::Shared), Ok(4));
            assert_eq!(vm.private_stats().pages_4k, 0);
            let counts = host.take_counts();
            assert!(
                !counts.contains_key("TDH.MEM.RANGE.BLOCK"),
                "not twice: {counts:?}"
            );
        } else {
            assert_eq!(vm.pre_fault_memory(Gfn::new(0), 4), Ok(4));
            assert_eq!(vm.private_stats().blocked, 0);
            assert_eq!(
                host.take_counts()["TDH.MEM.PAGE.AUG"],
                1,
                "the one that was gone"
            );
        }
        mirror_equals_secure_ept(&host, &vm);
        let report = destroy(vm);
        all_accounted(&host, &report);
    }
}

/// Contention stops a pre-fault after the pages that are done; a failure that poisons the TD is
/// returned at once.
#[test]
fn the_status_that_poisons_a_td_is_told_by_the_operation_that_met_it() {
    let host = TestHost::new();
    let vm = runnable(&host);
    let busy = Class::OPERAND_BUSY.with(1).get();
    host.fail(Leaf::MemPageAug, 2, u64::MAX, Injected::Status(busy));
    assert_eq!(vm.pre_fault_memory(Gfn::new(0), 4), Ok(1));
    assert_eq!(vm.pre_fault_memory(Gfn::new(1), 3), Err(Error::Busy));
    assert!(host.heal());
    let broken = Class::TD_FATAL.with(0).get();
    host.fail(Leaf::MemPageAug, 2, 1, Injected::Status(broken));
    let told = Err(Error::Firmware(broken));
    assert_eq!(vm.pre_fault_memory(Gfn::new(1), 3), told);
    assert_eq!(
        (vm.step(), vm.private_stats().pages_4k),
        (Step::Poisoned, 2)
    );
    assert!(destroy(vm).is_clean());
}

/// A table that was busy when it should go stays blocked, and goes the next time.
#[test]
fn a_table_that_was_busy_goes_with_the_next_deletion() {
    let host = TestHost::new();
    let vm = runnable(&host);
    vm.pre_fault_memory(Gfn::new(0), 1).unwrap();
    let slot = MemSlot::new(SlotId(0), Gpa::new(0), host.memory());
    let busy = Class::OPERAND_BUSY.with(1).get();
    host.fail(Leaf::MemSeptRemove, 1, 2, Injected::Status(busy));
    assert_eq!(vm.delete_memory_slot(&slot), Err(Error::Busy));
    assert!(host.heal());
    mirror_equals_secure_ept(&host, &vm);
    vm.delete_memory_slot(&slot).unwrap();
    assert_eq!(vm.private_stats().tables, 0);
    mirror_equals_secure_ept(&host, &vm);
    assert!(destroy(vm).is_clean());
}
