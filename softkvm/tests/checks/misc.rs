//! Dirty logs, and calls that prepare a vCPU.

use crate::common::{Answer, World, slot};
use crate::support::*;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::memory::{ClearDirtyLog, DirtyLog};
use kvm_ops_uapi::sev;
use kvm_ops_uapi::state::guest_debug::{INJECT_BP, INJECT_DB};
use kvm_ops_uapi::state::one_reg::{KVM, MSR, SIZE_64, X86};
use kvm_ops_uapi::state::{OneReg, RegList, Sregs2, TprAccessCtl};
use kvm_ops_uapi::system::DeviceAttr;
use kvm_ops_uapi::vm::MsrFilter;
use kvm_ops_uapi::{U32, U64, cap};

fn log_of(w: &World, vm: i32, slot: u32, bitmap: u64) -> Answer {
    let args = DirtyLog {
        slot: U32::new(slot),
        dirty_bitmap: U64::new(bitmap),
        ..DirtyLog::default()
    };
    w.call(vm, ioctl::KVM_GET_DIRTY_LOG, &args)
}

/// A VM whose slot 1, of 512 pages, has a log.
fn logged(w: &World) -> i32 {
    let vm = w.vm(0);
    let mut region = slot();
    region.flags = U32::new(1);
    w.region(vm, &region).unwrap();
    vm
}

fn clear(w: &World, first: u64, count: u32, change: impl FnOnce(&mut ClearDirtyLog)) -> Answer {
    let mut args = ClearDirtyLog {
        slot: U32::new(1),
        num_pages: U32::new(count),
        first_page: U64::new(first),
        dirty_bitmap: U64::new(w.task.map(64)),
    };
    change(&mut args);
    w.call(logged(w), ioctl::KVM_CLEAR_DIRTY_LOG, &args)
}

fn mce(w: &World, cap: u64) -> Answer {
    w.call(w.vcpu(w.vm(0), 0), ioctl::KVM_X86_SETUP_MCE, &U64::new(cap))
}

fn sregs2(w: &World, vcpu: i32, change: impl FnOnce(&mut Sregs2)) -> Answer {
    let mut sregs: Sregs2 = w.fetch(vcpu, ioctl::KVM_GET_SREGS2)?;
    w.call(vcpu, ioctl::KVM_SET_SREGS2, &sregs)?;
    change(&mut sregs);
    w.call(vcpu, ioctl::KVM_SET_SREGS2, &sregs)
}

fn bus_cycles(w: &World, vm: i32, nanoseconds: u64) -> Answer {
    w.enable(vm, cap::X86_APIC_BUS_CYCLES_NS, nanoseconds)
}

/// A call for the attribute of a vCPU, whose value is nowhere.
fn tsc_offset(w: &World, call: ioctl::Ioctl, change: impl FnOnce(&mut DeviceAttr)) -> Answer {
    let mut args = DeviceAttr {
        addr: U64::new(NOWHERE),
        ..DeviceAttr::default()
    };
    change(&mut args);
    w.call(w.vcpu(w.vm(0), 0), call, &args)
}

/// A call for a register, whose value is nowhere.
fn one_msr(w: &World, call: ioctl::Ioctl, id: u64) -> Answer {
    let args = OneReg {
        id: U64::new(id),
        addr: U64::new(NOWHERE),
    };
    w.call(w.vcpu(w.vm(0), 0), call, &args)
}

/// A filter of one range, that is right but for the change.
fn filter(w: &World, change: impl FnOnce(&mut MsrFilter)) -> Answer {
    let mut filter = MsrFilter::default();
    let range = &mut filter.ranges[0];
    (range.flags, range.nmsrs) = (U32::new(1), U32::new(12288));
    range.bitmap = U64::new(w.task.map(12288 / 8));
    w.call(w.vm(0), ioctl::KVM_X86_SET_MSR_FILTER, &filter)?;
    change(&mut filter);
    w.call(w.vm(0), ioctl::KVM_X86_SET_MSR_FILTER, &filter)
}

fn split(w: &World) -> i32 {
    let vm = w.vm(0);
    w.enable(vm, cap::SPLIT_IRQCHIP, 24).unwrap();
    vm
}

pub(crate) const CASES: &[Case] = &[
    (dirty_log::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_CLEAR_DIRTY_LOG, NOWHERE)
    }),
    (dirty_log::SLOT, |w| log_of(w, w.vm(0), 0x2_0000, NOWHERE)),
    (dirty_log::SLOT, |w| {
        clear(w, 1, 64, |args| args.slot = U32::new(0xffff))
    }),
    (dirty_log::FIRST, |w| {
        clear(w, 1, 64, |args| args.slot = U32::new(2))
    }),
    (dirty_log::LOGGED, |w| {
        let vm = w.vm(0);
        w.region(vm, &slot())?;
        log_of(w, vm, 1, NOWHERE)
    }),
    (dirty_log::LOGGED, |w| {
        clear(w, 0, 64, |args| args.slot = U32::new(2))
    }),
    (dirty_log::RANGE, |w| clear(w, 0, 65, |_| ())),
    (dirty_log::RANGE, |w| clear(w, 448, 65, |_| ())),
    (dirty_log::RANGE, |w| clear(w, 576, 0, |_| ())),
    (dirty_log::BITMAP, |w| log_of(w, logged(w), 1, NOWHERE)),
    (dirty_log::BITMAP, |w| {
        clear(w, 448, 64, |args| args.dirty_bitmap = U64::new(NOWHERE))
    }),
    (dirty_log_protect::FLAGS, |w| {
        let vm = w.vm(0);
        w.enable(vm, cap::MANUAL_DIRTY_LOG_PROTECT2, 3)?;
        w.enable(vm, cap::MANUAL_DIRTY_LOG_PROTECT2, 0)?;
        w.enable(vm, cap::MANUAL_DIRTY_LOG_PROTECT2, 2)
    }),
    (setup_mce::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_X86_SETUP_MCE, NOWHERE)
    }),
    (setup_mce::BANKS, |w| mce(w, 1 << 9)),
    (setup_mce::BANKS, |w| mce(w, 33)),
    (setup_mce::FEATURES, |w| {
        mce(w, 1 << 24 | 1 << 8 | 32)?;
        mce(w, 1 << 9 | 32)
    }),
    (tpr_access::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_TPR_ACCESS_REPORTING, NOWHERE)
    }),
    (tpr_access::FLAGS, |w| {
        let args = TprAccessCtl {
            flags: U32::new(1),
            ..TprAccessCtl::default()
        };
        w.call(w.vcpu(w.vm(0), 0), ioctl::KVM_TPR_ACCESS_REPORTING, &args)
    }),
    (tpr_access::COPY_BACK, |w| {
        let at = w.task.put(&TprAccessCtl::default());
        let vcpu = w.vcpu(w.vm(0), 0);
        w.ioctl(vcpu, ioctl::KVM_TPR_ACCESS_REPORTING, at)?;
        w.task.protect(at);
        w.ioctl(vcpu, ioctl::KVM_TPR_ACCESS_REPORTING, at)
    }),
    (vapic_addr::APIC, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_VAPIC_ADDR, NOWHERE)
    }),
    (vapic_addr::COPY, |w| {
        w.ioctl(w.vcpu(split(w), 0), ioctl::KVM_SET_VAPIC_ADDR, NOWHERE)
    }),
    (vapic_addr::MEMORY, |w| {
        let vm = split(w);
        w.region(vm, &slot())?;
        let vcpu = w.vcpu(vm, 0);
        let set = |address| w.call(vcpu, ioctl::KVM_SET_VAPIC_ADDR, &U64::new(address));
        set(0)?;
        set(0x10_0000)?;
        set(0x30_0000)
    }),
    (kvmclock_ctrl::ACTIVE, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_KVMCLOCK_CTRL, 0)
    }),
    (vcpu_tsc_khz::PROTECTED, |_| {
        let w = World::intel();
        let vcpu = w.td_vcpu(w.td(), 0, 0);
        w.ioctl(vcpu, ioctl::KVM_SET_TSC_KHZ, 1 << 32)
    }),
    (vcpu_tsc_khz::RANGE, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        assert_eq!(w.ioctl(vcpu, ioctl::KVM_GET_TSC_KHZ, 0), Ok(1_000_000));
        w.ioctl(vcpu, ioctl::KVM_SET_TSC_KHZ, 2_000_000)?;
        assert_eq!(w.ioctl(vcpu, ioctl::KVM_GET_TSC_KHZ, 0), Ok(2_000_000));
        w.ioctl(vcpu, ioctl::KVM_SET_TSC_KHZ, 1 << 32)
    }),
    (stats_fd::DESCRIPTOR, |w| {
        let vm = w.vm(0);
        full(w, || w.ioctl(vm, ioctl::KVM_GET_STATS_FD, 0))
    }),
    (signal_mask::COPY, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        w.ioctl(vcpu, ioctl::KVM_SET_SIGNAL_MASK, 0)?;
        w.ioctl(vcpu, ioctl::KVM_SET_SIGNAL_MASK, NOWHERE)
    }),
    (signal_mask::LENGTH, |w| {
        w.call(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_SIGNAL_MASK, &4u32)
    }),
    (signal_mask::SET, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        w.call(vcpu, ioctl::KVM_SET_SIGNAL_MASK, &[8u32, 0, 0])?;
        w.call(vcpu, ioctl::KVM_SET_SIGNAL_MASK, &[8u32, 0])
    }),
    (guest_debug::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_GUEST_DEBUG, NOWHERE)
    }),
    (guest_debug::PROTECTED, |w| {
        let vm = w.late_guest(true);
        let vcpu = w.vcpu(vm, 0);
        w.launch(vm, 4);
        debug(w, vcpu, 0)?;
        w.bare(vm, sev::LAUNCH_UPDATE_VMSA)?;
        debug(w, vcpu, 0)
    }),
    (guest_debug::PROTECTED, |_| {
        let w = World::intel();
        debug(&w, w.td_vcpu(w.td(), 0, 0), 0)
    }),
    (guest_debug::PENDING, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        debug(w, vcpu, INJECT_BP)?;
        debug(w, vcpu, INJECT_DB)
    }),
    (vcpu_attr::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_GET_DEVICE_ATTR, NOWHERE)
    }),
    (vcpu_attr::GROUP, |w| {
        tsc_offset(w, ioctl::KVM_HAS_DEVICE_ATTR, |attr| {
            (attr.group, attr.attr) = (U32::new(1), U64::new(1));
        })
    }),
    (vcpu_attr::KNOWN, |w| {
        tsc_offset(w, ioctl::KVM_SET_DEVICE_ATTR, |attr| {
            attr.attr = U64::new(1)
        })
    }),
    (vcpu_attr::ADDRESS, |w| {
        tsc_offset(w, ioctl::KVM_HAS_DEVICE_ATTR, |_| ())?;
        tsc_offset(w, ioctl::KVM_GET_DEVICE_ATTR, |_| ())
    }),
    (vcpu_attr::ADDRESS, |w| {
        tsc_offset(w, ioctl::KVM_SET_DEVICE_ATTR, |_| ())
    }),
    (one_reg::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_GET_ONE_REG, NOWHERE)
    }),
    (one_reg::ARCH, |w| {
        one_msr(w, ioctl::KVM_GET_ONE_REG, 6 << 60 | 1 << 40)
    }),
    (one_reg::RESERVED, |w| {
        one_msr(w, ioctl::KVM_SET_ONE_REG, X86 | KVM | 1 << 40)
    }),
    (one_reg::RESERVED, |w| {
        one_msr(w, ioctl::KVM_SET_ONE_REG, X86 | KVM | 1 << 51)
    }),
    (one_reg::KIND, |w| {
        one_msr(w, ioctl::KVM_GET_ONE_REG, X86 | KVM | SIZE_64)
    }),
    (one_reg::KIND, |w| one_msr(w, ioctl::KVM_SET_ONE_REG, X86)),
    (one_reg::SIZE, |w| {
        one_msr(w, ioctl::KVM_GET_ONE_REG, X86 | MSR | 2 << 52)
    }),
    (one_reg::MSR, |w| {
        one_msr(w, ioctl::KVM_GET_ONE_REG, X86 | MSR | SIZE_64 | 0x1234_5678)
    }),
    (one_reg::MSR, |w| {
        // EFER with a reserved bit.
        let vcpu = w.vcpu(w.vm(0), 0);
        let set = |value: u64| {
            let args = OneReg {
                id: U64::new(X86 | MSR | SIZE_64 | 0xc000_0080),
                addr: U64::new(w.task.put(&U64::new(value))),
            };
            w.call(vcpu, ioctl::KVM_SET_ONE_REG, &args)
        };
        set(1)?;
        set(1 << 1)
    }),
    (one_reg::VALUE, |w| {
        one_msr(w, ioctl::KVM_GET_ONE_REG, X86 | MSR | SIZE_64 | 0x10)
    }),
    (one_reg::VALUE, |w| {
        one_msr(w, ioctl::KVM_SET_ONE_REG, X86 | MSR | SIZE_64 | 0x1234_5678)
    }),
    (reg_list::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_GET_REG_LIST, NOWHERE)
    }),
    (reg_list::COPY_BACK, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        w.call(vcpu, ioctl::KVM_GET_REG_LIST, &RegList::default())?;
        let list = sealed(w, &RegList::default());
        w.ioctl(vcpu, ioctl::KVM_GET_REG_LIST, list)
    }),
    (set_sregs2::COPY, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_SREGS2, NOWHERE)
    }),
    (set_sregs2::READABLE, |_| {
        let w = World::intel();
        let vcpu = w.td_vcpu(w.td(), 0, 0);
        let args = Sregs2 {
            flags: U64::new(2),
            ..Sregs2::default()
        };
        w.call(vcpu, ioctl::KVM_SET_SREGS2, &args)
    }),
    (set_sregs2::FLAGS, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        sregs2(w, vcpu, |sregs| sregs.flags = U64::new(3))
    }),
    (set_sregs2::PAE, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        sregs2(w, vcpu, |sregs| {
            (sregs.flags, sregs.cr8) = (U64::new(1), U64::new(16));
        })
    }),
    (set_sregs2::CONSISTENT, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        sregs2(w, vcpu, |sregs| sregs.cr8 = U64::new(16))
    }),
    (user_space_msr::MASK, |w| {
        w.enable(w.vm(0), cap::X86_USER_SPACE_MSR, 8)
    }),
    (msr_filter::COPY, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_X86_SET_MSR_FILTER, NOWHERE)
    }),
    (msr_filter::FLAGS, |w| {
        filter(w, |f| {
            f.flags = U32::new(2);
            f.ranges[0].flags = U32::new(4);
        })
    }),
    (msr_filter::RANGES, |w| {
        filter(w, |f| {
            (f.flags, f.ranges[0].nmsrs) = (U32::new(1), U32::ZERO);
            f.ranges[0].flags = U32::new(4);
        })
    }),
    (msr_filter::RANGE_FLAGS, |w| {
        filter(w, |f| {
            (f.ranges[0].flags, f.ranges[0].nmsrs) = (U32::new(4), U32::new(!0));
        })
    }),
    (msr_filter::ACCESS, |w| {
        filter(w, |f| {
            (f.ranges[0].flags, f.ranges[0].nmsrs) = (U32::ZERO, U32::new(!0));
        })
    }),
    (msr_filter::COUNT, |w| {
        filter(w, |f| {
            (f.ranges[0].nmsrs, f.ranges[0].bitmap) = (U32::new(12289), U64::new(NOWHERE));
        })
    }),
    (msr_filter::BITMAP, |w| {
        filter(w, |f| f.ranges[0].bitmap = U64::new(NOWHERE))
    }),
    (apic_bus_cycles::RANGE, |w| bus_cycles(w, w.vm(0), 0)),
    (apic_bus_cycles::RANGE, |w| bus_cycles(w, w.vm(0), 1 << 26)),
    (apic_bus_cycles::IRQCHIP, |w| bus_cycles(w, w.vm(0), 40)),
    (apic_bus_cycles::NO_VCPU, |w| {
        let vm = split(w);
        bus_cycles(w, vm, 1)?;
        w.vcpu(vm, 0);
        bus_cycles(w, vm, 40)
    }),
];
