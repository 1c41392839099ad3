//! Every check of every call that is served, by a call that fails it; and the order of checks.

mod common;

use std::collections::BTreeSet;

use common::{Answer, World, file_slot, slot, snp_policy};
use kvm_ops_softkvm::Refusal;
use kvm_ops_uapi::checks::{self, *};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::memory::{
    CreateGuestMemfd, MemoryAttributes, PreFaultMemory, UserspaceMemoryRegion,
    UserspaceMemoryRegion2,
};
use kvm_ops_uapi::sev::{self, *};
use kvm_ops_uapi::system::{Cpuid2, DeviceAttr, MsrList};
use kvm_ops_uapi::vm::EnableCap;
use kvm_ops_uapi::{U16, U32, U64, cap};

/// An address that is not mapped.
const NOWHERE: u64 = 0x10;

type Case = (Check, fn(&World) -> Answer);

fn gmem_args(size: u64, flags: u64) -> CreateGuestMemfd {
    CreateGuestMemfd {
        size: U64::new(size),
        flags: U64::new(flags),
        ..CreateGuestMemfd::default()
    }
}

fn attributes_args(address: u64, size: u64, attributes: u64, flags: u64) -> MemoryAttributes {
    MemoryAttributes {
        address: U64::new(address),
        size: U64::new(size),
        attributes: U64::new(attributes),
        flags: U64::new(flags),
    }
}

fn set_attributes(w: &World, kind: u64, args: MemoryAttributes) -> Answer {
    w.call(w.vm(kind), ioctl::KVM_SET_MEMORY_ATTRIBUTES, &args)
}

fn pre_fault_args(gpa: u64, size: u64, flags: u64) -> PreFaultMemory {
    PreFaultMemory {
        gpa: U64::new(gpa),
        size: U64::new(size),
        flags: U64::new(flags),
        ..PreFaultMemory::default()
    }
}

fn pre_fault_of(w: &World, vm: i32, args: PreFaultMemory) -> Answer {
    w.call(w.vcpu(vm, 0), ioctl::KVM_PRE_FAULT_MEMORY, &args)
}

fn set_slot(w: &World, change: impl FnOnce(&mut UserspaceMemoryRegion2)) -> Answer {
    let mut region = slot();
    change(&mut region);
    w.region(w.vm(0), &region)
}

/// A slot that exists, and then a change of it.
fn change_slot(w: &World, change: impl FnOnce(&mut UserspaceMemoryRegion2)) -> Answer {
    let (vm, mut region) = (w.vm(0), slot());
    w.region(vm, &region)?;
    change(&mut region);
    w.region(vm, &region)
}

fn device_attribute(w: &World, group: u32, attr: u64, addr: u64) -> Answer {
    let args = DeviceAttr {
        group: U32::new(group),
        attr: U64::new(attr),
        addr: U64::new(addr),
        ..DeviceAttr::default()
    };
    w.call(w.kvm, ioctl::KVM_GET_DEVICE_ATTR, &args)
}

fn init2_of(w: &World, kind: u64, change: impl FnOnce(&mut SevInit)) -> Answer {
    let mut args = SevInit::default();
    change(&mut args);
    w.command(w.vm(kind), sev::INIT2, &args).0
}

fn start_with(w: &World, dh: (u64, u32), session: (u64, u32)) -> Answer {
    let args = SevLaunchStart {
        dh: U64::new(dh.0),
        dh_len: U32::new(dh.1),
        session: U64::new(session.0),
        session_len: U32::new(session.1),
        ..SevLaunchStart::default()
    };
    w.command(w.guest(2), sev::LAUNCH_START, &args).0
}

fn range(uaddr: u64, len: u32) -> SevRange {
    SevRange {
        uaddr: U64::new(uaddr),
        len: U32::new(len),
        ..SevRange::default()
    }
}

fn secret_with(w: &World, change: impl FnOnce(&mut SevLaunchSecret)) -> Answer {
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

fn dbg_with(w: &World, src: u64, dst: u64, len: u32) -> Answer {
    let args = SevDbg {
        src: U64::new(src),
        dst: U64::new(dst),
        len: U32::new(len),
        ..SevDbg::default()
    };
    w.command(w.guest(2), sev::DBG_DECRYPT, &args).0
}

fn started_snp(w: &World) -> i32 {
    let vm = w.guest(4);
    w.launch_snp(vm);
    vm
}

fn update_with(w: &World, change: impl FnOnce(&mut SnpLaunchUpdate)) -> Answer {
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

fn region_call(w: &World, vm: i32, ioctl: Ioctl, addr: u64, size: u64) -> Answer {
    let args = EncRegion {
        addr: U64::new(addr),
        size: U64::new(size),
    };
    w.call(vm, ioctl, &args)
}

fn mirror_of(w: &World, owner: i32) -> i32 {
    let mirror = w.vm(0);
    w.enable(mirror, cap::VM_COPY_ENC_CONTEXT_FROM, owner as u64)
        .unwrap();
    mirror
}

fn move_of(w: &World, to: i32, from: i32) -> Answer {
    w.enable(to, cap::VM_MOVE_ENC_CONTEXT_FROM, from as u64)
}

fn copy_of(w: &World, to: i32, from: i32) -> Answer {
    w.enable(to, cap::VM_COPY_ENC_CONTEXT_FROM, from as u64)
}

/// With a signal pending.
fn interrupted(w: &World, call: impl FnOnce() -> Answer) -> Answer {
    w.task.set_signal(true);
    let answer = call();
    w.task.set_signal(false);
    answer
}

/// With no free descriptor.
fn full(w: &World, call: impl FnOnce() -> Answer) -> Answer {
    w.task.limit_descriptors(0);
    let answer = call();
    w.task.limit_descriptors(1024);
    answer
}

/// A vCPU whose run page has a byte set.
fn run_with(w: &World, mp_state: u32, at: u64) -> Answer {
    let vcpu = w.vcpu(w.vm(0), 0);
    w.call(vcpu, ioctl::KVM_SET_MP_STATE, &mp_state)?;
    let file = w.task.file(vcpu)?;
    file.run_area().unwrap().write(at, &[1]);
    w.ioctl(vcpu, ioctl::KVM_RUN, 0)
}

fn unmapped(ioctl: Ioctl, fd: impl FnOnce(&World) -> i32, w: &World) -> Answer {
    w.ioctl(fd(w), ioctl, NOWHERE)
}

/// The command's structure is not there.
fn without_structure(w: &World, vm: i32, id: u32) -> Answer {
    w.command_at(vm, id, NOWHERE).0
}

/// The launch began with `/dev/sev`, which is then closed.
fn sev_closed(w: &World, vm: i32, policy: u32) -> i32 {
    w.launch(vm, policy);
    w.task.close(w.sev).unwrap();
    vm
}

const CASES: &[Case] = &[
    // ------------------------------------------------------------------------------ every ioctl
    (any::CREATOR, |w| {
        let vm = w.vm(0);
        w.task.fork().ioctl(vm, ioctl::KVM_CHECK_EXTENSION, 0)
    }),
    (any::ALIVE, |w| {
        let (from, to) = (w.late_guest(false), w.vm(0));
        move_of(w, to, from)?;
        w.ioctl(from, ioctl::KVM_CHECK_EXTENSION, 0)
    }),
    (any::VCPU_TYPE, |w| {
        let file = w.task.file(w.vcpu(w.vm(0), 0))?;
        file.ioctl(&w.task, 0x5401, 0)
    }),
    (any::KNOWN_ON_VM, |w| w.ioctl(w.vm(0), ioctl::KVM_RUN, 0)),
    (any::KNOWN_ON_SYSTEM, |w| w.ioctl(w.kvm, ioctl::KVM_RUN, 0)),
    (any::KNOWN_ON_VCPU, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_CREATE_VM, 0)
    }),
    (any::KNOWN_ON_GMEM, |w| {
        w.ioctl(w.gmem(w.vm(0), 4096), ioctl::KVM_RUN, 0)
    }),
    // ------------------------------------------------------------------------------- VM and vCPU
    (create_vm::DESCRIPTOR, |w| {
        full(w, || w.ioctl(w.kvm, ioctl::KVM_CREATE_VM, 99))
    }),
    (create_vm::TYPE, |w| {
        w.ioctl(w.kvm, ioctl::KVM_CREATE_VM, 64)
    }),
    (create_vcpu::ID, |w| {
        w.ioctl(w.vm(0), ioctl::KVM_CREATE_VCPU, 4096)
    }),
    (create_vcpu::COUNT, |w| {
        let vm = w.vm(0);
        w.task.limit_descriptors(4096);
        for id in 0..1024 {
            w.vcpu(vm, id);
        }
        w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 0)
    }),
    (create_vcpu::UNUSED, |w| {
        let vm = w.vm(0);
        w.task.close(w.vcpu(vm, 7))?;
        w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 7)
    }),
    (create_vcpu::MAX_ID, |w| {
        let vm = w.vm(0);
        w.enable(vm, cap::MAX_VCPU_ID, 5)?;
        w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 5)
    }),
    (create_vcpu::DESCRIPTOR, |w| {
        let vm = w.vm(0);
        full(w, || w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 0))
    }),
    (split_irqchip::GSIS, |w| {
        w.enable(w.vm(0), cap::SPLIT_IRQCHIP, 4097)
    }),
    (split_irqchip::NONE_YET, |w| {
        let vm = w.vm(0);
        w.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0)?;
        w.enable(vm, cap::SPLIT_IRQCHIP, 24)
    }),
    (split_irqchip::NO_VCPU, |w| {
        let vm = w.vm(0);
        w.vcpu(vm, 0);
        w.enable(vm, cap::SPLIT_IRQCHIP, 24)
    }),
    (create_irqchip::NONE_YET, |w| {
        let vm = w.vm(0);
        w.enable(vm, cap::SPLIT_IRQCHIP, 24)?;
        w.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0)
    }),
    (create_irqchip::NO_VCPU, |w| {
        let vm = w.vm(0);
        w.vcpu(vm, 0);
        w.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0)
    }),
    (enable_cap::COPY, |w| {
        unmapped(ioctl::KVM_ENABLE_CAP, |w| w.vm(0), w)
    }),
    (enable_cap::FLAGS, |w| {
        let args = EnableCap {
            flags: U32::new(1),
            ..EnableCap::default()
        };
        w.call(w.vm(0), ioctl::KVM_ENABLE_CAP, &args)
    }),
    (enable_cap::KNOWN, |w| {
        w.enable(w.vm(0), cap::USER_MEMORY, 0)
    }),
    (checks::exit_hypercall::MASK, |w| {
        w.enable(w.vm(0), cap::EXIT_HYPERCALL, 1 << 13)
    }),
    (checks::max_vcpu_id::LIMIT, |w| {
        w.enable(w.vm(0), cap::MAX_VCPU_ID, 4097)
    }),
    (checks::max_vcpu_id::BOOT, |w| {
        let vm = w.vm(0);
        w.ioctl(vm, ioctl::KVM_SET_BOOT_CPU_ID, 3)?;
        w.enable(vm, cap::MAX_VCPU_ID, 2)
    }),
    (checks::max_vcpu_id::ONCE, |w| {
        let vm = w.vm(0);
        w.enable(vm, cap::MAX_VCPU_ID, 8)?;
        w.enable(vm, cap::MAX_VCPU_ID, 8)?;
        w.enable(vm, cap::MAX_VCPU_ID, 9)
    }),
    (device_attr::COPY, |w| {
        w.ioctl(w.kvm, ioctl::KVM_GET_DEVICE_ATTR, NOWHERE)
    }),
    (device_attr::KNOWN, |w| device_attribute(w, 1, 3, NOWHERE)),
    (device_attr::ADDRESS, |w| device_attribute(w, 1, 0, NOWHERE)),
    (set_cpuid2::COPY, |w| {
        unmapped(ioctl::KVM_SET_CPUID2, |w| w.vcpu(w.vm(0), 0), w)
    }),
    (set_cpuid2::COUNT, |w| {
        let nent = U32::new(257);
        let args = Cpuid2 {
            nent,
            ..Cpuid2::default()
        };
        w.call(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_CPUID2, &args)
    }),
    (set_cpuid2::ENTRIES, |w| {
        let nent = U32::new(256);
        let args = Cpuid2 {
            nent,
            ..Cpuid2::default()
        };
        w.call(w.vcpu(w.vm(0), 0), ioctl::KVM_SET_CPUID2, &args)
    }),
    (set_cpuid2::AFTER_RUN, |w| {
        let vcpu = w.vcpu(w.vm(0), 0);
        w.ioctl(vcpu, ioctl::KVM_RUN, 0)?;
        w.call(vcpu, ioctl::KVM_SET_CPUID2, &Cpuid2::default())?;
        let mut list = [0u32; 12];
        list[0] = 1;
        w.call(vcpu, ioctl::KVM_SET_CPUID2, &list)
    }),
    (run::ARGUMENT, |w| {
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_RUN, 1)
    }),
    (run::UNINITIALIZED_EXIT, |w| run_with(w, 1, 1)),
    (run::SYNC_REGS, |w| run_with(w, 0, 288)),
    (run::IMMEDIATE_EXIT, |w| run_with(w, 0, 1)),
    (run::INITIALIZED, |w| {
        w.ioctl(w.vcpu(w.vm(2), 0), ioctl::KVM_RUN, 0)
    }),
    // ---------------------------------------------------------------------------------- regions
    (region::COPY, |w| {
        unmapped(ioctl::KVM_SET_USER_MEMORY_REGION2, |w| w.vm(0), w)
    }),
    (region::OLD_FLAGS, |w| {
        let args = UserspaceMemoryRegion {
            flags: U32::new(4),
            ..UserspaceMemoryRegion::default()
        };
        w.call(w.vm(0), ioctl::KVM_SET_USER_MEMORY_REGION, &args)
    }),
    (region::SLOT, |w| set_slot(w, |r| r.slot = U32::new(32764))),
    (region::FLAGS, |w| set_slot(w, |r| r.flags = U32::new(8))),
    (region::FLAGS, |w| set_slot(w, |r| r.flags = U32::new(5))),
    (region::FLAGS, |w| set_slot(w, |r| r.flags = U32::new(6))),
    (region::FLAGS, |w| {
        let read_only = UserspaceMemoryRegion2 {
            flags: U32::new(2),
            ..slot()
        };
        w.region(w.vm(3), &read_only)
    }),
    (region::SIZE, |w| {
        set_slot(w, |r| r.memory_size = U64::new(0x1001))
    }),
    (region::GPA, |w| {
        set_slot(w, |r| r.guest_phys_addr = U64::new(0x1001))
    }),
    (region::HVA, |w| {
        set_slot(w, |r| r.userspace_addr = U64::new(0x1001))
    }),
    (region::HVA, |w| {
        set_slot(w, |r| r.userspace_addr = U64::new(0x7fff_ffff_e000))
    }),
    (region::HVA, |w| {
        set_slot(w, |r| r.userspace_addr = U64::new(!0xfff))
    }),
    (region::OFFSET, |w| {
        set_slot(w, |r| {
            (r.flags, r.guest_memfd_offset) = (U32::new(4), U64::new(1))
        })
    }),
    (region::OFFSET, |w| {
        set_slot(w, |r| {
            (r.flags, r.guest_memfd_offset) = (U32::new(4), U64::new(!0xfff))
        })
    }),
    (region::ADDRESS_SPACE, |w| {
        set_slot(w, |r| r.slot = U32::new(2 << 16))
    }),
    (region::ADDRESS_SPACE, |w| {
        let smm = UserspaceMemoryRegion2 {
            slot: U32::new(1 << 16),
            ..slot()
        };
        w.region(w.vm(1), &smm)
    }),
    (region::WRAP, |w| {
        set_slot(w, |r| r.guest_phys_addr = U64::new(!0xfff))
    }),
    (region::PAGES, |w| {
        set_slot(w, |r| {
            (r.memory_size, r.userspace_addr) = (U64::new(1 << 43), U64::ZERO)
        })
    }),
    (region::DELETED, |w| {
        set_slot(w, |r| r.memory_size = U64::ZERO)
    }),
    (region::CHANGED, |w| {
        change_slot(w, |r| r.userspace_addr = U64::new(0x1000))
    }),
    (region::CHANGED, |w| {
        change_slot(w, |r| r.memory_size = U64::new(0x1000))
    }),
    (region::CHANGED, |w| {
        change_slot(w, |r| r.flags = U32::new(2))
    }),
    (region::CHANGED, |w| {
        change_slot(w, |r| r.flags = U32::new(4))
    }),
    (region::OVERLAP, |w| {
        change_slot(w, |r| r.slot = U32::new(2))
    }),
    (region::DESCRIPTOR, |w| w.region(w.vm(1), &file_slot(99))),
    (region::FILE, |w| w.region(w.vm(1), &file_slot(0))),
    (region::FILE, |w| w.region(w.vm(1), &file_slot(w.kvm))),
    (region::FILE, |w| {
        w.region(w.vm(1), &file_slot(w.gmem(w.vm(1), 0x20_0000)))
    }),
    (region::FILE, |w| {
        let vm = w.vm(1);
        w.region(vm, &file_slot(w.gmem(vm, 0x1f_f000)))
    }),
    (region::RANGE, |w| {
        set_slot(w, |r| r.guest_phys_addr = U64::new(1 << 52))
    }),
    (region::BOUND, |w| {
        let vm = w.vm(1);
        let gmem = w.gmem(vm, 0x40_0000);
        w.region(vm, &file_slot(gmem))?;
        let mut other = file_slot(w.task.dup(gmem)?);
        (other.slot, other.guest_phys_addr) = (U32::new(2), U64::new(0x100_0000));
        other.guest_memfd_offset = U64::new(0x1f_f000);
        w.region(vm, &other)
    }),
    // ------------------------------------------------------------------------------ guest_memfd
    (gmem::COPY, |w| {
        unmapped(ioctl::KVM_CREATE_GUEST_MEMFD, |w| w.vm(0), w)
    }),
    (gmem::FLAGS, |w| {
        w.call(w.vm(0), ioctl::KVM_CREATE_GUEST_MEMFD, &gmem_args(4096, 4))
    }),
    (gmem::FLAGS, |w| {
        w.call(w.vm(1), ioctl::KVM_CREATE_GUEST_MEMFD, &gmem_args(4096, 2))
    }),
    (gmem::SIZE, |w| {
        w.call(w.vm(0), ioctl::KVM_CREATE_GUEST_MEMFD, &gmem_args(0, 0))
    }),
    (gmem::SIZE, |w| {
        w.call(w.vm(0), ioctl::KVM_CREATE_GUEST_MEMFD, &gmem_args(1, 0))
    }),
    (gmem::SIZE, |w| {
        w.call(
            w.vm(0),
            ioctl::KVM_CREATE_GUEST_MEMFD,
            &gmem_args(1 << 63, 0),
        )
    }),
    (gmem::DESCRIPTOR, |w| {
        let vm = w.vm(0);
        full(w, || {
            w.call(vm, ioctl::KVM_CREATE_GUEST_MEMFD, &gmem_args(4096, 3))
        })
    }),
    (gmem_mmap::ALLOWED, |w| {
        let file = w.task.file(w.gmem(w.vm(0), 4096))?;
        file.check_mmap(true).map(|()| 0)
    }),
    (gmem_mmap::SHARED, |w| {
        let args = gmem_args(4096, 1);
        let gmem = w.call(w.vm(0), ioctl::KVM_CREATE_GUEST_MEMFD, &args)? as i32;
        w.task.file(gmem)?.check_mmap(false).map(|()| 0)
    }),
    (gmem_fallocate::MODE, |w| fallocate(w, 0, 0, 4096)),
    (gmem_fallocate::MODE, |w| fallocate(w, 2, 0, 4096)),
    (gmem_fallocate::MODE, |w| fallocate(w, 1 | 8, 0, 4096)),
    (gmem_fallocate::PAGES, |w| fallocate(w, 3, 1, 4096)),
    (gmem_fallocate::PAGES, |w| fallocate(w, 3, 0, 4095)),
    (gmem_fallocate::SIZE, |w| fallocate(w, 1, 4096, 4096)),
    // ------------------------------------------------------------------------------- attributes
    (attributes::COPY, |w| {
        unmapped(ioctl::KVM_SET_MEMORY_ATTRIBUTES, |w| w.vm(1), w)
    }),
    (attributes::FLAGS, |w| {
        set_attributes(w, 1, attributes_args(0, 4096, 8, 1))
    }),
    (attributes::KNOWN, |w| {
        set_attributes(w, 1, attributes_args(0, 4096, 1, 0))
    }),
    (attributes::KNOWN, |w| {
        set_attributes(w, 0, attributes_args(0, 4096, 8, 0))
    }),
    (attributes::KNOWN, |w| {
        set_attributes(w, 3, attributes_args(0, 4096, 8, 0))
    }),
    (attributes::SIZE, |w| {
        set_attributes(w, 1, attributes_args(0, 0, 8, 0))
    }),
    (attributes::SIZE, |w| {
        set_attributes(w, 1, attributes_args(!0xfff, 8192, 8, 0))
    }),
    (attributes::PAGES, |w| {
        set_attributes(w, 1, attributes_args(1, 4096, 8, 0))
    }),
    (attributes::PAGES, |w| {
        set_attributes(w, 1, attributes_args(0, 4097, 8, 0))
    }),
    (pre_fault::COPY, |w| {
        unmapped(ioctl::KVM_PRE_FAULT_MEMORY, |w| w.vcpu(w.vm(0), 0), w)
    }),
    (pre_fault::FLAGS, |w| {
        pre_fault_of(w, w.vm(0), pre_fault_args(0, 4096, 1))
    }),
    (pre_fault::RANGE, |w| {
        pre_fault_of(w, w.vm(0), pre_fault_args(0, 0, 0))
    }),
    (pre_fault::RANGE, |w| {
        pre_fault_of(w, w.vm(0), pre_fault_args(1, 4096, 0))
    }),
    (pre_fault::RANGE, |w| {
        pre_fault_of(w, w.vm(0), pre_fault_args(!0xfff, 4096, 0))
    }),
    (pre_fault::SIGNAL, |w| {
        interrupted(w, || pre_fault_of(w, w.vm(0), pre_fault_args(0, 4096, 0)))
    }),
    (pre_fault::LAUNCHED, |w| {
        pre_fault_of(w, w.vm(4), pre_fault_args(0, 4096, 0))
    }),
    (pre_fault::SLOT, |w| {
        pre_fault_of(w, w.vm(0), pre_fault_args(0, 4096, 0))
    }),
    (pre_fault::FILE, |w| {
        let vm = w.vm(1);
        let gmem = w.gmem(vm, 0x20_0000);
        w.region(vm, &file_slot(gmem))?;
        let private = attributes_args(0x10_0000, 4096, 8, 0);
        w.call(vm, ioctl::KVM_SET_MEMORY_ATTRIBUTES, &private)?;
        w.task.close(gmem)?;
        pre_fault_of(w, vm, pre_fault_args(0x10_0000, 4096, 0))
    }),
    // -------------------------------------------------------------------- KVM_MEMORY_ENCRYPT_OP
    (encrypt_sev::ENABLED, |_| {
        let w = World::intel();
        w.bare(w.vm(0), sev::INIT)
    }),
    (encrypt_sev::COPY, |w| {
        unmapped(ioctl::KVM_MEMORY_ENCRYPT_OP, |w| w.vm(0), w)
    }),
    (encrypt_sev::MIRROR, |w| {
        let mirror = mirror_of(w, w.late_guest(false));
        (0..23)
            .filter(|id| !sev::MIRROR_COMMANDS.contains(id))
            .for_each(|id| {
                let answer = w.bare(mirror, id).map_err(|refusal| refusal.check());
                assert_eq!(answer, Err(Some(encrypt_sev::MIRROR)), "{id}");
            });
        w.bare(mirror, sev::SNP_LAUNCH_START)
    }),
    (encrypt_sev::SNP, |w| w.bare(w.guest(4), sev::GUEST_STATUS)),
    (encrypt_sev::KNOWN, |w| w.bare(w.vm(0), 14)),
    (init::TYPE, |w| w.bare(w.vm(2), sev::INIT)),
    (es_init::TYPE, |w| w.bare(w.vm(3), sev::ES_INIT)),
    (init2::ONCE, |w| {
        w.command(w.guest(2), sev::INIT2, &SevInit::default()).0
    }),
    (init2::TYPE, |w| init2_of(w, 0, |_| ())),
    (init2::TYPE, |w| init2_of(w, 1, |_| ())),
    (init2::COPY, |w| without_structure(w, w.vm(2), sev::INIT2)),
    (init_any::NO_VCPU, |w| {
        let vm = w.vm(0);
        w.vcpu(vm, 0);
        w.bare(vm, sev::ES_INIT)
    }),
    (init_any::FLAGS, |w| {
        init2_of(w, 2, |i| i.flags = U32::new(1))
    }),
    (init_any::FEATURES, |w| {
        init2_of(w, 2, |i| i.vmsa_features = U64::new(1 << 5))
    }),
    (init_any::FEATURES, |w| {
        init2_of(w, 3, |i| i.vmsa_features = U64::new(1))
    }),
    (init_any::FEATURES, |w| {
        init2_of(w, 4, |i| i.vmsa_features = U64::new(1 << 9))
    }),
    (init_any::GHCB, |w| {
        init2_of(w, 2, |i| i.ghcb_version = U16::new(1))
    }),
    (init_any::GHCB, |w| {
        init2_of(w, 3, |i| i.ghcb_version = U16::new(3))
    }),
    (init_any::SNP_GHCB, |w| {
        init2_of(w, 4, |i| i.ghcb_version = U16::new(1))
    }),
    (init_any::ONCE, |w| w.bare(w.late_guest(false), sev::INIT)),
    // -------------------------------------------------------------------------- launch of SEV(-ES)
    (launch_start::SEV, |w| {
        w.command(w.vm(2), sev::LAUNCH_START, &SevLaunchStart::default())
            .0
    }),
    (launch_start::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_START)
    }),
    (launch_start::DH_LEN, |w| {
        start_with(w, (NOWHERE, 0), (0, 0))
    }),
    (launch_start::DH_LEN, |w| {
        start_with(w, (NOWHERE, 16385), (0, 0))
    }),
    (launch_start::DH, |w| {
        start_with(w, (NOWHERE, 16384), (0, 0))
    }),
    (launch_start::SESSION_LEN, |w| {
        start_with(w, (0, 9), (NOWHERE, 0))
    }),
    (launch_start::SESSION, |w| {
        start_with(w, (0, 9), (NOWHERE, 1))
    }),
    (launch_start::SEV_FD, |w| {
        let vm = w.guest(2);
        w.task.close(w.sev)?;
        w.command(vm, sev::LAUNCH_START, &SevLaunchStart::default())
            .0
    }),
    (launch_update_data::SEV, |w| {
        w.command(w.vm(2), sev::LAUNCH_UPDATE_DATA, &range(1, 1)).0
    }),
    (launch_update_data::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_UPDATE_DATA)
    }),
    (launch_update_data::RANGE, |w| {
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(1, 0))
            .0
    }),
    (launch_update_data::RANGE, |w| {
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(!0, 2))
            .0
    }),
    (launch_update_data::PINNED, |w| {
        // The second page is not there.
        let page = w.task.map(4096);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page, 4097))
            .0
    }),
    (launch_update_data::SEV_FD, |w| {
        let page = w.task.map(4096);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page, 4096))
            .0
    }),
    (launch_update_vmsa::ES, |w| {
        w.bare(w.guest(2), sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_update_vmsa::SIGNAL, |w| {
        let vm = w.guest(3);
        interrupted(w, || w.bare(vm, sev::LAUNCH_UPDATE_VMSA))
    }),
    (launch_update_vmsa::PROTECTED, |w| {
        w.bare(w.measured(2), sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_update_vmsa::SEV_FD, |w| {
        let vm = w.guest(3);
        w.vcpu(vm, 0);
        w.bare(vm, sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_secret::SEV, |w| {
        w.command(w.vm(2), sev::LAUNCH_SECRET, &SevLaunchSecret::default())
            .0
    }),
    (launch_secret::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_SECRET)
    }),
    (launch_secret::RANGE, |w| {
        secret_with(w, |s| s.guest_len = U32::ZERO)
    }),
    (launch_secret::PINNED, |w| {
        secret_with(w, |s| s.guest = U64::new(NOWHERE))
    }),
    (launch_secret::TRANS_LEN, |w| {
        secret_with(w, |s| s.trans_len = U32::ZERO)
    }),
    (launch_secret::TRANS, |w| {
        secret_with(w, |s| s.trans = U64::new(NOWHERE))
    }),
    (launch_secret::HDR_LEN, |w| {
        secret_with(w, |s| s.hdr_len = U32::new(16385))
    }),
    (launch_secret::HDR, |w| {
        secret_with(w, |s| s.hdr = U64::new(NOWHERE))
    }),
    (launch_secret::SEV_FD, |w| secret_with(w, |_| ())),
    (launch_measure::SEV, |w| {
        w.command(w.vm(3), sev::LAUNCH_MEASURE, &range(0, 0)).0
    }),
    (launch_measure::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_MEASURE)
    }),
    (launch_measure::LEN, |w| {
        w.command(w.guest(2), sev::LAUNCH_MEASURE, &range(NOWHERE, 16385))
            .0
    }),
    (launch_measure::SEV_FD, |w| {
        w.command(w.guest(2), sev::LAUNCH_MEASURE, &range(0, 0)).0
    }),
    (launch_measure::BUFFER, |w| {
        let vm = w.guest(2);
        w.launch(vm, 0);
        w.command(vm, sev::LAUNCH_MEASURE, &range(NOWHERE, 48)).0
    }),
    (launch_finish::SEV, |w| w.bare(w.vm(0), sev::LAUNCH_FINISH)),
    (launch_finish::SEV_FD, |w| {
        w.bare(sev_closed(w, w.guest(3), 4), sev::LAUNCH_FINISH)
    }),
    (guest_status::SEV, |w| w.bare(w.vm(0), sev::GUEST_STATUS)),
    (guest_status::SEV_FD, |w| {
        w.bare(w.guest(2), sev::GUEST_STATUS)
    }),
    (guest_status::COPY_BACK, |w| {
        let vm = w.guest(2);
        w.launch(vm, 0);
        without_structure(w, vm, sev::GUEST_STATUS)
    }),
    (dbg::SEV, |w| w.bare(w.vm(0), sev::DBG_ENCRYPT)),
    (dbg::COPY, |w| {
        without_structure(w, w.guest(2), sev::DBG_ENCRYPT)
    }),
    (dbg::GIVEN, |w| dbg_with(w, 0, 1, 1)),
    (dbg::GIVEN, |w| dbg_with(w, 1, 0, 1)),
    (dbg::GIVEN, |w| dbg_with(w, 1, 1, 0)),
    (dbg::WRAP, |w| dbg_with(w, !0, 1, 2)),
    (dbg::WRAP, |w| dbg_with(w, 1, !0, 2)),
    (dbg::PINNED, |w| dbg_with(w, NOWHERE, NOWHERE, 1)),
    (dbg::SEV_FD, |w| {
        let page = w.task.map(4096);
        dbg_with(w, page, page, 1)
    }),
    // -------------------------------------------------------------------------------------- SNP
    (snp_launch_start::SNP, |w| {
        w.command(w.guest(3), 100, &snp_policy(0x3_0000)).0
    }),
    (snp_launch_start::COPY, |w| {
        without_structure(w, w.guest(4), 100)
    }),
    (snp_launch_start::ONCE, |w| {
        w.command(started_snp(w), 100, &snp_policy(0x3_0000)).0
    }),
    (snp_launch_start::FLAGS, |w| {
        let args = SnpLaunchStart {
            flags: U16::new(1),
            ..snp_policy(0x3_0000)
        };
        w.command(w.guest(4), 100, &args).0
    }),
    (snp_launch_start::POLICY, |w| {
        w.command(w.guest(4), 100, &snp_policy(1 << 18)).0
    }),
    (snp_launch_start::RESERVED, |w| {
        w.command(w.guest(4), 100, &snp_policy(1 << 16)).0
    }),
    (snp_launch_start::SEV_FD, |w| {
        let vm = w.guest(4);
        w.task.close(w.sev)?;
        w.command(vm, 100, &snp_policy(0x3_0000)).0
    }),
    (snp_launch_update::SNP, |w| w.bare(w.guest(4), 101)),
    (snp_launch_update::COPY, |w| {
        without_structure(w, started_snp(w), 101)
    }),
    (snp_launch_update::LEN, |w| {
        update_with(w, |u| u.len = U64::ZERO)
    }),
    (snp_launch_update::LEN, |w| {
        update_with(w, |u| u.len = U64::new(4097))
    }),
    (snp_launch_update::FLAGS, |w| {
        update_with(w, |u| u.flags = U16::new(1))
    }),
    (snp_launch_update::TYPE, |w| update_with(w, |u| u.kind = 2)),
    (snp_launch_update::TYPE, |w| update_with(w, |u| u.kind = 7)),
    (snp_launch_update::SOURCE, |w| {
        update_with(w, |u| u.uaddr = U64::ZERO)
    }),
    (snp_launch_update::SOURCE, |w| {
        update_with(w, |u| u.uaddr = U64::new(0x1001))
    }),
    (snp_launch_update::SLOT, |w| {
        update_with(w, |u| u.gfn_start = U64::ZERO)
    }),
    (snp_launch_update::SLOT, |w| {
        update_with(w, |u| u.gfn_start = U64::new(!0))
    }),
    // The attribute of the page is not private.
    (snp_launch_update::FIRST_PAGE, |w| update_with(w, |_| ())),
    (snp_launch_finish::SNP, |w| w.bare(w.guest(2), 102)),
    (snp_launch_finish::STARTED, |w| w.bare(w.guest(4), 102)),
    (snp_launch_finish::COPY, |w| {
        without_structure(w, started_snp(w), 102)
    }),
    (snp_launch_finish::FLAGS, |w| {
        let args = SnpLaunchFinish {
            flags: U16::new(1),
            ..SnpLaunchFinish::default()
        };
        w.command(started_snp(w), 102, &args).0
    }),
    (snp_launch_finish::PROTECTED, |w| {
        let vm = w.guest(4);
        w.vcpu(vm, 0);
        w.launch_snp(vm);
        w.command(vm, 102, &SnpLaunchFinish::default()).0?;
        w.command(vm, 102, &SnpLaunchFinish::default()).0
    }),
    (snp_launch_finish::ID_BLOCK, |w| {
        let args = SnpLaunchFinish {
            id_block_en: 1,
            ..SnpLaunchFinish::default()
        };
        w.command(started_snp(w), 102, &args).0
    }),
    (snp_launch_finish::SEV_FD, |w| {
        let vm = started_snp(w);
        w.task.close(w.sev)?;
        w.command(vm, 102, &SnpLaunchFinish::default()).0
    }),
    // --------------------------------------------------------------------- regions, MOVE and COPY
    (reg_region::COPY, |w| {
        unmapped(ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, |w| w.vm(0), w)
    }),
    (reg_region::SEV, |w| {
        region_call(w, w.vm(2), ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, 0, 0)
    }),
    (reg_region::MIRROR, |w| {
        let mirror = mirror_of(w, w.late_guest(false));
        region_call(w, mirror, ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, 0, 0)
    }),
    (reg_region::RANGE, |w| {
        region_call(w, w.guest(2), ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, 0, 0)
    }),
    (reg_region::PINNED, |w| {
        region_call(
            w,
            w.guest(2),
            ioctl::KVM_MEMORY_ENCRYPT_REG_REGION,
            NOWHERE,
            1,
        )
    }),
    (unreg_region::COPY, |w| {
        unmapped(ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION, |w| w.vm(0), w)
    }),
    (unreg_region::MIRROR, |w| {
        let mirror = mirror_of(w, w.late_guest(false));
        region_call(w, mirror, ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION, 0, 0)
    }),
    (unreg_region::SEV, |w| {
        region_call(w, w.vm(0), ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION, 0, 0)
    }),
    (unreg_region::KNOWN, |w| {
        let (vm, page) = (w.guest(2), w.task.map(8192));
        region_call(w, vm, ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, page, 8192)?;
        region_call(w, vm, ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION, page, 4096)
    }),
    (move_::HOST, |_| {
        let w = World::intel();
        move_of(&w, w.vm(0), w.vm(0))
    }),
    (move_::FILE, |w| move_of(w, w.vm(0), w.kvm)),
    (move_::OTHER, |w| {
        let vm = w.vm(0);
        move_of(w, vm, w.task.dup(vm)?)
    }),
    (move_::SIGNAL, |w| {
        let (to, from) = (w.vm(0), w.late_guest(false));
        interrupted(w, || move_of(w, to, from))
    }),
    (move_::TYPE, |w| move_of(w, w.vm(0), w.guest(2))),
    (move_::DESTINATION, |w| {
        move_of(w, w.late_guest(false), w.late_guest(false))
    }),
    (move_::SOURCE, |w| move_of(w, w.vm(0), w.vm(0))),
    (move_::SOURCE, |w| move_of(w, w.vm(4), w.guest(4))),
    (move_::VCPUS, |w| move_of(w, w.vm(0), w.measured(1))),
    (move_::VCPUS, |w| {
        let (to, from) = (w.vm(0), w.late_guest(true));
        w.vcpu(to, 0);
        w.vcpu(from, 0);
        move_of(w, to, from)
    }),
    (checks::copy::HOST, |_| {
        let w = World::intel();
        copy_of(&w, w.vm(0), w.vm(0))
    }),
    (checks::copy::FILE, |w| copy_of(w, w.vm(0), -1)),
    (checks::copy::OTHER, |w| {
        let vm = w.late_guest(false);
        copy_of(w, vm, vm)
    }),
    (checks::copy::SIGNAL, |w| {
        let (to, from) = (w.vm(0), w.late_guest(false));
        interrupted(w, || copy_of(w, to, from))
    }),
    (checks::copy::MIRROR, |w| {
        let to = w.vm(0);
        w.vcpu(to, 0);
        copy_of(w, to, w.late_guest(false))
    }),
    (checks::copy::SOURCE, |w| {
        copy_of(w, w.vm(0), mirror_of(w, w.late_guest(false)))
    }),
    (checks::copy::SOURCE, |w| copy_of(w, w.vm(0), w.guest(4))),
];

/// Checks that no single-threaded call on this machine can fail.
const UNREACHED: &[(Check, &str)] = &[
    (create_vm::MEMORY, "memory does not run out"),
    (create_vcpu::MEMORY, "a task always has a run area"),
    (create_vcpu::TD_INITIALIZED, "TDs are not served"),
    (create_vcpu::TD_SPLIT_IRQCHIP, "TDs are not served"),
    (create_irqchip::NOT_TD, "TDs are not served"),
    (run::COMPLETION, "no exit waits for an answer"),
    (region::MEMORY, "memory does not run out"),
    (gmem::MEMORY, "memory does not run out"),
    (attributes::MEMORY, "memory does not run out"),
    (pre_fault::SHARED_BIT, "TDs are not served"),
    (encrypt_sev::COPY_BACK, "what a task can read it can write"),
    (es_init::ENABLED, "the machine has SEV-ES"),
    (init_any::RANGE, "the machine has ASIDs of each kind"),
    (init_any::ASID, "tests/moves.rs takes them all"),
    (launch_start::COPY_BACK, "what a task can read it can write"),
    (
        launch_update_vmsa::DEBUGGED,
        "KVM_SET_GUEST_DEBUG is not served",
    ),
    (
        launch_measure::COPY_BACK,
        "what a task can read it can write",
    ),
    (
        snp_launch_update::COPY_BACK,
        "what a task can read it can write",
    ),
    (move_::IDLE, "tests/moves.rs, with several threads"),
    (move_::MEMORY, "memory does not run out"),
    (checks::copy::IDLE, "tests/moves.rs, with several threads"),
    (checks::copy::MEMORY, "memory does not run out"),
];

/// Tables of calls that are refused as a whole.
const UNSERVED: &[&[Check]] = &[
    encrypt_tdx::ALL,
    encrypt_tdx_vcpu::ALL,
    tdx_capabilities::ALL,
    tdx_init_vm::ALL,
    tdx_init_vcpu::ALL,
    tdx_init_mem_region::ALL,
    tdx_finalize_vm::ALL,
    tdx_get_cpuid::ALL,
    send_start::ALL,
    send_update_data::ALL,
    send_end::ALL,
    receive_start::ALL,
    receive_update_data::ALL,
    receive_finish::ALL,
    snp_enable_req_certs::ALL,
];

fn fallocate(w: &World, mode: i32, offset: i64, len: i64) -> Answer {
    let file = w.task.file(w.gmem(w.vm(0), 4096))?;
    file.check_fallocate(mode, offset, len).map(|()| 0)
}

#[test]
fn each_check_is_failed_by_a_call_and_answers_its_errno() {
    for (number, (check, call)) in CASES.iter().enumerate() {
        let answer = call(&World::amd());
        let failed = answer.as_ref().err().and_then(Refusal::check);
        assert_eq!(failed, Some(*check), "case {number} of {check}: {answer:?}");
        assert_eq!(answer.unwrap_err().errno(), check.errno);
    }
}

#[test]
fn every_check_of_a_served_call_has_a_case_or_a_reason() {
    let cases: BTreeSet<Check> = CASES.iter().map(|(check, _)| *check).collect();
    let unreached: BTreeSet<Check> = UNREACHED.iter().map(|(check, _)| *check).collect();
    assert_eq!(cases.intersection(&unreached).next(), None);
    for table in checks::TABLES {
        let served = !UNSERVED.contains(table);
        for check in *table {
            let known = cases.contains(check) || unreached.contains(check);
            assert_eq!(known, served, "{check}");
        }
    }
}

type Mistake<T> = (Check, fn(&mut T));

/// Makes every pair of mistakes, and expects the one that the kernel finds first.
fn first_of_two<T: Copy>(right: T, mistakes: &[Mistake<T>], call: impl Fn(&T) -> Answer) {
    for (first, (check, make)) in mistakes.iter().enumerate() {
        for (later, make_later) in &mistakes[first..] {
            let mut wrong = right;
            make_later(&mut wrong);
            make(&mut wrong);
            let failed = call(&wrong).err().and_then(|refusal| refusal.check());
            assert_eq!(failed, Some(*check), "with {later}");
        }
    }
}

#[test]
fn of_two_mistakes_in_a_slot_the_first_in_order_is_told() {
    let w = World::amd();
    let vm = w.vm(1);
    let gmem = w.gmem(vm, 0x20_0000);
    let mistakes: &[Mistake<UserspaceMemoryRegion2>] = &[
        (region::SLOT, |r| r.slot = U32::new(r.slot.get() | 0xffff)),
        (region::FLAGS, |r| r.flags = U32::new(r.flags.get() | 8)),
        (region::SIZE, |r| {
            r.memory_size = U64::new(r.memory_size.get() | 1)
        }),
        (region::GPA, |r| {
            r.guest_phys_addr = U64::new(r.guest_phys_addr.get() | 1)
        }),
        (region::HVA, |r| r.userspace_addr = U64::new(1 << 63)),
        (region::OFFSET, |r| r.guest_memfd_offset = U64::new(1)),
        (region::ADDRESS_SPACE, |r| {
            r.slot = U32::new(r.slot.get() | 1 << 16)
        }),
        (region::WRAP, |r| {
            r.guest_phys_addr = U64::new(!0xfff | r.guest_phys_addr.get())
        }),
        (region::DESCRIPTOR, |r| r.guest_memfd = U32::new(99)),
    ];
    first_of_two(file_slot(gmem), mistakes, |region| w.region(vm, region));
    w.region(vm, &file_slot(gmem)).expect("no mistake");
}

#[test]
fn of_two_mistakes_in_attributes_the_first_in_order_is_told() {
    let w = World::amd();
    let mistakes: &[Mistake<MemoryAttributes>] = &[
        (attributes::FLAGS, |a| a.flags = U64::new(1)),
        (attributes::KNOWN, |a| a.attributes = U64::new(16)),
        (attributes::SIZE, |a| a.size = U64::ZERO),
        (attributes::PAGES, |a| a.address = U64::new(1)),
    ];
    first_of_two(attributes_args(0x1000, 0x1000, 8, 0), mistakes, |args| {
        set_attributes(&w, 1, *args)
    });
}

#[test]
fn lists_that_are_too_short_are_e2big_and_tell_their_length() {
    let w = World::amd();
    for list in [
        ioctl::KVM_GET_MSR_INDEX_LIST,
        ioctl::KVM_GET_MSR_FEATURE_INDEX_LIST,
    ] {
        let at = w.task.map(4 + 64 * 4);
        assert_eq!(w.ioctl(w.kvm, list, at).unwrap_err().errno().0, 7);
        let needed: MsrList = w.task.get(at).unwrap();
        assert_ne!(needed.nmsrs.get(), 0);
        assert_eq!(w.ioctl(w.kvm, list, at), Ok(0), "the room was not touched");
    }
    let mut nent = 1;
    let head = loop {
        let at = w.task.map(8 + nent as usize * 40);
        let args = Cpuid2 {
            nent: U32::new(nent),
            ..Cpuid2::default()
        };
        kvm_ops_softkvm::Process::write(&w.task, at, zerocopy::IntoBytes::as_bytes(&args)).unwrap();
        match w.ioctl(w.kvm, ioctl::KVM_GET_SUPPORTED_CPUID, at) {
            Ok(_) => break w.task.get::<Cpuid2>(at).unwrap(),
            Err(refusal) => assert_eq!(refusal.errno().0, 7),
        }
        nent += 1;
    };
    assert_eq!(
        head.nent.get(),
        nent,
        "the least room that is enough is the number of entries"
    );
}
