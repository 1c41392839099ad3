//! Guests in real, protected and long mode run, and their exits come with all their data.

mod common;

use common::{CODE, Memory, real_mode_vm, run};
use kvm_ops_core::{Exit, Gpa, Irqchip, VcpuOps};

#[test]
fn a_real_mode_guest_adds_writes_a_port_and_halts() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // mov dx, 0x3f8; add al, bl; add al, '0'; out dx, al; hlt
    let code = [0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, b'0', 0xee, 0xf4];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.rbx) = (2, 3);
    vcpu.set_regs(&regs).unwrap();

    let exit = vcpu.vcpu_run().unwrap();
    let out = Exit::IoOut {
        port: 0x3f8,
        size: 1,
        data: b"5",
    };
    assert_eq!(exit, out);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.get_regs().unwrap().rip, CODE + code.len() as u64);
}

#[test]
fn port_reads_reach_the_guest_in_every_width() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // in al, 0x10; in ax, 0x11; in eax, 0x12; hlt
    let code = [0xe4, 0x10, 0xe5, 0x11, 0x66, 0xe5, 0x12, 0xf4];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    for (expected_port, expected_size) in [(0x10, 1), (0x11, 2), (0x12, 4)] {
        match vcpu.vcpu_run().unwrap() {
            Exit::IoIn { port, size, data } => {
                assert_eq!((port, size), (expected_port, expected_size));
                assert_eq!(data.len(), usize::from(size));
                data.fill(0xa0 + size);
            }
            exit => panic!("{exit:?}"),
        }
    }
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.get_regs().unwrap().rax, 0xa4a4_a4a4);
}

#[test]
fn string_output_comes_with_all_its_items() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // cld; mov si, 0x2000; mov cx, 3; mov dx, 0x80; rep outsw; hlt
    let code = [
        0xfc, 0xbe, 0x00, 0x20, 0xb9, 0x03, 0x00, 0xba, 0x80, 0x00, 0xf3, 0x6f, 0xf4,
    ];
    memory.write(0x2000, &[1, 2, 3, 4, 5, 6]);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    // KVM may hand the items out together or one by one.
    let mut all = Vec::new();
    loop {
        match vcpu.vcpu_run().unwrap() {
            Exit::IoOut { port, size, data } => {
                assert_eq!((port, size, data.len() % 2), (0x80, 2, 0));
                all.extend_from_slice(data);
            }
            Exit::Hlt => break,
            exit => panic!("{exit:?}"),
        }
    }
    assert_eq!(all, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn memory_that_no_slot_backs_leaves_as_mmio() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // mov ax, 0x2000; mov ds, ax; mov ax, [0x10]; mov [0x20], ax; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xa1, 0x10, 0x00, 0xa3, 0x20, 0x00, 0xf4,
    ];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    match vcpu.vcpu_run().unwrap() {
        Exit::MmioRead { gpa, data } => {
            assert_eq!((gpa, data.len()), (Gpa::new(0x20010), 2));
            data.copy_from_slice(&[0x34, 0x12]);
        }
        exit => panic!("{exit:?}"),
    }
    let write = Exit::MmioWrite {
        gpa: Gpa::new(0x20020),
        data: &[0x34, 0x12],
    };
    assert_eq!(vcpu.vcpu_run().unwrap(), write);
    assert_eq!(run(&mut vcpu), "Hlt");
}
