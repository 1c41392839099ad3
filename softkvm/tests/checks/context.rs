//! Regions, MOVE and COPY.

use crate::common::World;
use crate::support::*;
use kvm_ops_uapi::checks::{self, *};
use kvm_ops_uapi::ioctl;

pub(crate) const CASES: &[Case] = &[
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
