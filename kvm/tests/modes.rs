//! Guests in real, protected and long mode run, and their exits come with all their data.

mod common;

use common::{CODE, Memory, change_sregs, expect_out, real_mode_vm};
use kvm_ops_core::{
    CodeSize, DescTable, Events, Exception, Exit, Gpa, Irqchip, Segment, Sregs, VcpuId, VcpuOps,
    VmPort,
};

#[test]
fn a_real_mode_guest_adds_writes_a_port_and_halts() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // mov dx, 0x3f8; add al, bl; add al, '0'; out dx, al; hlt
    let code = [0xba, 0xf8, 0x03, 0x00, 0xd8, 0x04, b'0', 0xee, 0xf4];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let mut regs = vcpu.regs().unwrap();
    (regs.rax, regs.rbx) = (2, 3);
    vcpu.set_regs(&regs).unwrap();

    expect_out(&mut vcpu, 0x3f8, b"5");
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rip, CODE + code.len() as u64);
}

#[test]
fn port_reads_reach_the_guest_in_every_width() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // in al, 0x10; in ax, 0x11; in eax, 0x12; hlt
    let code = [0xe4, 0x10, 0xe5, 0x11, 0x66, 0xe5, 0x12, 0xf4];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    for (port, size) in [(0x10, 1), (0x11, 2), (0x12, 4)] {
        let expected = Exit::IoIn {
            port,
            size,
            count: 1,
        };
        assert_eq!(vcpu.vcpu_run().unwrap(), expected);
        assert_eq!(vcpu.exit_data().len(), usize::from(size));
        vcpu.exit_data().fill(0xa0 + size);
    }
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rax, 0xa4a4_a4a4);
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
            Exit::IoOut { port, size, count } => {
                assert_eq!((port, size), (0x80, 2));
                assert_eq!(vcpu.exit_data().len(), 2 * count as usize);
                all.extend_from_slice(vcpu.exit_data());
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
    let (gpa, len) = (Gpa::new(0x20010), 2);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::MmioRead { gpa, len });
    vcpu.exit_data().copy_from_slice(&[0x34, 0x12]);
    let (gpa, len) = (Gpa::new(0x20020), 2);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::MmioWrite { gpa, len });
    assert_eq!(vcpu.exit_data(), [0x34, 0x12]);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.exit_data(), [0; 0]);
}

/// Flat 4 GiB segments: 32-bit code, or 64-bit code.
fn flat(sregs: &mut Sregs, long: bool) {
    let data = Segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        kind: 3,
        present: true,
        db: true,
        s: true,
        g: true,
        ..Segment::default()
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cs = Segment {
        selector: 0x8,
        kind: 11,
        db: !long,
        l: long,
        ..data
    };
}

#[test]
fn a_protected_mode_guest_reaches_memory_beyond_real_mode() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // mov eax, [0xfee01000]; inc eax; out 0x10, eax; hlt
    let code = [0xa1, 0x00, 0x10, 0xe0, 0xfe, 0x40, 0xe7, 0x10, 0xf4];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    change_sregs(&mut vcpu, |sregs| {
        sregs.cr0 |= 1;
        flat(sregs, false);
    });
    assert_eq!(vcpu.sregs().unwrap().code_size(), CodeSize::Bits32);
    let (gpa, len) = (Gpa::new(0xfee0_1000), 4);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::MmioRead { gpa, len });
    vcpu.exit_data()
        .copy_from_slice(&0x1234_5677_u32.to_le_bytes());
    expect_out(&mut vcpu, 0x10, &0x1234_5678_u32.to_le_bytes());
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
}

#[test]
fn a_long_mode_guest_runs_on_its_own_page_tables() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // mov rax, 0x1122334455667788; mov [0x200000], rax; mov rbx, [0x200008]; hlt
    let code = [
        0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, //
        0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, //
        0x48, 0x8b, 0x1c, 0x25, 0x08, 0x00, 0x20, 0x00, 0xf4,
    ];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    // One table of each level; two pages of 2 MiB, of which the second has no memory behind it.
    let tables: [(usize, u64); 4] = [
        (0x2000, 0x3003),
        (0x3000, 0x4003),
        (0x4000, 0x83),
        (0x4008, 0x20_0083),
    ];
    for (at, entry) in tables {
        memory.write(at, &entry.to_le_bytes());
    }
    change_sregs(&mut vcpu, |sregs| {
        sregs.cr3 = 0x2000;
        sregs.cr4 = 1 << 5;
        sregs.efer = 1 << 8;
        sregs.cr0 = 1 << 31 | 1 << 4 | 1;
        flat(sregs, true);
    });
    let sregs = vcpu.sregs().unwrap();
    assert_eq!(sregs.efer & 0x500, 0x500, "LMA follows LME and PG");
    assert_eq!(sregs.code_size(), CodeSize::Bits64);

    let (gpa, len) = (Gpa::new(0x20_0000), 8);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::MmioWrite { gpa, len });
    let written = 0x1122_3344_5566_7788_u64.to_le_bytes();
    assert_eq!(vcpu.exit_data(), written);
    let (gpa, len) = (Gpa::new(0x20_0008), 8);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::MmioRead { gpa, len });
    vcpu.exit_data()
        .copy_from_slice(&0x8877_6655_4433_2211_u64.to_le_bytes());
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rbx, 0x8877_6655_4433_2211);

    // Paging off leaves long mode, by the same rule.
    change_sregs(&mut vcpu, |sregs| {
        sregs.cs.l = false;
        sregs.cr0 = 1 << 4 | 1;
    });
    assert_eq!(vcpu.sregs().unwrap().efer & 0x500, 0x100);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // An exception, with an interrupt table of no length.
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xf4], Irqchip::None);
    change_sregs(&mut vcpu, |sregs| {
        sregs.cr0 = 0x11;
        sregs.idt = DescTable { base: 0, limit: 0 };
        flat(sregs, false);
    });
    let events = Events::default().with_exception(Exception::new(6, None));
    vcpu.set_events(&events.unwrap()).unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Shutdown);
}

#[test]
fn vcpus_of_one_vm_run_on_threads_of_their_own() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // out 0x10, al; hlt
    memory.write(CODE as usize, &[0xe6, 0x10, 0xf4]);
    let vm = common::vm(&host, 8, Irqchip::None);
    vm.set_memory_slot(&memory.slot(0, 0)).unwrap();
    let runners: Vec<_> = (0..8)
        .map(|id| {
            let mut vcpu = vm.create_vcpu(VcpuId(id)).unwrap();
            common::real_mode(&mut vcpu);
            let mut regs = vcpu.regs().unwrap();
            regs.rax = 100 + u64::from(id);
            vcpu.set_regs(&regs).unwrap();
            std::thread::spawn(move || {
                assert_eq!(vcpu.id(), VcpuId(id));
                expect_out(&mut vcpu, 0x10, &[100 + id as u8]);
                assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
            })
        })
        .collect();
    for runner in runners {
        runner.join().unwrap();
    }
}
