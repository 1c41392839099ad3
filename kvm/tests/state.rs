//! State that is written to a vCPU is read back, and impossible values are refused by name.

mod common;

use common::{Memory, offered, real_mode_vm};
use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN,
    kvm_enable_cap,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};
use kvm_ops_core::{
    Answer, CpuidEntry, DebugRegs, DescTable, Error, Events, Exit, ExitKind, Field, GuestDebug,
    InterruptShadow, Irqchip, MpState, Msr, Regs, Segment, SegmentName, Sregs, VcpuId, VcpuOps,
    VmPort, Xcrs, Xsave,
};
use kvm_ops_kvm::{KvmVcpu, KvmVm};

const DEBUG: GuestDebug = GuestDebug {
    enabled: true,
    single_step: false,
    hardware: None,
};
const SINGLE_STEP: GuestDebug = GuestDebug {
    enabled: false,
    single_step: true,
    hardware: None,
};

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
    let mut regs = Regs {
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
    for interrupts_enabled in [true, false] {
        vcpu.set_regs(&regs).unwrap();
        assert_eq!(vcpu.regs(), Ok(regs));
        assert_eq!(regs.interrupts_enabled(), interrupts_enabled);
        regs.rflags = 0x2;
    }
}

#[test]
fn segments_tables_and_control_registers_round_trip() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    let mut sregs = vcpu.sregs().unwrap();
    let names = [
        SegmentName::Ds,
        SegmentName::Es,
        SegmentName::Fs,
        SegmentName::Gs,
    ];
    for (i, name) in (1..).zip(names) {
        *sregs.segment_mut(name) = Segment {
            base: 0x1000 * u64::from(i),
            limit: 0xffff,
            selector: 0x100 * i,
            kind: 3,
            present: true,
            s: true,
            ..Segment::default()
        };
    }
    let table = |base, limit| DescTable { base, limit };
    (sregs.gdt, sregs.idt) = (table(0x5000, 0x27), table(0x6000, 0x3ff));
    (sregs.cr0, sregs.cr2, sregs.cr3) = (0x11, 0x7000, 0x8000);
    sregs.cr4 = 1 << 5 | 1 << 9;
    vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(vcpu.sregs(), Ok(sregs));
    assert_eq!(sregs.cpl(), 0);
}

#[test]
fn control_registers_take_what_the_processor_takes_and_no_more() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    let before = vcpu.sregs().unwrap();
    let mut refused = |change: &dyn Fn(&mut Sregs)| {
        let mut sregs = before;
        change(&mut sregs);
        vcpu.set_sregs(&sregs).unwrap_err()
    };
    for cr0 in [1 << 31, 1 << 29, 1 << 32] {
        let error = refused(&|sregs| sregs.cr0 = cr0);
        assert_eq!(error, Error::Invalid(Field::Cr0, cr0));
    }
    for cr4 in [1 << 15, 1 << 31, 1 << 63] {
        let error = refused(&|sregs| sregs.cr4 = cr4);
        assert_eq!(error, Error::Invalid(Field::Cr4, cr4));
    }
    for bit in [1, 9, 16, 19, 22, 63] {
        let error = refused(&|sregs| sregs.efer = 1 << bit);
        assert_eq!(error, Error::Invalid(Field::Msr, 0xc000_0080));
    }
    // Paging in long mode needs PAE.
    let error = refused(&|sregs| {
        sregs.efer = 1 << 8;
        sregs.cr0 = 1 << 31 | 0x11;
        sregs.cr4 = 0x10;
    });
    assert_eq!(error, Error::Invalid(Field::Cr4, 0x10));
    assert_eq!(vcpu.sregs(), Ok(before), "nothing was written");
}

#[test]
fn msrs_round_trip_and_unknown_ones_are_named() {
    let memory = Memory::new(4);
    let Some((vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    // SYSENTER_ESP (32 bits on AMD), STAR, LSTAR, KERNEL_GS_BASE.
    let values = [
        Msr::write(0x175, 0x8000_1000),
        Msr::write(0xc000_0081, 0x0023_0010_0000_0000),
        Msr::write(0xc000_0082, 0xffff_8000_0000_2000),
        Msr::write(0xc000_0102, 0x1234_5000),
    ];
    let mut read = values.map(|msr| Msr::read(msr.index));
    assert!(values.iter().all(|msr| vm.has_emulated_msr(msr.index)));
    vcpu.set_msrs(&values).unwrap();
    vcpu.msrs(&mut read).unwrap();
    assert_eq!(read, values);

    // The entries before the refused one are done.
    let unknown = 0xdead_beef;
    let refused = Err(Error::Invalid(Field::Msr, unknown.into()));
    assert!(!vm.has_emulated_msr(unknown));
    let mut list = [Msr::write(0x175, 0x9000), Msr::write(unknown, 1), values[1]];
    assert_eq!(vcpu.set_msrs(&list), refused);
    list[0].value = 0;
    assert_eq!(vcpu.msrs(&mut list), refused);
    assert_eq!(list[0].value, 0x9000);
    // A known MSR, and a value that it does not take.
    let efer = 0xc000_0080;
    let refused = Err(Error::Invalid(Field::Msr, efer.into()));
    assert_eq!(vcpu.set_msrs(&[Msr::write(efer, 1 << 63)]), refused);
    // More than one call of the kernel takes.
    let mut many = vec![Msr::read(0x175); 600];
    vcpu.msrs(&mut many).unwrap();
    assert!(many.iter().all(|msr| msr.value == 0x9000));
    vcpu.set_msrs(&many).unwrap();
}

#[test]
fn nmi_mask_and_interrupt_shadow_round_trip() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    let none = vcpu.events().unwrap();
    assert_eq!(none, Events::default());
    assert!(none.nmi_allowed());
    let mut masked = none;
    masked.nmi.masked = true;
    vcpu.set_events(&masked).unwrap();
    assert_eq!(vcpu.events(), Ok(masked));
    assert!(!masked.nmi_allowed());
    for (mov_ss, sti) in [(true, false), (false, true)] {
        let shadow = InterruptShadow { mov_ss, sti };
        vcpu.set_events(&Events { shadow, ..none }).unwrap();
        // Some modules keep no more than that there is one.
        assert!(vcpu.events().unwrap().shadow.any());
    }
    vcpu.set_events(&none).unwrap();
    assert_eq!(vcpu.events(), Ok(none));
}

#[test]
fn debug_registers_round_trip_and_have_32_bits() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    assert_eq!(vcpu.debug_regs(), Ok(DebugRegs::default()));
    let mut debug = DebugRegs {
        db: [0x1000, 0x2000, 0x3000, 0x4000],
        dr7: 0x402,
        ..DebugRegs::default()
    };
    vcpu.set_debug_regs(&debug).unwrap();
    assert_eq!(vcpu.debug_regs(), Ok(debug));
    debug.dr7 = 1 << 32;
    assert!(vcpu.set_debug_regs(&debug).is_err());
}

#[test]
fn extended_state_and_its_control_register_round_trip() {
    let memory = Memory::new(4);
    let Some((_vm, mut vcpu)) = guest(&memory, &[0xf4]) else {
        return;
    };
    let mut xsave = vcpu.xsave().unwrap();
    assert!(xsave.as_bytes().len() >= 4096);
    let area = xsave.as_bytes_mut();
    area[160..176].fill(0xa5); // XMM0
    area[512] |= 0b11;
    vcpu.set_xsave(&xsave).unwrap();
    assert_eq!(vcpu.xsave().unwrap().as_bytes()[160..176], [0xa5; 16]);
    // A shorter area is extended with zeros: these components are in their first state.
    let short = Xsave::new(Xsave::initial().as_bytes()[..576].into()).unwrap();
    vcpu.set_xsave(&short).unwrap();
    // A component that no processor has.
    xsave.as_bytes_mut()[519] = 0x40;
    assert!(vcpu.set_xsave(&xsave).is_err());

    assert_eq!(vcpu.xcrs(), Ok(Xcrs::default()));
    vcpu.set_xcrs(&Xcrs { xcr0: 0b11 }).unwrap();
    assert_eq!(vcpu.xcrs(), Ok(Xcrs { xcr0: 0b11 }));
    // x87 is always on.
    assert!(vcpu.set_xcrs(&Xcrs { xcr0: 0b10 }).is_err());
}

#[test]
fn multiprocessing_state_round_trips_with_an_irqchip() {
    let Some(host) = common::host() else { return };
    let vm = common::vm(&host, 1, Irqchip::Full);
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    for state in [MpState::Halted, MpState::InitReceived, MpState::Runnable] {
        vcpu.set_mp_state(state).unwrap();
        assert_eq!(vcpu.mp_state(), Ok(state));
    }
}

#[test]
fn single_steps_are_exits_while_debugging_is_on() {
    let memory = Memory::new(4);
    // nop; nop; int3; hlt
    let Some((_vm, mut vcpu)) = guest(&memory, &[0x90, 0x90, 0xcc, 0xf4]) else {
        return;
    };
    vcpu.set_guest_debug(SINGLE_STEP).unwrap();
    for step in [1, 2] {
        match vcpu.vcpu_run().unwrap() {
            Exit::Debug { rip, exception } => {
                assert_eq!((rip, exception), (common::CODE + step, 1));
            }
            exit => panic!("{exit:?}"),
        }
    }
    vcpu.set_guest_debug(GuestDebug::default()).unwrap();
    let mut regs = vcpu.regs().unwrap();
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
    let mut regs = vcpu.regs().unwrap();
    regs.rflags = 0x102;
    vcpu.set_regs(&regs).unwrap();
    vcpu.set_guest_debug(DEBUG).unwrap();
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
    vcpu.set_guest_debug(DEBUG).unwrap();
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
        let mut tsc = [Msr::read(TSC)];
        vcpu.msrs(&mut tsc).unwrap();
        assert!(tsc[0].value >= far);
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
    let mut cap = [Msr::read(MCG_CAP)];
    vcpu.msrs(&mut cap).unwrap();
    assert_eq!(cap[0].value, 1 << 8 | 10);
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
    let regs = vcpu.regs().unwrap();
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
    let (index, value) = (0x12345, 0x1_0000_0002);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::ReadMsr { index });
    vcpu.answer(Answer::Msr(value)).unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::WriteMsr { index, value });
    let wrong = Err(Error::Invalid(Field::Answer, ExitKind::WriteMsr as u64));
    assert_eq!(vcpu.answer(Answer::Msr(1)), wrong);
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::ReadMsr { index });
    vcpu.answer(Answer::InjectGp).unwrap();
    assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rip, 0x3001);
}
