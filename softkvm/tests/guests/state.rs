//! Registers of a vCPU that runs, both ways.

use kvm_ops::Vendor;
use kvm_ops_uapi::run::{SyncRegs, exit_reason, sync_regs};
use kvm_ops_uapi::sev::{INIT, SevCmd};
use kvm_ops_uapi::state::{
    DebugRegs, Fpu, MpState, OneReg, Regs, Sregs, VcpuEvents, Xcrs, event_flags, mp_state, one_reg,
};
use kvm_ops_uapi::system::{ATTR_TSC_OFFSET, DeviceAttr, GROUP_TSC, MsrEntry, Msrs};
use kvm_ops_uapi::{Errno, U32, U64, cap, ioctl};
use zerocopy::IntoBytes;

use crate::guest::{CODE, Guest};

const VALID: u64 = 288;
const DIRTY: u64 = 296;
const SYNC: u64 = 304;

/// sync_regs_test: registers in the run page, and masks that are wrong.
#[test]
fn registers_in_the_run_page_are_those_of_the_vcpu() {
    // inc ax; out 0x80, al; jmp back
    let guest = Guest::new(&[0x40, 0xe6, 0x80, 0xeb, 0xfb]);
    let area = guest.area(guest.vcpu);
    area.write(VALID, &sync_regs::ALL.to_le_bytes());
    guest.run_to_port();
    let mut sync = SyncRegs::default();
    area.read(SYNC, sync.as_mut_bytes());
    assert_eq!(sync.regs, guest.regs());
    assert_eq!(sync.sregs, guest.get(guest.vcpu, ioctl::KVM_GET_SREGS));
    sync.regs.rax = U64::new(0x40);
    area.write(SYNC, sync.as_bytes());
    area.write(DIRTY, &sync_regs::REGS.to_le_bytes());
    assert_eq!(guest.run_to_port().1, [0x41]);
    let mut dirty = [0xff; 8];
    area.read(DIRTY, &mut dirty);
    assert_eq!(dirty, [0; 8], "taken");
    for field in [VALID, DIRTY] {
        area.write(field, &(1u64 << 3).to_le_bytes());
        let answer = guest.run_vcpu(guest.vcpu);
        assert_eq!(answer.unwrap_err().errno(), Errno::EINVAL);
        area.write(field, &[0; 8]);
    }
}

/// set_sregs_test: test_cr_bits. Bits of CR4 that need no feature, and one that the CPUID, which is not set, does not offer.
#[test]
fn cr4_takes_the_bits_that_every_guest_has_and_no_others() {
    const ALWAYS: u64 = 0x7ff;
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let guest = Guest::on(vendor, &[0xf4], 0, |_, _| ());
        let mut sregs: Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);
        sregs.cr4 = U64::new(ALWAYS);
        let set = |sregs: &Sregs| guest.call(guest.vcpu, ioctl::KVM_SET_SREGS, sregs);
        set(&sregs).unwrap();
        assert_eq!(guest.get::<Sregs>(guest.vcpu, ioctl::KVM_GET_SREGS), sregs);
        for bit in 11..64 {
            let mut wrong = sregs;
            wrong.cr4 = U64::new(ALWAYS | 1 << bit);
            assert_eq!(set(&wrong).unwrap_err().errno(), Errno::EINVAL, "bit {bit}");
            assert_eq!(guest.get::<Sregs>(guest.vcpu, ioctl::KVM_GET_SREGS), sregs);
        }
    }
}

#[test]
fn each_group_comes_back_as_it_was_set() {
    let guest = Guest::new(&[0xf4]);
    let vcpu = guest.vcpu;
    let mut fpu: Fpu = guest.get(vcpu, ioctl::KVM_GET_FPU);
    assert_eq!((fpu.fcw.get(), fpu.mxcsr.get()), (0x37f, 0x1f80));
    fpu.xmm[17] = 0x5a;
    guest.call(vcpu, ioctl::KVM_SET_FPU, &fpu).unwrap();
    assert_eq!(guest.get::<Fpu>(vcpu, ioctl::KVM_GET_FPU), fpu);
    let xsave: [u8; 4096] = guest.get(vcpu, ioctl::KVM_GET_XSAVE);
    assert_eq!(xsave[160 + 17], 0x5a);
    guest.call(vcpu, ioctl::KVM_SET_XSAVE, &xsave).unwrap();

    let mut xcrs: Xcrs = guest.get(vcpu, ioctl::KVM_GET_XCRS);
    assert_eq!((xcrs.nr_xcrs.get(), xcrs.xcrs[0].value.get()), (1, 1));
    xcrs.xcrs[0].value = U64::new(3);
    guest.call(vcpu, ioctl::KVM_SET_XCRS, &xcrs).unwrap();
    assert_eq!(guest.get::<Xcrs>(vcpu, ioctl::KVM_GET_XCRS), xcrs);
    xcrs.xcrs[0].value = U64::new(2);
    let wrong = guest.call(vcpu, ioctl::KVM_SET_XCRS, &xcrs);
    assert_eq!(wrong.unwrap_err().errno(), Errno::EINVAL, "x87 is required");

    let mut debug: DebugRegs = guest.get(vcpu, ioctl::KVM_GET_DEBUGREGS);
    debug.db[2] = U64::new(0x1234);
    guest.call(vcpu, ioctl::KVM_SET_DEBUGREGS, &debug).unwrap();
    assert_eq!(
        guest.get::<DebugRegs>(vcpu, ioctl::KVM_GET_DEBUGREGS),
        debug
    );

    let mut events: VcpuEvents = guest.get(vcpu, ioctl::KVM_GET_VCPU_EVENTS);
    events.nmi_masked = 1;
    guest
        .call(vcpu, ioctl::KVM_SET_VCPU_EVENTS, &events)
        .unwrap();
    assert_eq!(
        guest.get::<VcpuEvents>(vcpu, ioctl::KVM_GET_VCPU_EVENTS),
        events
    );
}

#[test]
fn an_exception_that_user_space_sets_is_taken_by_the_guest() {
    let guest = Guest::new(&[0xf4]);
    guest.write(0x2000, &[0xe6, 0x93, 0xf4]);
    guest.write(6 * 4, &[0x00, 0x20, 0x00, 0x00]);
    let ud = VcpuEvents {
        exception_injected: 1,
        exception_nr: 6,
        ..VcpuEvents::default()
    };
    let set = |events: &VcpuEvents| guest.call(guest.vcpu, ioctl::KVM_SET_VCPU_EVENTS, events);
    set(&ud).unwrap();
    assert_eq!(guest.run_to_port().0, (1, 0x93, 1, 1));
    let fault = VcpuEvents {
        flags: U32::new(event_flags::TRIPLE_FAULT),
        triple_fault_pending: 1,
        ..VcpuEvents::default()
    };
    assert_eq!(set(&fault).unwrap_err().errno(), Errno::EINVAL);
    guest.enable(cap::X86_TRIPLE_FAULT_EVENT, 1);
    set(&fault).unwrap();
    assert_eq!(guest.run(), exit_reason::SHUTDOWN);
}

#[test]
fn msrs_are_those_that_the_guest_reads() {
    // mov ecx, 0xc0000082; rdmsr; hlt
    let code = [0x66, 0xb9, 0x82, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0xf4];
    let guest = Guest::new(&code);
    let entry = |index: u32, data: u64| MsrEntry {
        index: U32::new(index),
        data: U64::new(data),
        ..MsrEntry::default()
    };
    let head = Msrs {
        nmsrs: U32::new(3),
        ..Msrs::default()
    };
    let list = [
        entry(0xc000_0082, 0x1234_5678),
        entry(0xdead_beef, 0),
        entry(0x10, 0),
    ];
    let bytes = [head.as_bytes(), list.as_bytes()].concat();
    let done = guest.call(guest.vcpu, ioctl::KVM_SET_MSRS, &bytes[..]);
    assert_eq!(done.unwrap(), 1, "up to the first that there is not");
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rax.get(), 0x1234_5678);
}

const TSC: u32 = 0x10;

/// The `struct kvm_msrs` of one MSR.
fn one_msr(index: u32, data: u64) -> Vec<u8> {
    let head = Msrs {
        nmsrs: U32::new(1),
        ..Msrs::default()
    };
    let entry = MsrEntry {
        index: U32::new(index),
        data: U64::new(data),
        ..MsrEntry::default()
    };
    [head.as_bytes(), entry.as_bytes()].concat()
}

/// True if the vCPU takes the value.
fn takes(guest: &Guest, vcpu: i32, index: u32, value: u64) -> bool {
    let bytes = one_msr(index, value);
    guest.call(vcpu, ioctl::KVM_SET_MSRS, &bytes[..]).unwrap() == 1
}

fn msr(guest: &Guest, vcpu: i32, index: u32) -> u64 {
    /// Behind the head, an index and padding.
    const DATA: u64 = 16;
    let at = guest.host.task.put(&one_msr(index, 0)[..]);
    assert_eq!(
        guest.ioctl(vcpu, ioctl::KVM_GET_MSRS, at),
        Ok(1),
        "{index:#x}"
    );
    u64::from_le_bytes(guest.read_at(at + DATA))
}

/// tsc_scaling_sync: the first vCPU's TSC is set, and the others are created after that.
#[test]
fn the_tsc_of_a_vcpu_that_is_made_later_is_in_step_with_what_was_set() {
    const OFFSET: u64 = 200_000_000;
    // mov cx, 1000; loop to itself; hlt
    let guest = Guest::new(&[0xb9, 0xe8, 0x03, 0xe2, 0xfe, 0xf4]);
    assert!(takes(&guest, guest.vcpu, TSC, OFFSET));
    let early = guest.add_vcpu(1, 0x3000);
    assert_eq!(msr(&guest, early, TSC), OFFSET);
    assert_eq!(guest.run(), exit_reason::HLT);
    let late = guest.add_vcpu(2, 0x3000);
    let now = msr(&guest, guest.vcpu, TSC);
    assert!(now > OFFSET + 1000, "{now}");
    for vcpu in [early, late] {
        assert_eq!(msr(&guest, vcpu, TSC), now);
    }
}

/// The attribute of a vCPU, by a call whose value is `value`; what the value is then.
fn tsc_offset(guest: &Guest, vcpu: i32, call: ioctl::Ioctl, value: u64) -> u64 {
    let at = guest.host.task.put(&U64::new(value));
    let args = DeviceAttr {
        group: U32::new(GROUP_TSC),
        attr: U64::new(ATTR_TSC_OFFSET),
        addr: U64::new(at),
        ..DeviceAttr::default()
    };
    assert_eq!(guest.call(vcpu, call, &args), Ok(0));
    u64::from_le_bytes(guest.read_at(at))
}

/// system_counter_offset_test's attribute. The host's clock is the VM's here, whose ticks are instructions.
#[test]
fn the_offset_of_a_tsc_is_its_distance_from_the_vms_clock_also_a_negative_one() {
    let (get, set) = (ioctl::KVM_GET_DEVICE_ATTR, ioctl::KVM_SET_DEVICE_ATTR);
    // mov cx, 1000; loop to itself; hlt
    let guest = Guest::new(&[0xb9, 0xe8, 0x03, 0xe2, 0xfe, 0xf4]);
    assert_eq!(tsc_offset(&guest, guest.vcpu, get, 7), 0);
    assert_eq!(guest.run(), exit_reason::HLT);
    let clock = msr(&guest, guest.vcpu, TSC);
    assert!(clock > 1000);
    for offset in [180_000_000_000, 0u64.wrapping_sub(180_000_000_000), 0] {
        tsc_offset(&guest, guest.vcpu, set, offset);
        assert_eq!(tsc_offset(&guest, guest.vcpu, get, 7), offset);
        assert_eq!(msr(&guest, guest.vcpu, TSC), clock.wrapping_add(offset));
    }
    tsc_offset(&guest, guest.vcpu, set, 5000);
    let late = guest.add_vcpu(1, 0x3000);
    assert_eq!(tsc_offset(&guest, late, get, 7), 5000, "in step");
    assert_eq!(msr(&guest, late, TSC), clock + 5000);
}

#[test]
fn one_reg_reads_and_writes_what_the_lists_of_msrs_do() {
    const EFER: u32 = 0xc000_0080;
    let guest = Guest::new(&[0xf4]);
    let one = |call, value: u64| {
        let at = guest.host.task.put(&U64::new(value));
        let args = OneReg {
            id: U64::new(one_reg::X86 | one_reg::MSR | one_reg::SIZE_64 | u64::from(EFER)),
            addr: U64::new(at),
        };
        assert_eq!(guest.call(guest.vcpu, call, &args), Ok(0));
        u64::from_le_bytes(guest.read_at(at))
    };
    one(ioctl::KVM_SET_ONE_REG, 1);
    assert_eq!(msr(&guest, guest.vcpu, EFER), 1);
    assert!(takes(&guest, guest.vcpu, EFER, 0));
    assert_eq!(one(ioctl::KVM_GET_ONE_REG, 7), 0);
}

/// hwcr_msr_test: test_hwcr_bit.
#[test]
fn hwcr_takes_two_bits_ignores_three_and_refuses_the_others() {
    const HWCR: u32 = 0xc001_0015;
    let guest = Guest::on(Vendor::Amd, &[0xf4], 0, |_, _| ());
    let ignored = 1 << 3 | 1 << 6 | 1 << 8;
    let valid = 1 << 18 | 1 << 24;
    for bit in 0..64 {
        let value = 1 << bit;
        let is_taken = value & (ignored | valid) != 0;
        assert_eq!(takes(&guest, guest.vcpu, HWCR, value), is_taken, "{bit}");
        assert_eq!(msr(&guest, guest.vcpu, HWCR), value & valid, "{bit}");
        assert!(takes(&guest, guest.vcpu, HWCR, 0));
    }
}

/// msrs_test: what the list has can be read, and IA32_MISC_ENABLE begins as KVM's.
#[test]
fn each_msr_of_the_list_can_be_read_and_written_back() {
    for vendor in [Vendor::Amd, Vendor::Intel] {
        let guest = Guest::on(vendor, &[0xf4], 0, |_, _| ());
        let kvm = guest.host.task.open(guest.kernel.open_kvm()).unwrap();
        let room = [&100u32.to_le_bytes()[..], &[0; 400]].concat();
        let at = guest.host.task.put(&room[..]);
        guest.ioctl(kvm, ioctl::KVM_GET_MSR_INDEX_LIST, at).unwrap();
        let count = u32::from_le_bytes(guest.read_at(at));
        let indices = (1..=u64::from(count)).map(|n| u32::from_le_bytes(guest.read_at(at + n * 4)));
        let list: Vec<u32> = indices.collect();
        for index in &list {
            let value = msr(&guest, guest.vcpu, *index);
            assert!(takes(&guest, guest.vcpu, *index, value), "{index:#x}");
        }
        for (index, is_there) in [
            (TSC, true),
            (0x1a0, true),
            (0xc000_0103, true),
            (0xc000_0080, false),
            (0xc001_0015, vendor == Vendor::Amd),
        ] {
            assert_eq!(list.contains(&index), is_there, "{index:#x}");
        }
        assert_eq!(msr(&guest, guest.vcpu, 0x1a0), 0x1800);
    }
}

#[test]
fn a_halt_ends_in_the_kernel_where_interrupt_controllers_are() {
    // cli; hlt: nothing but a signal ends it
    let guest = Guest::with(&[0xfa, 0xf4], 0, |host, vm| {
        host.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0).unwrap();
    });
    guest.host.task.set_signal(true);
    while guest
        .get::<MpState>(guest.vcpu, ioctl::KVM_GET_MP_STATE)
        .mp_state
        != mp_state::HALTED
    {
        let answer = guest.run_vcpu(guest.vcpu);
        assert_eq!(answer.unwrap_err().errno(), Errno::EINTR);
        assert_eq!(guest.reason(guest.vcpu), exit_reason::INTR);
        // It executes before it is asked again.
        guest.host.task.set_signal(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                guest.host.task.set_signal(true);
            });
            let answer = guest.run_vcpu(guest.vcpu);
            assert_eq!(answer.unwrap_err().errno(), Errno::EINTR);
        });
    }
    assert_eq!(guest.regs().rip.get(), CODE + 2);
}

#[test]
fn another_processor_waits_for_its_start_and_may_be_told_to_run() {
    let guest = Guest::with(&[0xf4], 0, |host, vm| {
        host.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0).unwrap();
    });
    guest.write(0x3000, &[0xe6, 0x44, 0xf4]);
    let second = guest.add_vcpu(1, 0x3000);
    let state = || guest.get::<MpState>(second, ioctl::KVM_GET_MP_STATE);
    assert_eq!(state().mp_state, mp_state::UNINITIALIZED);
    let run = MpState {
        mp_state: U32::new(mp_state::RUNNABLE),
    };
    guest.call(second, ioctl::KVM_SET_MP_STATE, &run).unwrap();
    assert_eq!(guest.run_vcpu_to_port(second).0, (1, 0x44, 1, 1));
}

/// sev_migrate_tests: a context moves to a VM of the default type that has vCPUs.
#[test]
fn a_vcpu_whose_vm_becomes_a_guest_of_sev_keeps_its_registers() {
    let guest = Guest::on(Vendor::Amd, &[0xf4], 0, |_, _| ());
    let regs = Regs {
        rbx: U64::new(0x77),
        ..guest.regs()
    };
    guest.set_regs(&regs);
    let sregs: Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);

    let kvm = guest.host.task.open(guest.kernel.open_kvm()).unwrap();
    let source = guest.ioctl(kvm, ioctl::KVM_CREATE_VM, 0).unwrap();
    let init = SevCmd {
        id: U32::new(INIT),
        ..SevCmd::default()
    };
    let command = ioctl::KVM_MEMORY_ENCRYPT_OP;
    guest.call(source as i32, command, &init).unwrap();
    guest.enable(cap::VM_MOVE_ENC_CONTEXT_FROM, source as u64);

    assert_eq!(guest.regs(), regs);
    let after: Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);
    assert_eq!(after, sregs);
    assert_eq!(
        guest.run(),
        exit_reason::FAIL_ENTRY,
        "its launch has not begun"
    );
}
