//! Slots that change, dirty logs, and memory that is not there.

use std::thread;

use kvm_ops_softkvm::{Process, Task};
use kvm_ops_uapi::memory::{DirtyLog, slot_flags};
use kvm_ops_uapi::run::{MemoryFault, Mmio, exit_reason};
use kvm_ops_uapi::{Errno, U32, U64, ioctl};

use crate::guest::{CODE, Guest};

const AT: u64 = 0x2_0000;

/// again: mov ax, 0x2000; mov ds, ax; mov al, [0]; out 0x80, al; jmp again
const READS: [u8; 12] = [
    0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x00, 0xe6, 0x80, 0xeb, 0xf4,
];

fn next_value(guest: &Guest) -> u8 {
    guest.run_to_port().1[0]
}

/// set_memory_region_test: DELETE of in-use region.
#[test]
fn a_slot_that_is_deleted_becomes_mmio_and_comes_back_with_its_memory() {
    let guest = Guest::new(&READS);
    let more = guest.host.map(4096);
    for value in [1, 2] {
        guest.slot(1, AT, more, 4096).unwrap();
        Process::write(&guest.host, more, &[value]).unwrap();
        assert_eq!(next_value(&guest), value);
        guest.slot(1, AT, more, 0).unwrap();
        assert_eq!(guest.run(), exit_reason::MMIO);
        let mmio: Mmio = guest.exit();
        assert_eq!((mmio.phys_addr.get(), mmio.len.get()), (AT, 1));
        guest.answer(&Mmio {
            data: [0xee; 8],
            ..mmio
        });
        assert_eq!(next_value(&guest), 0xee);
    }
}

/// set_memory_region_test: MOVE of in-use region.
#[test]
fn a_slot_that_is_moved_shows_other_memory_at_the_old_place() {
    let guest = Guest::new(&READS);
    let more = guest.host.map(8192);
    Process::write(&guest.host, more, &[1]).unwrap();
    Process::write(&guest.host, more + 4096, &[2]).unwrap();
    for (gpa, value) in [(AT, 1), (AT - 4096, 2), (AT, 1)] {
        guest.slot(1, gpa, more, 8192).unwrap();
        assert_eq!(next_value(&guest), value);
    }
    guest.slot(1, AT + 4096, more, 8192).unwrap();
    assert_eq!(guest.run(), exit_reason::MMIO, "nothing is there any more");
}

#[test]
fn writes_to_a_read_only_slot_leave_and_reads_do_not() {
    // mov ax, 0x2000; mov ds, ax; mov al, [0]; mov [1], al; hlt
    let guest = Guest::new(&[
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x00, 0xa2, 0x01, 0x00, 0xf4,
    ]);
    let more = guest.host.map(4096);
    Process::write(&guest.host, more, &[0x55]).unwrap();
    let read_only = |region: &mut kvm_ops_uapi::memory::UserspaceMemoryRegion2| {
        region.flags = U32::new(slot_flags::READONLY);
    };
    guest.slot_with(1, AT, (more, 4096), read_only).unwrap();
    assert_eq!(guest.run(), exit_reason::MMIO);
    let mmio: Mmio = guest.exit();
    assert_eq!((mmio.phys_addr.get(), mmio.data[0]), (AT + 1, 0x55));
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.read_at(more), [0x55, 0]);
}

fn dirty(guest: &Guest, slot: u32) -> u64 {
    let bitmap = guest.host.task.map(8);
    let log = DirtyLog {
        slot: U32::new(slot),
        dirty_bitmap: U64::new(bitmap),
        ..DirtyLog::default()
    };
    guest
        .call(guest.vm, ioctl::KVM_GET_DIRTY_LOG, &log)
        .unwrap();
    guest.host.task.get::<U64>(bitmap).unwrap().get()
}

#[test]
fn a_dirty_log_has_the_pages_that_were_written_since_it_was_read() {
    // mov ax, 0x2000; mov ds, ax; mov [0x1000], al; mov al, [0x2000]; out 0x80, al; mov [0x3001], al;
    // hlt
    let guest = Guest::new(&[
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x10, 0xa0, 0x00, 0x20, 0xe6, 0x80, 0xa2, 0x01,
        0x30, 0xf4,
    ]);
    let more = guest.host.map(0x4000);
    let logged = |region: &mut kvm_ops_uapi::memory::UserspaceMemoryRegion2| {
        region.flags = U32::new(slot_flags::LOG_DIRTY_PAGES);
    };
    guest.slot_with(1, AT, (more, 0x4000), logged).unwrap();
    assert_eq!(dirty(&guest, 1), 0);
    guest.run_to_port();
    assert_eq!(dirty(&guest, 1), 0b10);
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(dirty(&guest, 1), 0b1000);
    assert_eq!(dirty(&guest, 1), 0);
}

#[test]
fn memory_that_the_process_does_not_have_is_efault_until_it_has_it() {
    let guest = Guest::new(&READS);
    guest.slot(1, AT, 0x7000_0000_0000, 4096).unwrap();
    for _ in 0..2 {
        let answer = guest.run_vcpu(guest.vcpu);
        assert_eq!(answer.unwrap_err().errno(), Errno::EFAULT);
        assert_eq!(guest.reason(guest.vcpu), exit_reason::MEMORY_FAULT);
        let fault: MemoryFault = guest.exit();
        let place = (fault.flags.get(), fault.gpa.get(), fault.size.get());
        assert_eq!(place, (0, AT, 4096));
    }
    assert_eq!(guest.regs().rip.get(), CODE + 5, "at the access");
    guest.slot(1, AT, 0, 0).unwrap();
    let more = guest.host.map(4096);
    guest.slot(1, AT, more, 4096).unwrap();
    assert_eq!(next_value(&guest), 0);
}

#[test]
fn memory_that_the_process_takes_away_is_efault_and_the_rest_stays() {
    let guest = Guest::new(&READS);
    let more = guest.host.map(4096);
    Process::write(&guest.host, more, &[7]).unwrap();
    guest.slot(1, AT, more, 4096).unwrap();
    assert_eq!(next_value(&guest), 7);
    let own = Process::address_space(&guest.host);
    guest.kernel.invalidate(own, more - 4096, 4096);
    guest.kernel.invalidate(own, more + 4096, 4096);
    let other = Process::address_space(&Task::new());
    guest.kernel.invalidate(other, more, 4096);
    assert_eq!(next_value(&guest), 7, "none of it was meant");
    guest.kernel.invalidate(own, more, 1);
    assert_eq!(next_value(&guest), 7, "it was lent again");
    guest.kernel.invalidate(own, more + 4095, 4096);
    guest.host.unmap(more);
    for _ in 0..2 {
        let answer = guest.run_vcpu(guest.vcpu);
        assert_eq!(answer.unwrap_err().errno(), Errno::EFAULT);
        let fault: MemoryFault = guest.exit();
        assert_eq!((fault.gpa.get(), fault.size.get()), (AT, 4096));
    }
    guest.slot(1, AT, 0, 0).unwrap();
    assert_eq!(
        guest.run(),
        exit_reason::MMIO,
        "the slot is gone, the code is not"
    );
}

#[test]
fn memory_that_leaves_while_two_vcpus_run_is_never_a_devices() {
    const RUNS: u32 = 10_000;
    let guest = Guest::new(&READS);
    let other = guest.add_vcpu(1, CODE);
    let more = guest.host.map(4096);
    guest.slot(1, AT, more, 4096).unwrap();
    let runs = |vcpu| {
        (0..RUNS).for_each(|_| {
            guest.run_vcpu(vcpu).unwrap();
            assert_eq!(guest.reason(vcpu), exit_reason::IO);
        });
    };
    let own = Process::address_space(&guest.host);
    thread::scope(|scope| {
        let both = [guest.vcpu, other].map(|vcpu| scope.spawn(move || runs(vcpu)));
        while both.iter().any(|thread| !thread.is_finished()) {
            guest.kernel.invalidate(own, more, 4096);
        }
    });
}

/// guest_memfd_test: a file that can be mapped behind a slot of a normal VM.
#[test]
fn a_file_that_can_be_mapped_serves_the_guest_s_accesses() {
    // mov ax, 0x2000; mov ds, ax; inc byte [0]; hlt
    let guest = Guest::new(&[0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xfe, 0x06, 0x00, 0x00, 0xf4]);
    let file = guest.gmem(4096, 3);
    let over_file = |region: &mut kvm_ops_uapi::memory::UserspaceMemoryRegion2| {
        region.flags = U32::new(slot_flags::GUEST_MEMFD);
        region.guest_memfd = U32::new(file as u32);
    };
    guest.slot_with(1, AT, (0, 4096), over_file).unwrap();
    let pages = guest.host.file_pages(file).unwrap();
    assert_eq!(guest.run(), exit_reason::HLT);
    // SAFETY: the page is there as long as `pages`, and no reference to it exists.
    let byte = unsafe { std::ptr::read_volatile(pages.address() as *const u8) };
    assert_eq!(byte, 1);
}
