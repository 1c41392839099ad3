//! Regions, MOVE and COPY.

use std::cell::RefCell;
use std::sync::Arc;

use crate::common::{Answer, World, enable_args};
use crate::support::*;
use kvm_ops::Vendor;
use kvm_ops_softkvm::{AddressSpace, Descriptor, Fault, File, Process, RunArea};
use kvm_ops_uapi::checks::{self, *};
use kvm_ops_uapi::{Errno, cap, ioctl};

/// The world's process, in which a second call is made while the first one asks for signals: it has claimed both VMs
/// then, and locked neither.
struct Meanwhile<'a> {
    w: &'a World,
    second: &'a dyn Fn() -> Answer,
    answer: RefCell<Option<Answer>>,
}

impl Meanwhile<'_> {
    fn enable(&self, vm: i32, cap: u32, argument: i32) -> Answer {
        let at = self.w.task.put(&enable_args(cap, argument as u64));
        self.w
            .task
            .file(vm)?
            .ioctl(self, ioctl::KVM_ENABLE_CAP.number(), at)
    }
}

impl Process for Meanwhile<'_> {
    fn address_space(&self) -> AddressSpace {
        self.w.task.address_space()
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        self.w.task.read(address, into)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.w.task.write(address, bytes)
    }

    fn descriptor(&self, number: i32) -> Descriptor {
        self.w.task.descriptor(number)
    }

    fn reserve(&self) -> Result<i32, Errno> {
        self.w.task.reserve()
    }

    fn install(&self, number: i32, file: File) {
        self.w.task.install(number, file);
    }

    fn release(&self, number: i32) {
        self.w.task.release(number);
    }

    fn run_area(&self, other: Option<&dyn RunArea>) -> Result<Arc<dyn RunArea>, Errno> {
        self.w.task.run_area(other)
    }

    fn signal_pending(&self) -> bool {
        self.answer.replace(Some((self.second)()));
        false
    }
}

/// The answer of a second call in the middle of a first one, which is then done.
fn meanwhile(
    w: &World,
    second: impl Fn() -> Answer,
    first: impl FnOnce(&Meanwhile<'_>) -> Answer,
) -> Answer {
    let process = Meanwhile {
        w,
        second: &second,
        answer: RefCell::default(),
    };
    first(&process)?;
    process.answer.into_inner().unwrap()
}

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
    (reg_region::MEMORY, |_| {
        let prepare = |w: &World| (w.guest(2), w.task.map(4096));
        let call = |w: &World, &(vm, page): &(i32, u64)| {
            region_call(w, vm, ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, page, 4096)
        };
        short_of_memory(Vendor::Amd, reg_region::MEMORY, prepare, call)
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
    (reg_region::RANGE, |w| {
        w.task.limit_pins(of_memory(1));
        let page = w.task.map(8192);
        let call = ioctl::KVM_MEMORY_ENCRYPT_REG_REGION;
        region_call(w, w.guest(2), call, page, 4097)
    }),
    (reg_region::PINNED, |w| {
        // What is pinned twice counts twice.
        w.task.limit_pins(locked(3));
        let (vm, page) = (w.guest(2), w.task.map(8192));
        let call = ioctl::KVM_MEMORY_ENCRYPT_REG_REGION;
        region_call(w, vm, call, page, 8192)?;
        region_call(w, vm, call, page, 4097)
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
    (move_::IDLE, |w| {
        let (to, other, from) = (w.vm(0), w.vm(0), w.late_guest(false));
        meanwhile(
            w,
            || move_of(w, other, from),
            |process| process.enable(to, cap::VM_MOVE_ENC_CONTEXT_FROM, from),
        )
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
    (move_::MEMORY, |_| {
        let prepare = |w: &World| (w.vm(0), w.late_guest(false));
        let call = |w: &World, &(to, from): &(i32, i32)| move_of(w, to, from);
        short_of_memory(Vendor::Amd, move_::MEMORY, prepare, call)
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
    (checks::copy::IDLE, |w| {
        let (to, other, from) = (w.vm(0), w.vm(0), w.late_guest(false));
        meanwhile(
            w,
            || copy_of(w, other, from),
            |process| process.enable(to, cap::VM_MOVE_ENC_CONTEXT_FROM, from),
        )
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
    (checks::copy::MEMORY, |_| {
        let prepare = |w: &World| (w.vm(0), w.late_guest(false));
        let call = |w: &World, &(to, from): &(i32, i32)| copy_of(w, to, from);
        short_of_memory(Vendor::Amd, checks::copy::MEMORY, prepare, call)
    }),
];
