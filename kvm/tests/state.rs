//! What is written to a vCPU is read back, and what it cannot have is refused by name.

mod common;

use common::{Memory, offered, real_mode_vm};
use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN,
    kvm_enable_cap,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};
use kvm_ops_core::{
    CpuidEntry, DescTable, Error, Exit, Field, Irqchip, Regs, Segment, SegmentName, VcpuId,
    VcpuOps, VmPort,
};
use kvm_ops_kvm::{KvmVcpu, KvmVm};

/// A VM and its vCPU in real mode at `code`; `None` where there is no host.
fn guest(memory: &Memory, code: &[u8]) -> Option<(KvmVm, KvmVcpu)> {
    let host = common::host()?;
    Some(real_mode_vm(&host, memory, code, Irqchip::None))
}

#[test]
fn general_registers_round_trip() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    let regs = Regs {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rsp: 7,
        rbp: 8,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: u64::MAX,
        rip: 0x1234,
        rflags: 0x202,
    };
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.get_regs().unwrap(), regs);
    assert!(vcpu.get_if_flag().unwrap());
    vcpu.set_rflags(0x2).unwrap();
    assert_eq!((vcpu.get_rflags(), vcpu.get_if_flag()), (Ok(2), Ok(false)));
}

#[test]
fn segments_and_descriptor_tables_round_trip() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    for (i, name) in [
        SegmentName::Ds,
        SegmentName::Es,
        SegmentName::Fs,
        SegmentName::Gs,
    ]
    .into_iter()
    .enumerate()
    {
        let segment = Segment {
            base: 0x1000 * (i as u64 + 1),
            limit: 0xffff,
            selector: 0x100 * (i as u16 + 1),
            kind: 3,
            present: true,
            s: true,
            ..Segment::default()
        };
        vcpu.set_segment(name, &segment).unwrap();
        assert_eq!(vcpu.get_segment(name).unwrap(), segment);
        assert_eq!(vcpu.get_segment_base(name).unwrap(), segment.base);
    }
    let (gdt, idt) = (
        DescTable {
            base: 0x5000,
            limit: 0x27,
        },
        DescTable {
            base: 0x6000,
            limit: 0x3ff,
        },
    );
    vcpu.set_gdt(gdt).unwrap();
    vcpu.set_idt(idt).unwrap();
    assert_eq!((vcpu.get_gdt(), vcpu.get_idt()), (Ok(gdt), Ok(idt)));
    assert_eq!(vcpu.get_cpl(), Ok(0));
}

#[test]
fn control_registers_take_what_the_processor_takes_and_no_more() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    for value in [1 << 31, 1 << 29, 1 << 32] {
        assert_eq!(vcpu.set_cr0(value), Err(Error::Invalid(Field::Cr0, value)));
    }
    for value in [1 << 15, 1 << 31, 1 << 63] {
        assert_eq!(vcpu.set_cr4(value), Err(Error::Invalid(Field::Cr4, value)));
    }
    vcpu.set_cr0(0x11).unwrap();
    assert_eq!(vcpu.fd().get_sregs().unwrap().cr0, 0x11);
    vcpu.set_cr4(1 << 5 | 1 << 9).unwrap();
    assert_eq!(vcpu.fd().get_sregs().unwrap().cr4, 1 << 5 | 1 << 9);
    // Long mode needs paging with PAE: without it the kernel refuses, and the field is named.
    vcpu.set_cr4(0).unwrap();
    vcpu.set_efer(1 << 8).unwrap();
    let paging = 1 << 31 | 0x11;
    assert_eq!(
        vcpu.set_cr0(paging),
        Err(Error::Invalid(Field::Cr0, paging))
    );
    assert_eq!(
        vcpu.set_efer(1 << 63),
        Err(Error::Invalid(Field::Msr, 0xc000_0080))
    );
}

#[test]
fn msrs_round_trip_and_unknown_ones_are_named() {
    let memory = Memory::new(4);
    let Some((vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    // SYSENTER_ESP, STAR, LSTAR, KERNEL_GS_BASE.
    for (msr, value) in [
        // 32 bits on AMD.
        (0x175, 0x8000_1000),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_2000),
        (0xc000_0102, 0x1234_5000),
    ] {
        assert!(vm.has_emulated_msr(msr), "{msr:#x}");
        vcpu.set_msr(msr, value).unwrap();
        assert_eq!(vcpu.get_msr(msr), Ok(value), "{msr:#x}");
    }
    let unknown = 0xdead_beef;
    let refused = Error::Invalid(Field::Msr, unknown.into());
    assert!(!vm.has_emulated_msr(unknown));
    assert_eq!(vcpu.get_msr(unknown), Err(refused));
    assert_eq!(vcpu.set_msr(unknown, 1), Err(refused));
    // A known MSR, and a value that it does not take.
    let efer = 0xc000_0080;
    assert_eq!(
        vcpu.set_msr(efer, 1 << 63),
        Err(Error::Invalid(Field::Msr, efer.into()))
    );
}

#[test]
fn nmi_mask_and_interrupt_shadow_round_trip() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    vcpu.set_rflags(0x202).unwrap();
    assert_eq!(
        (vcpu.get_nmi_mask(), vcpu.nmi_allowed()),
        (Ok(false), Ok(true))
    );
    assert_eq!(vcpu.interrupt_allowed(), Ok(true));
    vcpu.set_nmi_mask(true).unwrap();
    assert_eq!(
        (vcpu.get_nmi_mask(), vcpu.nmi_allowed()),
        (Ok(true), Ok(false))
    );
    vcpu.set_nmi_mask(false).unwrap();
    assert_eq!(vcpu.get_nmi_mask(), Ok(false));
    for shadow in [1, 2] {
        vcpu.set_interrupt_shadow(shadow).unwrap();
        // Some modules keep no more than that there is one.
        assert_ne!(vcpu.get_interrupt_shadow(), Ok(0));
        assert_eq!(vcpu.interrupt_allowed(), Ok(false));
    }
    vcpu.set_interrupt_shadow(0).unwrap();
    assert_eq!(vcpu.get_interrupt_shadow(), Ok(0));
    assert_eq!(
        vcpu.set_interrupt_shadow(4),
        Err(Error::Invalid(Field::Flags, 4))
    );
}

#[test]
fn dr7_round_trips_and_has_32_bits() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    vcpu.set_dr7(0x402).unwrap();
    assert_eq!(vcpu.fd().get_debug_regs().unwrap().dr7, 0x402);
    assert!(vcpu.set_dr7(1 << 32).is_err());
}

#[test]
fn single_steps_are_exits_while_debugging_is_on() {
    let memory = Memory::new(4);
    // nop; nop; int3; hlt
    let Some((_vm, mut vcpu)) = guest(&memory, &[0x90, 0x90, 0xcc, 0xf4]) else {
        return;
    };
    vcpu.set_guest_debug(false, true).unwrap();
    for step in [1, 2] {
        match vcpu.vcpu_run().unwrap() {
            Exit::Debug { rip, exception } => {
                assert_eq!((rip, exception), (common::CODE + step, 1));
            }
            exit => panic!("{exit:?}"),
        }
    }
    vcpu.set_guest_debug(false, false).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = common::CODE + 3;
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
}

#[test]
fn debug_exceptions_of_the_guests_own_are_exits_while_debugging_is_on() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0x90, 0xf4]) else {
        return;
    };
    // The trap flag, as the guest sets it with POPF.
    vcpu.set_rflags(0x102).unwrap();
    vcpu.set_guest_debug(true, false).unwrap();
    if !common::on_vendor_module() {
        return;
    }
    match vcpu.vcpu_run().unwrap() {
        Exit::Debug { rip, exception } => assert_eq!((rip, exception), (common::CODE + 1, 1)),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn breakpoints_are_exits_while_debugging_is_on() {
    let memory = Memory::new(4);
    // nop; int3; hlt
    let Some((_vm, mut vcpu)) = guest(&memory, &[0x90, 0xcc, 0xf4]) else {
        return;
    };
    vcpu.set_guest_debug(true, false).unwrap();
    if !common::on_hardware() {
        return;
    }
    match vcpu.vcpu_run().unwrap() {
        Exit::Debug { rip, exception } => assert_eq!((rip, exception), (common::CODE + 1, 3)),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn the_tsc_takes_an_offset_and_refuses_a_frequency_of_zero() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    const TSC: u32 = 0x10;
    let far = 1 << 60;
    if offered(vcpu.write_tsc_offset(far)).is_some() {
        assert!(vcpu.get_msr(TSC).unwrap() >= far);
    }
    assert_eq!(
        vcpu.write_tsc_multiplier(0),
        Err(Error::Invalid(Field::TscRatio, 0))
    );
    // The frequency that it has is one that it can have.
    let khz = vcpu.fd().get_tsc_khz().unwrap();
    vcpu.write_tsc_multiplier(khz).unwrap();
    assert_eq!(vcpu.fd().get_tsc_khz().unwrap(), khz);
}

#[test]
fn machine_check_banks_are_given_once_cpuid_offers_them() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    const MCG_CAP: u32 = 0x179;
    // 10 banks and MCG_CTL.
    vcpu.setup_mce(1 << 8 | 10).unwrap();
    assert_eq!(vcpu.get_msr(MCG_CAP), Ok(1 << 8 | 10));
    // More banks than there is room for.
    assert!(vcpu.setup_mce(255).is_err());
}

#[test]
fn a_vcpu_starts_with_the_hosts_cpuid_and_takes_another_before_it_runs() {
    let memory = Memory::new(4);
    // xor eax, eax; cpuid; hlt
    let Some((vm, mut vcpu)) = guest(&memory, &[0x66, 0x31, 0xc0, 0x0f, 0xa2, 0xf4]) else {
        return;
    };
    let start = vcpu.cpuid().unwrap();
    let supported = vm.host().supported_cpuid().as_slice().len();
    assert_eq!(start.len(), supported);
    let other = [CpuidEntry {
        leaf: 0,
        regs: [0, 0x1111, 0x2222, 0x3333],
        ..CpuidEntry::default()
    }];
    vcpu.set_cpuid(&other).unwrap();
    assert_eq!(vcpu.cpuid().unwrap(), other);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    let regs = vcpu.get_regs().unwrap();
    assert_eq!((regs.rbx, regs.rcx, regs.rdx), (0x1111, 0x2222, 0x3333));
    assert!(vcpu.set_cpuid(&start).is_err(), "it ran");
}

#[test]
fn each_vcpu_has_its_own_apic_id() {
    let Some(host) = common::host() else { return };
    let vm = common::vm(&host, 3, Irqchip::Full);
    for id in [2, 0, 1] {
        let vcpu = vm.create_vcpu(VcpuId(id)).unwrap();
        let cpuid = vcpu.cpuid().unwrap();
        let leaf1 = cpuid.iter().find(|entry| entry.leaf == 1).unwrap();
        assert_eq!(leaf1.regs[1] >> 24, id);
        assert_ne!(leaf1.regs[2] >> 31, 0, "the hypervisor bit");
    }
}

#[test]
fn msr_accesses_that_are_forwarded_come_as_exits() {
    let memory = Memory::new(4);
    // mov ecx, 0x12345; rdmsr; wrmsr; rdmsr (faults)
    let code = [
        0x66, 0xb9, 0x45, 0x23, 0x01, 0x00, 0x0f, 0x32, 0x0f, 0x30, 0x0f, 0x32,
    ];
    let Some((vm, mut vcpu)) = guest(&memory, &code) else {
        return;
    };
    // #GP (vector 13) lands on a HLT.
    memory.write(13 * 4, &[0x00, 0x30, 0x00, 0x00]);
    memory.write(0x3000, &[0xf4]);
    let request = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [
            u64::from(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER),
            0,
            0,
            0,
        ],
        ..Default::default()
    };
    if vm.fd().enable_cap(&request).is_err() {
        println!("skipped: no KVM_CAP_X86_USER_SPACE_MSR");
        return;
    }
    let deny = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: 0x12345,
        msr_count: 1,
        bitmap: &[0],
    };
    vm.fd()
        .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[deny])
        .unwrap();
    match vcpu.vcpu_run().unwrap() {
        Exit::ReadMsr { index, value, .. } => {
            assert_eq!(index, 0x12345);
            *value = 0x1_0000_0002;
        }
        exit => panic!("{exit:?}"),
    }
    match vcpu.vcpu_run().unwrap() {
        Exit::WriteMsr { index, value, .. } => {
            assert_eq!((index, value), (0x12345, 0x1_0000_0002));
        }
        exit => panic!("{exit:?}"),
    }
    match vcpu.vcpu_run().unwrap() {
        Exit::ReadMsr { error, .. } => *error = 1,
        exit => panic!("{exit:?}"),
    }
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.get_regs().unwrap().rip, 0x3001);
}
