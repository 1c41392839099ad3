//! Every check of every call that is served, by a call that fails it; and the order of checks.

#[path = "../common/mod.rs"]
mod common;
mod context;
mod irq;
mod launch;
mod memory;
mod migrate;
mod misc;
mod objects;
mod psp;
mod snp;
mod support;
#[path = "../td_run/guest.rs"]
#[allow(dead_code, reason = "the checks need one run of a TD")]
mod td_guest;
mod tdx;

use std::collections::BTreeSet;

use common::{Answer, World, file_slot};
use kvm_ops_softkvm::Refusal;
use kvm_ops_uapi::checks::{self, *};
use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::memory::{MemoryAttributes, UserspaceMemoryRegion2};
use kvm_ops_uapi::system::{Cpuid2, CpuidEntry2, MsrList};
use kvm_ops_uapi::{U32, U64};
use support::{Case, attributes_args, set_attributes};

/// All cases.
const CASES: [&[Case]; 10] = [
    objects::CASES,
    memory::CASES,
    launch::CASES,
    migrate::CASES,
    snp::CASES,
    psp::CASES,
    context::CASES,
    tdx::CASES,
    irq::CASES,
    misc::CASES,
];

/// Checks that no caller can fail, because of what comes before them.
const UNREACHED: &[(Check, &str)] = &[
    (
        run::MP_STATE,
        "INIT and SIPI are held back in SMM and VMX operation, and by GIF, which guests do not have here",
    ),
    (local_send::RANDOM, "the system has random numbers"),
    (
        local_send::IDLE,
        "the command and every other move of the guest hold the lock of its VM",
    ),
    (
        tdx_capabilities::SUPPORTED,
        "a kernel that supports nothing of its module makes no TDs (create_vm::TYPE)",
    ),
    (
        tdx_init_vm::NO_VCPU,
        "a TD has vCPUs only after INIT_VM (create_vcpu::TD_INITIALIZED), and then ONCE comes before",
    ),
    (
        tdx_init_mem_region::FINALIZED,
        "encrypt_tdx_vcpu::STATE comes before",
    ),
];

#[test]
fn each_check_is_failed_by_a_call_and_answers_its_errno() {
    for (number, (check, call)) in CASES.concat().iter().enumerate() {
        let answer = call(&World::amd());
        let failed = answer.as_ref().err().and_then(Refusal::check);
        assert_eq!(failed, Some(*check), "case {number} of {check}: {answer:?}");
        assert_eq!(answer.unwrap_err().errno(), check.errno);
    }
}

#[test]
fn every_check_of_a_served_call_has_a_case_or_a_reason() {
    let cases: BTreeSet<Check> = CASES.concat().iter().map(|(check, _)| *check).collect();
    let unreached: BTreeSet<Check> = UNREACHED.iter().map(|(check, _)| *check).collect();
    assert_eq!(cases.intersection(&unreached).next(), None);
    for table in checks::TABLES {
        for check in *table {
            let known = cases.contains(check) || unreached.contains(check);
            assert!(known, "{check}");
        }
    }
}

type Mistake<T> = (Check, fn(&mut T));

/// Makes every pair of mistakes, and expects the one that the kernel finds first.
fn first_of_two<T: Copy>(right: T, mistakes: &[Mistake<T>], call: impl Fn(&T) -> Answer) {
    for (first, (check, make)) in mistakes.iter().enumerate() {
        for (later, make_later) in &mistakes[first..] {
            let mut wrong = right;
            make_later(&mut wrong);
            make(&mut wrong);
            let failed = call(&wrong).err().and_then(|refusal| refusal.check());
            assert_eq!(failed, Some(*check), "with {later}");
        }
    }
}

#[test]
fn of_two_mistakes_in_a_slot_the_first_in_order_is_told() {
    let w = World::amd();
    let vm = w.vm(1);
    let gmem = w.gmem(vm, 0x20_0000);
    let mistakes: &[Mistake<UserspaceMemoryRegion2>] = &[
        (region::SLOT, |r| r.slot = U32::new(r.slot.get() | 0xffff)),
        (region::FLAGS, |r| r.flags = U32::new(r.flags.get() | 8)),
        (region::SIZE, |r| {
            r.memory_size = U64::new(r.memory_size.get() | 1)
        }),
        (region::GPA, |r| {
            r.guest_phys_addr = U64::new(r.guest_phys_addr.get() | 1)
        }),
        (region::HVA, |r| r.userspace_addr = U64::new(1 << 63)),
        (region::OFFSET, |r| r.guest_memfd_offset = U64::new(1)),
        (region::ADDRESS_SPACE, |r| {
            r.slot = U32::new(r.slot.get() | 1 << 16)
        }),
        (region::WRAP, |r| {
            r.guest_phys_addr = U64::new(!0xfff | r.guest_phys_addr.get())
        }),
        (region::DESCRIPTOR, |r| r.guest_memfd = U32::new(99)),
    ];
    first_of_two(file_slot(gmem), mistakes, |region| w.region(vm, region));
    w.region(vm, &file_slot(gmem)).expect("no mistake");
}

#[test]
fn of_two_mistakes_in_attributes_the_first_in_order_is_told() {
    let w = World::amd();
    let mistakes: &[Mistake<MemoryAttributes>] = &[
        (attributes::FLAGS, |a| a.flags = U64::new(1)),
        (attributes::KNOWN, |a| a.attributes = U64::new(16)),
        (attributes::SIZE, |a| a.size = U64::ZERO),
        (attributes::PAGES, |a| a.address = U64::new(1)),
    ];
    first_of_two(attributes_args(0x1000, 0x1000, 8, 0), mistakes, |args| {
        set_attributes(&w, 1, *args)
    });
}

#[test]
fn lists_that_are_too_short_are_e2big_and_tell_their_length() {
    let w = World::amd();
    for list in [
        ioctl::KVM_GET_MSR_INDEX_LIST,
        ioctl::KVM_GET_MSR_FEATURE_INDEX_LIST,
    ] {
        let at = w.task.map(4 + 64 * 4);
        assert_eq!(w.ioctl(w.kvm, list, at).unwrap_err().errno().0, 7);
        let needed: MsrList = w.task.get(at).unwrap();
        assert_ne!(needed.nmsrs.get(), 0);
        assert_eq!(w.ioctl(w.kvm, list, at), Ok(0), "the room was not touched");
    }
    let mut nent = 1;
    let head = loop {
        let at = w.task.map(8 + nent as usize * 40);
        let args = Cpuid2 {
            nent: U32::new(nent),
            ..Cpuid2::default()
        };
        kvm_ops_softkvm::Process::write(&w.task, at, zerocopy::IntoBytes::as_bytes(&args)).unwrap();
        match w.ioctl(w.kvm, ioctl::KVM_GET_SUPPORTED_CPUID, at) {
            Ok(_) => break w.task.get::<Cpuid2>(at).unwrap(),
            Err(refusal) => assert_eq!(refusal.errno().0, 7),
        }
        nent += 1;
    };
    assert_eq!(
        head.nent.get(),
        nent,
        "the least room that is enough is the number of entries"
    );
}

/// The kernel's self-tests refuse a machine whose guests have wider addresses than itself.
#[test]
fn no_guest_has_wider_addresses_than_the_machine() {
    for w in [World::amd(), World::intel()] {
        let entries = 256;
        let at = w.task.map(8 + entries * 40);
        kvm_ops_softkvm::Process::write(&w.task, at, &(entries as u32).to_le_bytes()).unwrap();
        w.ioctl(w.kvm, ioctl::KVM_GET_SUPPORTED_CPUID, at).unwrap();
        let leaves = (0..entries as u64).map(|n| at + 8 + n * 40);
        let mut leaves = leaves.map(|at| w.task.get::<CpuidEntry2>(at).unwrap());
        let widths = leaves
            .find(|leaf| leaf.function.get() == 0x8000_0008)
            .unwrap();
        let (machine, guest) = (widths.eax.get() & 0xff, widths.eax.get() >> 16 & 0xff);
        assert!(guest <= machine && guest == 48, "{machine}, {guest}");
    }
}
