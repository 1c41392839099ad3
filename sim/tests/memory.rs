//! Guest memory on the software platform: slots, faults, MMIO, dirty logs.

#[allow(dead_code)] // Each test file uses its part.
mod common;

use common::{Ram, vcpu, vm};
use kvm_ops_core::guest::{Action, FnProgram, GuestProgram, Outcome, Script};
use kvm_ops_core::{
    Error, Exit, Field, Gpa, MemSlot, SlotFlags, SlotId, Step, VcpuId, VcpuOps, VmPort,
};

const MIB: usize = 1 << 20;

#[test]
fn what_a_guest_writes_is_in_the_hosts_memory_and_read_back_across_pages() {
    let ram = Ram::new(4 * 4096);
    let (_host, vm) = vm();
    vm.set_memory_slot(&ram.slot(0, 0x10_0000)).unwrap();
    let data: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    let mut cpu = vcpu(&vm, Script::new().write(Gpa::new(0x10_0800), &data));
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(ram.read(0x800, 4096), data);
    assert_eq!(vm.table_stats().pages_4k, 2);
    assert_eq!(vm.table_stats().violations, 2);
}

/// Reads once and keeps what it read.
struct Reader(Gpa, usize, std::sync::mpsc::Sender<Vec<u8>>);

impl GuestProgram for Reader {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        match last {
            Outcome::Start { .. } => Action::Read {
                gpa: self.0,
                len: self.1,
            },
            Outcome::Data(data) => {
                self.2.send(data.to_vec()).unwrap();
                Action::Shutdown
            }
            _ => Action::Shutdown,
        }
    }
}

#[test]
fn an_access_that_runs_out_of_a_slot_leaves_as_mmio_in_pieces_of_eight() {
    let ram = Ram::new(4096);
    let (_host, vm) = vm();
    vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
    let (sender, read) = std::sync::mpsc::channel();
    let mut cpu = vcpu(&vm, Reader(Gpa::new(4096 - 4), 4 + 8 + 3, sender));
    let mut pieces = Vec::new();
    loop {
        match cpu.vcpu_run().unwrap() {
            Exit::MmioRead { gpa, len } => {
                pieces.push((gpa.get(), len));
                cpu.exit_data().fill(pieces.len() as u8);
            }
            Exit::Shutdown => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(pieces, [(0x1000, 8), (0x1008, 3)]);
    assert_eq!(
        read.recv().unwrap(),
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    );
}

#[test]
fn a_write_to_a_read_only_slot_leaves_as_mmio_and_changes_nothing() {
    let ram = Ram::new(2 * MIB);
    let (_host, vm) = vm();
    let mut slot = ram.slot(0, 0);
    slot.flags = SlotFlags {
        read_only: true,
        log_dirty: false,
    };
    vm.set_memory_slot(&slot).unwrap();
    let program = Script::new()
        .read(Gpa::new(0x2000), 4)
        .write(Gpa::new(0x2000), &[1, 2, 3]);
    let mut cpu = vcpu(&vm, program);
    let (gpa, len) = (Gpa::new(0x2000), 3);
    assert_eq!(cpu.vcpu_run(), Ok(Exit::MmioWrite { gpa, len }));
    assert_eq!(cpu.exit_data(), [1, 2, 3]);
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(ram.read(0x2000, 4), [0; 4]);
}

#[test]
fn a_dirty_log_names_exactly_the_written_pages_and_starts_anew() {
    let ram = Ram::new(130 * 4096);
    let (_host, vm) = vm();
    let mut slot = ram.slot(3, 0);
    slot.flags.log_dirty = true;
    vm.set_memory_slot(&slot).unwrap();
    let at = |page: u64| Gpa::new(page * 4096 + 4095);
    let program = Script::new()
        .read(at(1), 1)
        .write(at(0), &[1])
        .write(at(63), &[1, 1]) // runs into page 64
        .write(at(129), &[1])
        .output(0x80, &[0])
        .write(at(129), &[2])
        .read(at(5), 1);
    let mut cpu = vcpu(&vm, program);
    let mut log = [0; 3];
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoOut { .. })));
    vm.dirty_log(&slot, &mut log).unwrap();
    assert_eq!(log, [1 | 1 << 63, 1, 2]);
    assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown));
    vm.dirty_log(&slot, &mut log).unwrap();
    assert_eq!(log, [0, 0, 2]);
    vm.dirty_log(&slot, &mut log).unwrap();
    assert_eq!(log, [0; 3]);

    let short = vm.dirty_log(&slot, &mut [0; 2]);
    assert_eq!(short, Err(Error::Invalid(Field::BufferLength, 2)));
    let other = kvm_ops_core::MemSlot {
        id: SlotId(4),
        ..slot
    };
    assert_eq!(
        vm.dirty_log(&other, &mut log),
        Err(Error::NotFound(Field::Slot, 4))
    );
}

#[test]
fn a_deleted_slot_is_gone_for_the_guest_and_its_tables_are_freed() {
    let ram = Ram::new(4 * MIB);
    let (_host, vm) = vm();
    let slot = ram.slot(0, 0x4000_0000);
    vm.set_memory_slot(&slot).unwrap();
    let program = Script::new()
        .write(Gpa::new(0x4000_0000), &[1])
        .output(0x80, &[0])
        .write(Gpa::new(0x4000_0000), &[2]);
    let mut cpu = vcpu(&vm, program);
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoOut { .. })));
    assert!(vm.table_stats().tables > 1);
    vm.delete_memory_slot(&slot).unwrap();
    assert_eq!(vm.table_stats().tables, 1);
    assert_eq!(vm.table_stats().pages_4k + vm.table_stats().pages_2m, 0);
    assert!(matches!(cpu.vcpu_run(), Ok(Exit::MmioWrite { .. })));
    assert_eq!(
        vm.delete_memory_slot(&slot),
        Err(Error::NotFound(Field::Slot, 0))
    );
}

#[test]
fn a_slot_is_deleted_changed_and_read_only_by_what_was_set() {
    let (ram, other) = (Ram::new(8 * 4096), Ram::new(8 * 4096));
    let (_host, vm) = vm();
    let slot = MemSlot {
        flags: SlotFlags {
            log_dirty: true,
            ..SlotFlags::default()
        },
        ..ram.slot(0, 0x1000)
    };
    vm.set_memory_slot(&slot).unwrap();
    let none = Err(Error::NotFound(Field::Slot, 0));
    // The number of the slot, and another place or memory.
    for forged in [ram.slot(0, 0), other.slot(0, 0x1000)] {
        assert_eq!(vm.delete_memory_slot(&forged), none);
        assert_eq!(vm.dirty_log(&forged, &mut [0]), none);
        let taken = Err(Error::Exists(Field::Slot, 0));
        assert_eq!(vm.set_memory_slot(&forged), taken);
    }
    vm.delete_memory_slot(&ram.slot(0, 0x1000)).unwrap();
}

#[test]
fn a_vcpu_that_outlives_its_vm_never_touches_the_memory_again() {
    for drop_it in [false, true] {
        let ram = Ram::new(4096);
        let (_host, vm) = vm();
        vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
        let script = Script::new().write(Gpa::new(0), &[1]).output(1, &[0]);
        let mut cpu = vcpu(&vm, script.write(Gpa::new(0), &[2]));
        assert!(matches!(cpu.vcpu_run(), Ok(Exit::IoOut { .. })));
        if drop_it {
            drop(vm);
        } else {
            vm.close().unwrap();
        }
        // The contract of `HostRange` ends with the VM, so the memory may go.
        drop(ram);
        for _ in 0..2 {
            assert_eq!(cpu.vcpu_run(), Err(Error::WrongState(Step::Drained)));
        }
    }
}

#[test]
fn closing_a_vm_ends_the_runs_of_its_vcpus() {
    let ram = Ram::new(4096);
    let (_host, vm) = common::vm_with(kvm_ops_core::Irqchip::Full, 2);
    vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
    let closed = Err(Error::WrongState(Step::Drained));
    // One writes for ever, one sleeps for ever.
    let mut writes = vcpu(
        &vm,
        FnProgram(|_: Outcome<'_>| Action::Write {
            gpa: Gpa::new(0),
            data: &[1],
        }),
    );
    let mut sleeps = vm.create_vcpu(VcpuId(1)).unwrap();
    common::load(&mut sleeps, Script::new().halt());
    std::thread::scope(|scope| {
        scope.spawn(move || while writes.vcpu_run() != closed {});
        scope.spawn(move || while sleeps.vcpu_run() != closed {});
        while ram.read(0, 1) == [0] {
            std::thread::yield_now();
        }
        vm.close().unwrap();
        drop(ram);
    });
}

#[test]
fn overlapping_slots_and_slots_beyond_the_address_width_are_refused_by_name() {
    let ram = Ram::new(8 * 4096);
    let (_host, vm) = vm();
    vm.set_memory_slot(&ram.slot(7, 0x4000)).unwrap();
    for gpa in [0, 0x3000, 0x4000, 0xb000] {
        let refused = vm.set_memory_slot(&ram.slot(8, gpa));
        let overlap = gpa + 8 * 4096 > 0x4000 && gpa < 0xc000;
        assert_eq!(
            refused.err(),
            overlap.then_some(Error::Invalid(Field::OverlappedSlot, 7))
        );
    }
    let far = vm.set_memory_slot(&ram.slot(9, 1 << 48));
    assert_eq!(
        far,
        Err(Error::Invalid(Field::Gpa, (1 << 48) + 8 * 4096 - 1))
    );
}

#[test]
fn many_vcpus_write_their_own_pages_while_slots_come_and_go() {
    let (low, high) = (Ram::new(8 * MIB), Ram::new(2 * MIB));
    let (_host, vm) = common::vm_with(kvm_ops_core::Irqchip::None, 4);
    vm.set_memory_slot(&low.slot(0, 0)).unwrap();
    std::thread::scope(|scope| {
        for id in 0..4u32 {
            let mut program = Script::new();
            for page in 0..256u64 {
                let gpa = Gpa::new((page * 4 + u64::from(id)) * 4096);
                program = program.write(gpa, &(page + u64::from(id) * 1000).to_le_bytes());
            }
            let mut cpu = vm.create_vcpu(VcpuId(id)).unwrap();
            common::load(&mut cpu, program);
            scope.spawn(move || assert_eq!(cpu.vcpu_run(), Ok(Exit::Shutdown)));
        }
        for _ in 0..200 {
            let slot = high.slot(1, 0x8000_0000);
            vm.set_memory_slot(&slot).unwrap();
            vm.delete_memory_slot(&slot).unwrap();
        }
    });
    for id in 0..4u64 {
        for page in 0..256u64 {
            let at = (page * 4 + id) as usize * 4096;
            assert_eq!(low.read(at, 8), (page + id * 1000).to_le_bytes());
        }
    }
}
