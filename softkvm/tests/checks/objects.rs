//! Files, VMs and vCPUs.

use crate::common::World;
use crate::support::*;
use kvm_ops::Vendor;
use kvm_ops_uapi::checks::{self, *};
use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::system::Cpuid2;
use kvm_ops_uapi::vm::EnableCap;
use kvm_ops_uapi::{U32, cap};

pub(crate) const CASES: &[Case] = &[
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
    (create_vm::DESCRIPTOR, |w| {
        full(w, || w.ioctl(w.kvm, ioctl::KVM_CREATE_VM, 99))
    }),
    (create_vm::TYPE, |w| {
        w.ioctl(w.kvm, ioctl::KVM_CREATE_VM, 64)
    }),
    (create_vm::MEMORY, |_| {
        let call = |w: &World, _: &()| w.ioctl(w.kvm, ioctl::KVM_CREATE_VM, 0);
        short_of_memory(Vendor::Amd, create_vm::MEMORY, |_| (), call)
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
    (create_vcpu::MEMORY, |_| {
        let call = |w: &World, vm: &i32| w.ioctl(*vm, ioctl::KVM_CREATE_VCPU, 0);
        short_of_memory(Vendor::Amd, create_vcpu::MEMORY, |w| w.vm(0), call)
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
    (checks::disable_quirks::KNOWN, |w| {
        w.enable(w.vm(0), cap::DISABLE_QUIRKS2, 1 << 63)
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
    (run::SYNC_REGS, |w| run_with(w, 0, 289)),
    (run::IMMEDIATE_EXIT, |w| run_with(w, 0, 1)),
    (run::INITIALIZED, |w| {
        w.ioctl(w.vcpu(w.vm(2), 0), ioctl::KVM_RUN, 0)
    }),
];
