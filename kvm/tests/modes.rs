//! Guests in real, protected and long mode run, and their exits come with all their data.

mod common;

use common::{CODE, Memory, real_mode_vm, run};
use kvm_ops_core::{
    DescTable, Exception, Exit, Gpa, Irqchip, Segment, SegmentName, VcpuId, VcpuOps, VmPort,
};
use kvm_ops_kvm::KvmVcpu;

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

/// Flat 4 GiB segments: 32-bit code, or 64-bit code.
fn flat(vcpu: &mut KvmVcpu, long: bool) {
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
    for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Ss] {
        vcpu.set_segment(name, &data).unwrap();
    }
    let code = Segment {
        selector: 0x8,
        kind: 11,
        db: !long,
        l: long,
        ..data
    };
    vcpu.set_segment(SegmentName::Cs, &code).unwrap();
}

#[test]
fn a_protected_mode_guest_reaches_memory_beyond_real_mode() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // mov eax, [0xfee01000]; inc eax; out 0x10, eax; hlt
    let code = [0xa1, 0x00, 0x10, 0xe0, 0xfe, 0x40, 0xe7, 0x10, 0xf4];
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &code, Irqchip::None);
    let cr0 = vcpu.fd().get_sregs().unwrap().cr0;
    vcpu.set_cr0(cr0 | 1).unwrap();
    flat(&mut vcpu, false);
    assert_eq!(vcpu.get_cs_db_l_bits().unwrap(), (true, false));
    match vcpu.vcpu_run().unwrap() {
        Exit::MmioRead { gpa, data } => {
            assert_eq!((gpa, data.len()), (Gpa::new(0xfee0_1000), 4));
            data.copy_from_slice(&0x1234_5677_u32.to_le_bytes());
        }
        exit => panic!("{exit:?}"),
    }
    let out = Exit::IoOut {
        port: 0x10,
        size: 4,
        data: &0x1234_5678_u32.to_le_bytes(),
    };
    assert_eq!(vcpu.vcpu_run().unwrap(), out);
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
    let mut sregs = vcpu.fd().get_sregs().unwrap();
    sregs.cr3 = 0x2000;
    vcpu.fd().set_sregs(&sregs).unwrap();
    vcpu.set_cr4(1 << 5).unwrap();
    vcpu.set_efer(1 << 8).unwrap();
    vcpu.set_cr0(1 << 31 | 1 << 4 | 1).unwrap();
    let efer = vcpu.fd().get_sregs().unwrap().efer;
    assert_eq!(efer & 0x500, 0x500, "LMA follows LME and PG");
    flat(&mut vcpu, true);
    assert_eq!(vcpu.get_cs_db_l_bits().unwrap(), (false, true));

    let write = Exit::MmioWrite {
        gpa: Gpa::new(0x20_0000),
        data: &0x1122_3344_5566_7788_u64.to_le_bytes(),
    };
    assert_eq!(vcpu.vcpu_run().unwrap(), write);
    match vcpu.vcpu_run().unwrap() {
        Exit::MmioRead { gpa, data } => {
            assert_eq!(gpa, Gpa::new(0x20_0008));
            data.copy_from_slice(&0x8877_6655_4433_2211_u64.to_le_bytes());
        }
        exit => panic!("{exit:?}"),
    }
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.get_regs().unwrap().rbx, 0x8877_6655_4433_2211);

    // Paging off leaves long mode, by the same rule.
    let leave = vcpu.set_segment(
        SegmentName::Cs,
        &Segment {
            l: false,
            ..vcpu.get_segment(SegmentName::Cs).unwrap()
        },
    );
    leave.unwrap();
    vcpu.set_cr0(1 << 4 | 1).unwrap();
    assert_eq!(vcpu.fd().get_sregs().unwrap().efer & 0x500, 0x100);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    // An exception, with an interrupt table of no length.
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xf4], Irqchip::None);
    vcpu.set_cr0(0x11).unwrap();
    flat(&mut vcpu, false);
    vcpu.set_idt(DescTable { base: 0, limit: 0 }).unwrap();
    let exception = Exception {
        vector: 6,
        error: None,
    };
    vcpu.inject_exception(exception).unwrap();
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
            let mut regs = vcpu.get_regs().unwrap();
            regs.rax = 100 + u64::from(id);
            vcpu.set_regs(&regs).unwrap();
            std::thread::spawn(move || {
                assert_eq!(vcpu.id(), VcpuId(id));
                match vcpu.vcpu_run().unwrap() {
                    Exit::IoOut { data, .. } => assert_eq!(data, [100 + id as u8]),
                    exit => panic!("{exit:?}"),
                }
                assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
            })
        })
        .collect();
    for runner in runners {
        runner.join().unwrap();
    }
}
