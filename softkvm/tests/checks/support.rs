//! Calls with one mistake, in short.

use crate::common::{Answer, World, file_slot, slot};
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{Faults, Kernel, PinLimits};
use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::memory::*;
use kvm_ops_uapi::sev::{self, *};
use kvm_ops_uapi::state::{DebugRegs, GuestDebug};
use kvm_ops_uapi::system::DeviceAttr;
use kvm_ops_uapi::{U32, U64, cap};
use zerocopy::{Immutable, IntoBytes};

/// An address that is not mapped.
pub(crate) const NOWHERE: u64 = 0x10;

pub(crate) type Case = (Check, fn(&World) -> Answer);

pub(crate) fn gmem_args(size: u64, flags: u64) -> CreateGuestMemfd {
    CreateGuestMemfd {
        size: U64::new(size),
        flags: U64::new(flags),
        ..CreateGuestMemfd::default()
    }
}

pub(crate) fn attributes_args(
    address: u64,
    size: u64,
    attributes: u64,
    flags: u64,
) -> MemoryAttributes {
    MemoryAttributes {
        address: U64::new(address),
        size: U64::new(size),
        attributes: U64::new(attributes),
        flags: U64::new(flags),
    }
}

pub(crate) fn set_attributes(w: &World, kind: u64, args: MemoryAttributes) -> Answer {
    w.call(w.vm(kind), ioctl::KVM_SET_MEMORY_ATTRIBUTES, &args)
}

pub(crate) fn pre_fault_args(gpa: u64, size: u64, flags: u64) -> PreFaultMemory {
    PreFaultMemory {
        gpa: U64::new(gpa),
        size: U64::new(size),
        flags: U64::new(flags),
        ..PreFaultMemory::default()
    }
}

pub(crate) fn pre_fault_of(w: &World, vm: i32, args: PreFaultMemory) -> Answer {
    w.call(w.vcpu(vm, 0), ioctl::KVM_PRE_FAULT_MEMORY, &args)
}

pub(crate) fn set_slot(w: &World, change: impl FnOnce(&mut UserspaceMemoryRegion2)) -> Answer {
    let mut region = slot();
    change(&mut region);
    w.region(w.vm(0), &region)
}

/// A slot that exists, and then a change of it.
pub(crate) fn change_slot(w: &World, change: impl FnOnce(&mut UserspaceMemoryRegion2)) -> Answer {
    let (vm, mut region) = (w.vm(0), slot());
    w.region(vm, &region)?;
    change(&mut region);
    w.region(vm, &region)
}

pub(crate) fn device_attribute(w: &World, group: u32, attr: u64, addr: u64) -> Answer {
    let args = DeviceAttr {
        group: U32::new(group),
        attr: U64::new(attr),
        addr: U64::new(addr),
        ..DeviceAttr::default()
    };
    w.call(w.kvm, ioctl::KVM_GET_DEVICE_ATTR, &args)
}

pub(crate) fn init2_of(w: &World, kind: u64, change: impl FnOnce(&mut SevInit)) -> Answer {
    let mut args = SevInit::default();
    change(&mut args);
    w.command(w.vm(kind), sev::INIT2, &args).0
}

pub(crate) fn start_with(w: &World, dh: (u64, u32), session: (u64, u32)) -> Answer {
    let args = SevLaunchStart {
        dh: U64::new(dh.0),
        dh_len: U32::new(dh.1),
        session: U64::new(session.0),
        session_len: U32::new(session.1),
        ..SevLaunchStart::default()
    };
    w.command(w.guest(2), sev::LAUNCH_START, &args).0
}

pub(crate) fn range(uaddr: u64, len: u32) -> SevRange {
    SevRange {
        uaddr: U64::new(uaddr),
        len: U32::new(len),
        ..SevRange::default()
    }
}

pub(crate) fn secret_with(w: &World, change: impl FnOnce(&mut SevLaunchSecret)) -> Answer {
    let page = w.task.map(4096);
    let mut args = SevLaunchSecret {
        hdr: U64::new(page),
        hdr_len: U32::new(52),
        guest: U64::new(page),
        guest_len: U32::new(64),
        trans: U64::new(page),
        trans_len: U32::new(64),
        ..SevLaunchSecret::default()
    };
    change(&mut args);
    w.command(w.guest(2), sev::LAUNCH_SECRET, &args).0
}

pub(crate) fn dbg_with(w: &World, src: u64, dst: u64, len: u32) -> Answer {
    let args = SevDbg {
        src: U64::new(src),
        dst: U64::new(dst),
        len: U32::new(len),
        ..SevDbg::default()
    };
    w.command(w.guest(2), sev::DBG_DECRYPT, &args).0
}

/// As many pages may be locked.
pub(crate) fn locked(pages: u64) -> PinLimits {
    PinLimits {
        locked: pages,
        ..PinLimits::NONE
    }
}

/// The machine has as many pages.
pub(crate) fn of_memory(pages: u64) -> PinLimits {
    PinLimits {
        total: pages,
        ..PinLimits::NONE
    }
}

pub(crate) fn started_snp(w: &World) -> i32 {
    let vm = w.guest(4);
    w.launch_snp(vm);
    vm
}

pub(crate) fn update_with(w: &World, change: impl FnOnce(&mut SnpLaunchUpdate)) -> Answer {
    let vm = started_snp(w);
    let gmem = w.gmem(vm, 0x20_0000);
    w.region(vm, &file_slot(gmem))?;
    let mut args = SnpLaunchUpdate {
        gfn_start: U64::new(0x100),
        uaddr: U64::new(w.task.map(4096)),
        len: U64::new(4096),
        kind: page_type::NORMAL,
        ..SnpLaunchUpdate::default()
    };
    change(&mut args);
    w.command(vm, sev::SNP_LAUNCH_UPDATE, &args).0
}

pub(crate) fn region_call(w: &World, vm: i32, ioctl: Ioctl, addr: u64, size: u64) -> Answer {
    let args = EncRegion {
        addr: U64::new(addr),
        size: U64::new(size),
    };
    w.call(vm, ioctl, &args)
}

pub(crate) fn mirror_of(w: &World, owner: i32) -> i32 {
    let mirror = w.vm(0);
    w.enable(mirror, cap::VM_COPY_ENC_CONTEXT_FROM, owner as u64)
        .unwrap();
    mirror
}

pub(crate) fn move_of(w: &World, to: i32, from: i32) -> Answer {
    w.enable(to, cap::VM_MOVE_ENC_CONTEXT_FROM, from as u64)
}

pub(crate) fn copy_of(w: &World, to: i32, from: i32) -> Answer {
    w.enable(to, cap::VM_COPY_ENC_CONTEXT_FROM, from as u64)
}

/// `KVM_SET_GUEST_DEBUG`.
pub(crate) fn debug(w: &World, vcpu: i32, control: u32) -> Answer {
    let args = GuestDebug {
        control: U32::new(control),
        ..GuestDebug::default()
    };
    w.call(vcpu, ioctl::KVM_SET_GUEST_DEBUG, &args)
}

/// Gives the guest a DR7 with that beside its fixed bit.
pub(crate) fn break_at(w: &World, vcpu: i32, enabled: u64) -> Answer {
    let mut regs: DebugRegs = w.fetch(vcpu, ioctl::KVM_GET_DEBUGREGS)?;
    regs.dr7 = U64::new(0x400 | enabled);
    w.call(vcpu, ioctl::KVM_SET_DEBUGREGS, &regs)
}

/// With a signal pending.
pub(crate) fn interrupted(w: &World, call: impl FnOnce() -> Answer) -> Answer {
    w.task.set_signal(true);
    let answer = call();
    w.task.set_signal(false);
    answer
}

/// With no free descriptor.
pub(crate) fn full(w: &World, call: impl FnOnce() -> Answer) -> Answer {
    w.task.limit_descriptors(0);
    let answer = call();
    w.task.limit_descriptors(1024);
    answer
}

/// A vCPU whose run page has a byte set.
pub(crate) fn run_with(w: &World, mp_state: u32, at: u64) -> Answer {
    let vm = w.vm(0);
    w.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0)?;
    let vcpu = w.vcpu(vm, 0);
    w.call(vcpu, ioctl::KVM_SET_MP_STATE, &mp_state)?;
    let file = w.task.file(vcpu)?;
    file.run_area().unwrap().write(at, &[1]);
    w.ioctl(vcpu, ioctl::KVM_RUN, 0)
}

pub(crate) fn unmapped(ioctl: Ioctl, fd: impl FnOnce(&World) -> i32, w: &World) -> Answer {
    w.ioctl(fd(w), ioctl, NOWHERE)
}

/// A structure that can be read and not written.
pub(crate) fn sealed<T: IntoBytes + Immutable>(w: &World, args: &T) -> u64 {
    let at = w.task.put(args);
    w.task.protect(at);
    at
}

/// A command whose structure can be read and not written.
pub(crate) fn sealed_command<T: IntoBytes + Immutable>(
    w: &World,
    vm: i32,
    id: u32,
    args: &T,
) -> Answer {
    w.command_at(vm, id, sealed(w, args)).0
}

/// A kernel of its own, where the memory that a check asks for is not there the first time. The call that is
/// refused for it has lost nothing: the same call is done next.
pub(crate) fn short_of_memory<T>(
    vendor: Vendor,
    check: Check,
    prepare: impl FnOnce(&World) -> T,
    call: impl Fn(&World, &T) -> Answer,
) -> Answer {
    let plan = format!("[[fault]]\nmemory = '{}'\nnth = 1", check.call);
    let kernel = Kernel::with_faults(SimHost::new(vendor), Faults::parse(&plan).unwrap());
    let w = World::of(&kernel);
    let prepared = prepare(&w);
    let refused = call(&w, &prepared);
    assert_eq!(kernel.faults().happened(), 1);
    call(&w, &prepared).expect("there is memory now");
    refused
}

/// The command's structure is not there.
pub(crate) fn without_structure(w: &World, vm: i32, id: u32) -> Answer {
    w.command_at(vm, id, NOWHERE).0
}

/// The launch began with `/dev/sev`, which is then closed.
pub(crate) fn sev_closed(w: &World, vm: i32, policy: u32) -> i32 {
    w.launch(vm, policy);
    w.task.close(w.sev).unwrap();
    vm
}

pub(crate) fn fallocate(w: &World, mode: i32, offset: i64, len: i64) -> Answer {
    let file = w.task.file(w.gmem(w.vm(0), 4096))?;
    file.check_fallocate(mode, offset, len).map(|()| 0)
}
