//! VMs of type 1, whose memory is private where its attribute says so.

use kvm_ops_softkvm::Process;
use kvm_ops_uapi::memory::{ATTRIBUTE_PRIVATE, UserspaceMemoryRegion2, slot_flags};
use kvm_ops_uapi::run::{MEMORY_FAULT_PRIVATE, MemoryFault, exit_reason};
use kvm_ops_uapi::{Errno, U32};

use crate::guest::Guest;

const SW_PROTECTED: u64 = 1;
const AT: u64 = 0x2_0000;
const PAGE: u64 = 4096;

/// again: mov ax, 0x2000; mov ds, ax; mov al, [0x1000]; out 0x80, al; inc byte [0x1000]; jmp again
const COUNTS: [u8; 16] = [
    0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x10, 0xe6, 0x80, 0xfe, 0x06, 0x00, 0x10, 0xeb, 0xf0,
];

fn over(file: i32) -> impl FnOnce(&mut UserspaceMemoryRegion2) {
    move |region| {
        region.flags = U32::new(slot_flags::GUEST_MEMFD);
        region.guest_memfd = U32::new(file as u32);
    }
}

/// A guest with four pages of shared memory at `AT`, which may be private too.
fn protected(with_file: bool) -> (Guest, u64) {
    let guest = Guest::with(&COUNTS, SW_PROTECTED, |_, _| ());
    let shared = guest.host.map(4 * PAGE);
    if with_file {
        let file = guest.gmem(4 * PAGE, 0);
        let place = (shared, 4 * PAGE);
        guest.slot_with(1, AT, place, over(file)).unwrap();
    } else {
        guest.slot(1, AT, shared, 4 * PAGE).unwrap();
    }
    (guest, shared)
}

fn expect_private_fault(guest: &Guest, gpa: u64) {
    let answer = guest.run_vcpu(guest.vcpu);
    assert_eq!(answer.unwrap_err().errno(), Errno::EFAULT);
    assert_eq!(guest.reason(guest.vcpu), exit_reason::MEMORY_FAULT);
    let fault: MemoryFault = guest.exit();
    let place = (fault.flags.get(), fault.gpa.get(), fault.size.get());
    assert_eq!(place, (MEMORY_FAULT_PRIVATE, gpa, PAGE));
}

/// private_mem_conversions_test: each conversion shows the other memory of the page.
#[test]
fn a_page_has_a_private_and_a_shared_memory() {
    let (guest, shared) = protected(true);
    let next = || guest.run_to_port().1[0];
    guest.host.write(shared + PAGE, &[100]).unwrap();
    assert_eq!((next(), next()), (100, 101));
    guest.set_attributes(AT + PAGE, PAGE, ATTRIBUTE_PRIVATE);
    // The increment of 101 falls into private memory.
    assert_eq!((next(), next()), (1, 2));
    assert_eq!(guest.read_at(shared + PAGE), [101]);
    guest.set_attributes(AT, 4 * PAGE, ATTRIBUTE_PRIVATE);
    assert_eq!(next(), 3);
    guest.set_attributes(AT, 4 * PAGE, 0);
    assert_eq!((next(), next()), (102, 103));
}

/// private_mem_kvm_exits_test: test_private_access_memslot_not_private.
#[test]
fn private_memory_without_a_file_is_a_memory_fault() {
    let (guest, _) = protected(false);
    guest.set_attributes(AT + PAGE, PAGE, ATTRIBUTE_PRIVATE);
    expect_private_fault(&guest, AT + PAGE);
    guest.set_attributes(AT + PAGE, PAGE, 0);
    assert_eq!(guest.run_to_port().1, [0], "the access is made again");
}

/// private_mem_kvm_exits_test: test_private_access_memslot_deleted.
#[test]
fn private_memory_whose_slot_is_deleted_is_a_memory_fault() {
    let (guest, shared) = protected(true);
    guest.set_attributes(AT + PAGE, PAGE, ATTRIBUTE_PRIVATE);
    assert_eq!(guest.run_to_port().1, [0]);
    guest.slot(1, AT, shared, 0).unwrap();
    expect_private_fault(&guest, AT + PAGE);
    guest.set_attributes(AT + PAGE, PAGE, 0);
    assert_eq!(guest.run(), exit_reason::MMIO, "shared, and no slot");
}

#[test]
fn attributes_count_for_slots_and_vcpus_that_come_later() {
    let guest = Guest::with(&COUNTS, SW_PROTECTED, |host, vm| {
        let args = [AT, 4 * PAGE, ATTRIBUTE_PRIVATE, 0];
        let at = host.task.put(&args.map(kvm_ops_uapi::U64::new));
        let ioctl = kvm_ops_uapi::ioctl::KVM_SET_MEMORY_ATTRIBUTES;
        host.ioctl(vm, ioctl, at).unwrap();
    });
    expect_private_fault(&guest, AT + PAGE);
    let (file, shared) = (guest.gmem(4 * PAGE, 0), guest.host.map(4 * PAGE));
    guest
        .slot_with(1, AT, (shared, 4 * PAGE), over(file))
        .unwrap();
    guest.host.write(shared + PAGE, &[100]).unwrap();
    assert_eq!(guest.run_to_port().1, [0]);
}
