//! Lives of files and VMs: what keeps what, what ends, and that nothing is left.

mod common;

use common::{World, file_slot, slot};
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{FileKind, Kernel};
use kvm_ops_uapi::memory::{PreFaultMemory, UserspaceMemoryRegion2};
use kvm_ops_uapi::sev::{self, SevGuestStatus, SevRange};
use kvm_ops_uapi::state::{Regs, Sregs};
use kvm_ops_uapi::system::{DeviceAttr, vm_type};
use kvm_ops_uapi::{Errno, U32, U64, cap, ioctl};
use zerocopy::FromZeros;

fn own_machine(vendor: Vendor) -> (SimHost, World) {
    let host = SimHost::new(vendor);
    let world = World::of(&Kernel::new(host.clone()));
    (host, world)
}

#[test]
fn a_vm_ends_with_the_last_of_its_files_in_every_order() {
    let (host, w) = own_machine(Vendor::Amd);
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let vm = w.guest(vm_type::SEV_ES);
        let files = [vm, w.vcpu(vm, 0), w.gmem(vm, 4096)];
        for (closed, index) in order.into_iter().enumerate() {
            assert_eq!(host.live_vms(), 1, "{closed} of {order:?} are closed");
            w.task.close(files[index]).unwrap();
        }
        assert_eq!(host.live_vms(), 0, "{order:?}");
    }
}

#[test]
fn a_duplicate_is_the_same_file_and_keeps_it_open() {
    let (host, w) = own_machine(Vendor::Amd);
    let vm = w.guest(vm_type::SEV);
    let other = w.task.dup(vm).unwrap();
    assert!(
        w.task
            .file(vm)
            .unwrap()
            .is_same(&w.task.file(other).unwrap())
    );
    w.task.close(vm).unwrap();
    assert_eq!(host.live_vms(), 1);
    assert_eq!(
        w.ioctl(other, ioctl::KVM_CHECK_EXTENSION, cap::USER_MEMORY.into()),
        Ok(1)
    );
    w.task.close(other).unwrap();
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn a_slot_does_not_keep_its_file() {
    let w = World::amd();
    let vm = w.vm(vm_type::SW_PROTECTED);
    let first = w.gmem(vm, 0x20_0000);
    w.region(vm, &file_slot(first)).unwrap();
    w.task.close(first).unwrap();
    // The slot stands, and its range of the file is nobody's.
    let second = w.gmem(vm, 0x20_0000);
    let elsewhere = UserspaceMemoryRegion2 {
        slot: U32::new(2),
        guest_phys_addr: U64::new(0x100_0000),
        ..file_slot(second)
    };
    w.region(vm, &elsewhere).unwrap();
    let deleted = UserspaceMemoryRegion2 {
        memory_size: U64::ZERO,
        guest_memfd: U32::new(u32::MAX),
        ..file_slot(first)
    };
    w.region(vm, &deleted)
        .expect("nothing else of the structure matters");
}

#[test]
fn a_slot_moves_and_changes_its_log_and_nothing_else() {
    let w = World::amd();
    let vm = w.vm(vm_type::DEFAULT);
    w.region(vm, &slot()).unwrap();
    let moved = UserspaceMemoryRegion2 {
        guest_phys_addr: U64::new(0x20_0000),
        ..slot()
    };
    w.region(vm, &moved).expect("over its own old place");
    let logged = UserspaceMemoryRegion2 {
        flags: U32::new(1),
        ..moved
    };
    w.region(vm, &logged).unwrap();
    w.region(vm, &logged).expect("nothing changes");
    // 512 pages: eight words of zeros, and not a byte more.
    let bitmap = w.task.put(&[0xffu8; 65]);
    let log = [1u64, bitmap];
    w.call(vm, ioctl::KVM_GET_DIRTY_LOG, &log).unwrap();
    let mut expected = [0u8; 65];
    expected[64] = 0xff;
    assert_eq!(w.task.get::<[u8; 65]>(bitmap).unwrap(), expected);
    w.region(vm, &moved).unwrap();
    let answer = w.call(vm, ioctl::KVM_GET_DIRTY_LOG, &log);
    assert_eq!(
        answer.unwrap_err().errno(),
        Errno::ENOENT,
        "there is no log any more"
    );
}

#[test]
fn pre_faults_stop_where_memory_ends_and_say_how_far_they_came() {
    let w = World::amd();
    let vm = w.vm(vm_type::DEFAULT);
    let memory = w.task.map(2 * 4096);
    let region = UserspaceMemoryRegion2 {
        userspace_addr: U64::new(memory),
        memory_size: U64::new(2 * 4096),
        ..slot()
    };
    w.region(vm, &region).unwrap();
    let vcpu = w.vcpu(vm, 0);
    let args = PreFaultMemory {
        gpa: U64::new(0x10_0000),
        size: U64::new(3 * 4096),
        ..PreFaultMemory::new_zeroed()
    };
    let left = w
        .task
        .call(vcpu, ioctl::KVM_PRE_FAULT_MEMORY, &args)
        .expect("two pages were there");
    assert_eq!((left.gpa.get(), left.size.get()), (0x10_2000, 4096));
    let answer = w.task.call(vcpu, ioctl::KVM_PRE_FAULT_MEMORY, &left);
    assert_eq!(answer.unwrap_err().errno(), Errno::ENOENT);
}

#[test]
fn types_of_vms_are_those_of_the_vendor() {
    let types = |w: &World| {
        w.ioctl(w.kvm, ioctl::KVM_CHECK_EXTENSION, cap::VM_TYPES.into())
            .unwrap()
    };
    for (w, expected) in [(World::amd(), 0b1_1111), (World::intel(), 0b10_0011)] {
        assert_eq!(types(&w), expected);
        // The whole number is compared.
        for kind in (0..64).chain([1 << 32, 1 << 63]) {
            let created = w.ioctl(w.kvm, ioctl::KVM_CREATE_VM, kind);
            assert_eq!(
                created.is_ok(),
                kind < 32 && expected >> kind & 1 != 0,
                "{kind}"
            );
        }
    }
}

#[test]
fn a_vms_answers_about_memory_follow_its_type() {
    let w = World::amd();
    for (kind, attributes, flags, read_only, spaces) in [
        (0, 0, 3, 1, 2),
        (1, 8, 1, 1, 1),
        (2, 0, 3, 1, 2),
        (3, 0, 3, 0, 2),
        (4, 8, 1, 0, 1),
    ] {
        let vm = w.vm(kind);
        let ask = |cap: u32| w.ioctl(vm, ioctl::KVM_CHECK_EXTENSION, cap.into()).unwrap();
        assert_eq!(ask(cap::MEMORY_ATTRIBUTES), attributes, "{kind}");
        assert_eq!(ask(cap::GUEST_MEMFD_FLAGS), flags, "{kind}");
        assert_eq!(ask(cap::READONLY_MEM), read_only, "{kind}");
        assert_eq!(ask(cap::MULTI_ADDRESS_SPACE), spaces, "{kind}");
        assert_eq!(ask(u32::MAX), 0);
    }
}

#[test]
fn registers_of_a_measured_vcpu_are_its_own_by_the_vms_type() {
    let w = World::amd();
    for (vm, secret) in [
        (w.guest(vm_type::SEV_ES), true),
        (w.late_guest(true), false),
    ] {
        let vcpu = w.vcpu(vm, 0);
        let regs = Regs {
            rip: U64::new(0x1234),
            ..Regs::new_zeroed()
        };
        w.call(vcpu, ioctl::KVM_SET_REGS, &regs).unwrap();
        let back = w
            .task
            .call(vcpu, ioctl::KVM_GET_REGS, &Regs::new_zeroed())
            .unwrap();
        assert_eq!((back.rip.get(), back.rflags.get()), (0x1234, 2));
        w.launch(vm, 4);
        w.bare(vm, sev::LAUNCH_UPDATE_VMSA).unwrap();
        let answer = w.call(vcpu, ioctl::KVM_GET_SREGS, &Sregs::new_zeroed());
        assert_eq!(answer.is_err(), secret);
    }
}

#[test]
fn the_status_of_a_launch_is_firmwares() {
    let w = World::amd();
    let vm = w.guest(vm_type::SEV);
    w.launch(vm, 1);
    let status = |state| {
        let (answer, status) = w.command(vm, sev::GUEST_STATUS, &SevGuestStatus::new_zeroed());
        answer.unwrap();
        assert_ne!(status.handle.get(), 0);
        assert_eq!((status.policy.get(), status.state.get()), (1, state));
    };
    status(1);
    // A query: the length, and the firmware's INVALID_LEN.
    let at = w.task.put(&SevRange::new_zeroed());
    let (answer, cmd) = w.command_at(vm, sev::LAUNCH_MEASURE, at);
    assert_eq!(
        (answer.unwrap_err().errno(), cmd.error.get()),
        (Errno::EIO, 4)
    );
    assert_eq!(w.task.get::<SevRange>(at).unwrap().len.get(), 48);
    // Too short: the length stays.
    let buffer = w.task.put(&[0xffu8; 256]);
    let range = |len| SevRange {
        uaddr: U64::new(buffer),
        len: U32::new(len),
        ..SevRange::new_zeroed()
    };
    let (answer, after) = w.command(vm, sev::LAUNCH_MEASURE, &range(47));
    assert_eq!(
        (answer.unwrap_err().errno(), after.len.get()),
        (Errno::EIO, 47)
    );
    status(1);
    // Room for more: as many bytes as there is room for.
    let at = w.task.put(&range(200));
    let (answer, cmd) = w.command_at(vm, sev::LAUNCH_MEASURE, at);
    assert_eq!((answer, cmd.error.get()), (Ok(0), 0));
    assert_eq!(w.task.get::<SevRange>(at).unwrap().len.get(), 48);
    let bytes = w.task.get::<[u8; 256]>(buffer).unwrap();
    assert_ne!(bytes[..48], [0xff; 48]);
    assert_eq!(
        (&bytes[48..200], &bytes[200..]),
        (&[0; 152][..], &[0xff; 56][..])
    );
    status(2);
    w.bare(vm, sev::LAUNCH_FINISH).unwrap();
    status(3);
}

#[test]
fn a_probe_for_sev_is_answered_on_amd_alone() {
    let (amd, intel) = (World::amd(), World::intel());
    assert_eq!(amd.ioctl(amd.vm(0), ioctl::KVM_MEMORY_ENCRYPT_OP, 0), Ok(0));
    let answer = intel.ioctl(intel.vm(0), ioctl::KVM_MEMORY_ENCRYPT_OP, 0);
    assert_eq!(answer.unwrap_err().errno(), Errno::ENOTTY);
    let features = amd.task.put(&0u64);
    let attribute = DeviceAttr {
        group: U32::new(1),
        addr: U64::new(features),
        ..DeviceAttr::new_zeroed()
    };
    amd.call(amd.kvm, ioctl::KVM_GET_DEVICE_ATTR, &attribute)
        .unwrap();
    assert_eq!(amd.task.get::<u64>(features).unwrap(), 1 << 5);
    let answer = intel.call(intel.kvm, ioctl::KVM_HAS_DEVICE_ATTR, &attribute);
    assert_eq!(answer.unwrap_err().errno(), Errno::ENXIO);
}

#[test]
fn three_hundred_guests_of_every_type_come_and_go() {
    let (host, w) = own_machine(Vendor::Amd);
    for _ in 0..100 {
        for kind in [vm_type::SEV, vm_type::SEV_ES, vm_type::SNP] {
            let vm = w.guest(kind);
            assert_eq!(w.task.file(vm).unwrap().kind(), FileKind::Vm);
            w.task.close(vm).unwrap();
        }
    }
    assert_eq!(host.live_vms(), 0);
}
