//! Slots, guest_memfd, attributes, pre-faults.

use crate::common::{World, file_slot, slot};
use crate::support::*;
use kvm_ops::Vendor;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::memory::*;
use kvm_ops_uapi::{U32, U64};

pub(crate) const CASES: &[Case] = &[
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
    (region::MEMORY, |_| {
        let call = |w: &World, vm: &i32| w.region(*vm, &slot());
        short_of_memory(Vendor::Amd, region::MEMORY, |w| w.vm(0), call)
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
    (gmem::MEMORY, |_| {
        let call =
            |w: &World, vm: &i32| w.call(*vm, ioctl::KVM_CREATE_GUEST_MEMFD, &gmem_args(4096, 0));
        short_of_memory(Vendor::Amd, gmem::MEMORY, |w| w.vm(0), call)
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
    (attributes::MEMORY, |_| {
        let prepare = |w: &World| {
            let vm = w.vm(1);
            w.region(vm, &file_slot(w.gmem(vm, 0x20_0000))).unwrap();
            let vcpu = w.vcpu(vm, 0);
            (vm, vcpu)
        };
        let call = |w: &World, (vm, vcpu): &(i32, i32)| {
            let private = attributes_args(0x10_0000, 4096, 8, 0);
            let answer = w.call(*vm, ioctl::KVM_SET_MEMORY_ATTRIBUTES, &private);
            // Shared memory is not lent here, and private memory is the file's, which is.
            let page = pre_fault_args(0x10_0000, 4096, 0);
            let faulted = w.call(*vcpu, ioctl::KVM_PRE_FAULT_MEMORY, &page);
            assert_eq!(faulted.is_ok(), answer.is_ok(), "nothing changed");
            answer
        };
        short_of_memory(Vendor::Amd, attributes::MEMORY, prepare, call)
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
];
