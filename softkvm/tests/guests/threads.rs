//! vCPUs in threads, signals, and slots that change under them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_ops_uapi::run::exit_reason;
use kvm_ops_uapi::{Errno, ioctl};

use crate::guest::Guest;

#[test]
fn a_signal_ends_a_run_that_would_never_end() {
    // jmp to itself
    let guest = Guest::new(&[0xeb, 0xfe]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            guest.host.task.set_signal(true);
        });
        let answer = guest.run_vcpu(guest.vcpu);
        assert_eq!(answer.unwrap_err().errno(), Errno::EINTR);
        assert_eq!(guest.reason(guest.vcpu), exit_reason::INTR);
    });
}

#[test]
fn two_vcpus_in_two_threads_share_memory() {
    // First: again: cmp byte [0x5000], 1; jne again; mov byte [0x5001], 2; hlt
    let guest = Guest::new(&[
        0x80, 0x3e, 0x00, 0x50, 0x01, 0x75, 0xf9, 0xc6, 0x06, 0x01, 0x50, 0x02, 0xf4,
    ]);
    // Second: mov byte [0x5000], 1; again: cmp byte [0x5001], 2; jne again; hlt
    guest.write(
        0x3000,
        &[
            0xc6, 0x06, 0x00, 0x50, 0x01, 0x80, 0x3e, 0x01, 0x50, 0x02, 0x75, 0xf9, 0xf4,
        ],
    );
    let second = guest.add_vcpu(1, 0x3000);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| guest.run());
        assert_eq!(guest.run_vcpu(second), Ok(exit_reason::HLT));
        assert_eq!(first.join().unwrap(), exit_reason::HLT);
    });
    assert_eq!(guest.read(0x5000), [1, 2]);
}

/// set_memory_region_test: slots are deleted and made again while a vCPU uses them.
#[test]
fn slots_change_under_a_vcpu_that_uses_them() {
    // mov ax, 0x2000; mov ds, ax; again: mov al, [0]; cmp al, 7; jne again; hlt
    let guest = Guest::new(&[
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa0, 0x00, 0x00, 0x3c, 0x07, 0x75, 0xf9, 0xf4,
    ]);
    let more = guest.host.map(4096);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Each exit is one to memory that is gone for now, whose value is zero.
            while guest.run() == exit_reason::MMIO {}
            ended.store(true, Ordering::Release);
        });
        for _ in 0..50 {
            guest.slot(1, 0x2_0000, more, 4096).unwrap();
            guest.slot(1, 0x2_0000, more, 0).unwrap();
        }
        assert!(!ended.load(Ordering::Acquire));
        kvm_ops_softkvm::Process::write(&guest.host, more, &[7]).unwrap();
        guest.slot(1, 0x2_0000, more, 4096).unwrap();
    });
    assert!(ended.load(Ordering::Acquire));
}

#[test]
fn registers_are_read_by_another_thread_when_the_run_is_over() {
    // out 0x80, al; jmp to itself
    let guest = Guest::new(&[0xe6, 0x80, 0xeb, 0xfe]);
    guest.run_to_port();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| guest.run_vcpu(guest.vcpu));
        std::thread::sleep(Duration::from_millis(20));
        let reader = scope.spawn(|| guest.regs());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!reader.is_finished(), "the vCPU is running");
        guest.host.task.set_signal(true);
        assert!(run.join().unwrap().is_err());
        assert_eq!(reader.join().unwrap().rip.get(), 0x1002);
    });
    guest
        .ioctl(guest.vm, ioctl::KVM_CHECK_EXTENSION, 3)
        .unwrap();
}
