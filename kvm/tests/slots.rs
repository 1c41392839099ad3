//! Memory slots: read-only ones, the dirty log, private memory, and every refusal.

mod common;

use std::os::fd::AsRawFd;

use common::{CODE, Memory, offered, real_mode_vm};
use kvm_ioctls::VcpuExit;
use kvm_ops_core::{
    Error, Exit, Field, Gpa, Irqchip, MemSlot, PrivateBacking, SlotFlags, Step, VcpuOps, VmPort,
};

const READ_ONLY: SlotFlags = SlotFlags {
    read_only: true,
    log_dirty: false,
};
const LOG_DIRTY: SlotFlags = SlotFlags {
    read_only: false,
    log_dirty: true,
};

#[test]
fn a_write_to_a_read_only_slot_leaves_as_mmio_and_reads_do_not() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    let rom = Memory::new(1);
    rom.write(0x10, &[0x99]);
    // mov ax, 0x2000; mov ds, ax; mov al, [0x10]; mov [0x20], al; mov al, [0x20]; out 1, al
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x10, 0x00, 0xa2, 0x20, 0x00, 0xa0, 0x20, 0x00, 0xe6,
        0x01,
    ];
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let slot = rom.slot_with(1, 0x20000, READ_ONLY);
    if offered(vm.set_memory_slot(&slot)).is_none() {
        return;
    }
    let (gpa, len) = (Gpa::new(0x20020), 1);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::MmioWrite { gpa, len });
    assert_eq!(vcpu.exit_data(), [0x99]);
    common::expect_out(&mut vcpu, 1, &[0]);
    assert_eq!(rom.read(0x20, 1), [0]);
}

#[test]
fn the_dirty_log_has_exactly_the_pages_that_the_guest_wrote_and_is_cleared_by_reading() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    let data = Memory::new(130);
    // mov ax, 0x2000; mov ds, ax; mov [0x3000], al; mov [0x7fff], ax (two pages);
    // mov ax, 0xa000; mov ds, ax; mov [0x1000], al (page 129); in al, 0; mov [0x0], al; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa2, 0x00, 0x30, 0xa3, 0xff, 0x7f, //
        0xb8, 0x00, 0xa0, 0x8e, 0xd8, 0xa2, 0x00, 0x10, 0xe4, 0x00, 0xa2, 0x00, 0x00, 0xf4,
    ];
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let slot = data.slot_with(1, 0x20000, LOG_DIRTY);
    vm.set_memory_slot(&slot).unwrap();
    let mut bitmap = vec![u64::MAX; slot.dirty_words()];
    vm.dirty_log(&slot, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0, 0, 0]);

    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
    vcpu.exit_data()[0] = 1;
    vm.dirty_log(&slot, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 << 3 | 1 << 7 | 1 << 8, 0, 1 << (129 - 128)]);

    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    vm.dirty_log(&slot, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0, 0, 1 << (128 - 128)]);
    vm.dirty_log(&slot, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0, 0, 0]);
}

#[test]
fn dirty_logging_can_be_switched_on_and_off_and_a_slot_without_it_has_no_log() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let vm = common::vm(&host, 1, Irqchip::None);
    let off = memory.slot(0, 0);
    let on = memory.slot_with(0, 0, LOG_DIRTY);
    let mut bitmap = [0];
    vm.set_memory_slot(&off).unwrap();
    let none = Err(Error::NotFound(Field::Slot, 0));
    assert_eq!(vm.dirty_log(&off, &mut bitmap), none);
    vm.set_memory_slot(&on).unwrap();
    assert_eq!(vm.dirty_log(&on, &mut bitmap), Ok(()));
    assert_eq!(
        vm.dirty_log(&on, &mut [0, 0]),
        Err(Error::Invalid(Field::BufferLength, 2))
    );
    vm.set_memory_slot(&off).unwrap();
    assert_eq!(vm.dirty_log(&off, &mut bitmap), none);
}

#[test]
fn a_deleted_slot_is_not_seen_by_the_guest_any_more() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    let data = Memory::new(1);
    // mov ax, 0x2000; mov ds, ax; mov al, [0]; out 1, al; mov al, [0]
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x00, 0xe6, 0x01, 0xa0, 0x00, 0x00,
    ];
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let slot = data.slot(1, 0x20000);
    vm.set_memory_slot(&slot).unwrap();
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoOut { .. }));
    vm.delete_memory_slot(&slot).unwrap();
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::MmioRead { .. }));
    assert_eq!(
        vm.delete_memory_slot(&slot),
        Err(Error::NotFound(Field::Slot, 1))
    );
}

#[test]
fn a_slot_is_deleted_and_its_log_read_only_by_what_was_set() {
    let Some(host) = common::host() else { return };
    let (memory, other) = (Memory::new(130), Memory::new(4));
    let vm = common::vm(&host, 1, Irqchip::None);
    let slot = memory.slot_with(0, 0, LOG_DIRTY);
    vm.set_memory_slot(&slot).unwrap();
    // The number of the slot, and another place, other memory, or less of it. The last would make
    // the kernel write the bits of 130 pages into a buffer for 4.
    let forged = [memory.slot(0, 0x10_0000), other.slot(0, 0)];
    for forged in forged {
        let none = Err(Error::NotFound(Field::Slot, 0));
        assert_eq!(vm.delete_memory_slot(&forged), none);
        let mut bitmap = vec![0; forged.dirty_words()];
        assert_eq!(vm.dirty_log(&forged, &mut bitmap), none);
    }
    // Flags are no part of that: the caller may hold the slot as it was before they changed.
    vm.delete_memory_slot(&memory.slot(0, 0)).unwrap();
}

#[test]
fn a_vcpu_that_outlives_its_vm_never_runs_again() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    for drop_it in [false, true] {
        // in al, 0x10; jmp back
        let (vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xe4, 0x10, 0xeb, 0xfc], Irqchip::None);
        assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
        if drop_it {
            drop(vm);
        } else {
            vm.close().unwrap();
        }
        let closed = Error::WrongState(Step::Drained);
        assert_eq!(vcpu.vcpu_run(), Err(closed));
        assert_eq!(vcpu.vcpu_reset(false), Err(closed));
        vcpu.vcpu_free().unwrap();
    }
}

#[test]
fn a_vcpu_of_the_bare_descriptor_reaches_no_memory_after_the_vm() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(1);
    // At the reset vector: out 0x10, al; hlt
    memory.write(0xff0, &[0xe6, 0x10, 0xf4]);
    for lives in [true, false] {
        let vm = common::vm(&host, 1, Irqchip::None);
        vm.set_memory_slot(&memory.slot(0, 0xffff_f000)).unwrap();
        let mut vcpu = vm.fd().create_vcpu(0).unwrap();
        let vm = lives.then_some(vm);
        let ran = matches!(vcpu.run(), Ok(VcpuExit::IoOut(0x10, _)));
        assert_eq!(ran, lives);
        drop(vm);
    }
}

#[test]
fn a_vcpu_that_runs_while_its_vm_closes_writes_no_memory_afterwards() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    for drop_it in [false, true] {
        // inc byte [0x2000]; jmp back
        let code = [0xfe, 0x06, 0x00, 0x20, 0xeb, 0xfa];
        let (vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
        memory.write(0x2000, &[0]);
        let handle = vcpu.kick_handle();
        let runner =
            std::thread::spawn(
                move || {
                    while vcpu.vcpu_run() != Err(Error::WrongState(Step::Drained)) {}
                },
            );
        while memory.read(0x2000, 1) == [0] {
            std::thread::yield_now();
        }
        if drop_it {
            drop(vm);
        } else {
            vm.close().unwrap();
        }
        let last = memory.read(0, 4 * 4096);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(memory.read(0, 4 * 4096), last);
        handle.kick();
        runner.join().unwrap();
    }
}

#[test]
fn every_slot_that_cannot_be_is_refused_by_name_and_changes_nothing() {
    let Some(host) = common::host() else { return };
    let (memory, other) = (Memory::new(4), Memory::new(4));
    let vm = common::vm(&host, 1, Irqchip::None);
    vm.set_memory_slot(&memory.slot(3, 0x1000)).unwrap();
    let overlap = Err(Error::Invalid(Field::OverlappedSlot, 3));
    for gpa in [0, 0x1000, 0x4000] {
        assert_eq!(vm.set_memory_slot(&other.slot(4, gpa)), overlap, "{gpa:#x}");
    }
    let taken = Err(Error::Exists(Field::Slot, 3));
    assert_eq!(vm.set_memory_slot(&memory.slot(3, 0x2000)), taken);
    assert_eq!(vm.set_memory_slot(&other.slot(3, 0x1000)), taken);
    for gpa in [0x8001, 0x8fff] {
        let refused = Err(Error::Invalid(Field::Gpa, gpa));
        assert_eq!(vm.set_memory_slot(&other.slot(4, gpa)), refused);
    }
    let wraps = Err(Error::Invalid(Field::Size, 0x4000));
    assert_eq!(vm.set_memory_slot(&other.slot(4, !0xfff)), wraps);
    let number = Err(Error::Invalid(Field::Slot, 0x7fff_ffff));
    assert_eq!(vm.set_memory_slot(&other.slot(0x7fff_ffff, 0x8000)), number);
    // Beyond what any processor addresses: the kernel's own answer.
    assert!(vm.set_memory_slot(&other.slot(4, 1 << 60)).is_err());
    // The number was not taken by any of them.
    vm.set_memory_slot(&other.slot(4, 0x8000)).unwrap();
}

#[test]
fn private_memory_backs_a_slot_where_the_host_offers_it() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let vm = common::vm(&host, 1, Irqchip::None);
    for bytes in [0, 1, 0x1001] {
        assert_eq!(
            vm.create_guest_memfd(bytes, 0).map(drop),
            Err(Error::Invalid(Field::Size, bytes))
        );
    }
    let Some(file) = offered(vm.create_guest_memfd(0x4000, 0)) else {
        return;
    };
    // SAFETY: reads the flags of a descriptor that is open.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags, libc::FD_CLOEXEC);
    let with = |fd, offset| MemSlot {
        private: Some(PrivateBacking { fd, offset }),
        ..memory.slot(0, 0)
    };
    // No file, a file that is none of KVM's, and a slot that reaches past the file's end.
    let null = std::fs::File::open("/dev/null").unwrap();
    for (fd, offset) in [(-1, 0), (null.as_raw_fd(), 0), (file.as_raw_fd(), 0x1000)] {
        assert!(vm.set_memory_slot(&with(fd, offset)).is_err());
    }
    let private = file.as_raw_fd();
    vm.set_memory_slot(&with(private, 0)).unwrap();
    // The slot keeps the file.
    drop(file);
    assert_eq!(
        vm.set_memory_slot(&memory.slot(0, 0)),
        Err(Error::Exists(Field::Slot, 0))
    );
    vm.delete_memory_slot(&with(private, 0)).unwrap();
}

#[test]
fn slots_come_and_go_while_a_vcpu_runs() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let data = Memory::new(8);
    // jmp $
    let (vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xeb, 0xfe], Irqchip::None);
    let handle = vcpu.kick_handle();
    let runner = std::thread::spawn(move || {
        assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
        vcpu.regs().unwrap().rip
    });
    for round in 0..50 {
        let slot = data.slot(1 + round % 3, 0x10_0000 + u64::from(round) * 0x8000);
        vm.set_memory_slot(&slot).unwrap();
        vm.delete_memory_slot(&slot).unwrap();
    }
    handle.kick();
    assert_eq!(runner.join().unwrap(), CODE);
}
