//! Faults of a plan meet the calls that they name, and leave nothing behind.

use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{Faults, Kernel, Refusal, Task};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::sev::{self, SevCmd, SevInit};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::{Errno, U32, U64, cap};

fn kernel(plan: &str) -> Kernel {
    Kernel::with_faults(SimHost::new(Vendor::Amd), Faults::parse(plan).unwrap())
}

fn errno(answer: Result<i64, Refusal>) -> Option<Errno> {
    let refusal = answer.err()?;
    assert!(refusal.is_injected() && refusal.check().is_none());
    assert!(refusal.to_string().ends_with(" (injected)"), "{refusal}");
    Some(refusal.errno())
}

/// The errnos of so many calls that succeed without a fault.
fn errnos(task: &Task, fd: i32, ioctl: Ioctl, argument: u64, calls: usize) -> Vec<Option<Errno>> {
    let answers = (0..calls).map(|_| task.ioctl(fd, ioctl, argument));
    answers.map(errno).collect()
}

#[test]
fn the_nth_calls_fail_in_whatever_file_they_come() {
    let kernel =
        kernel("[[fault]]\ncall = 'KVM_CREATE_VCPU'\nnth = 2\ntimes = 2\nerrno = 'ENOMEM'");
    let task = Task::new();
    let kvm = task.open(kernel.open_kvm()).unwrap();
    let vms = [0, 0].map(|kind| task.ioctl(kvm, ioctl::KVM_CREATE_VM, kind).unwrap() as i32);
    let create = |vm: usize, id| errno(task.ioctl(vms[vm], ioctl::KVM_CREATE_VCPU, id));
    assert_eq!(create(0, 0), None);
    assert_eq!(create(1, 0), Some(Errno::ENOMEM));
    assert_eq!(create(0, 1), Some(Errno::ENOMEM));
    assert_eq!(create(1, 0), None, "its number was not taken");
    assert_eq!(create(0, 1), None);
    assert_eq!(kernel.faults().happened(), 2);
}

#[test]
fn every_third_call_fails_and_others_do_not_count() {
    let kernel = kernel("[[fault]]\ncall = 'KVM_CHECK_EXTENSION'\nevery = 3\nerrno = 'EIO'");
    let task = Task::new();
    let kvm = task.open(kernel.open_kvm()).unwrap();
    let mut found = Vec::new();
    for _ in 0..3 {
        found.extend(errnos(
            &task,
            kvm,
            ioctl::KVM_CHECK_EXTENSION,
            cap::VM_TYPES.into(),
            2,
        ));
        assert_eq!(task.ioctl(kvm, ioctl::KVM_GET_API_VERSION, 0).unwrap(), 12);
    }
    let fails = Some(Errno::EIO);
    assert_eq!(found, [None, None, fails, None, None, fails]);
}

#[test]
fn faults_at_random_follow_from_their_seed() {
    let run = |seed: u64| {
        let plan = format!(
            "[[fault]]\ncall = 'KVM_GET_API_VERSION'\none_in = 4\nseed = {seed}\nerrno = 'EAGAIN'"
        );
        let task = Task::new();
        let kvm = task.open(kernel(&plan).open_kvm()).unwrap();
        errnos(&task, kvm, ioctl::KVM_GET_API_VERSION, 0, 400)
    };
    let found = run(1);
    let failed = found.iter().flatten().count();
    assert!((50..150).contains(&failed), "{failed}");
    assert_eq!(found, run(1));
    assert_ne!(found, run(2));
}

/// A SEV command of a VM, with what the call left in its structure.
fn command<T: zerocopy::IntoBytes + zerocopy::Immutable>(
    task: &Task,
    (vm, id): (i32, u32),
    value: &T,
) -> Result<SevCmd, Refusal> {
    let cmd = SevCmd {
        id: U32::new(id),
        data: U64::new(task.put(value)),
        ..SevCmd::default()
    };
    task.call(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, &cmd)
}

#[test]
fn a_command_fails_by_its_name_and_the_guest_can_still_be_made() {
    let kernel = kernel("[[fault]]\ncall = 'KVM_SEV_INIT2'\nnth = 1\nerrno = 'EBUSY'");
    let task = Task::new();
    let kvm = task.open(kernel.open_kvm()).unwrap();
    let vm = task.ioctl(kvm, ioctl::KVM_CREATE_VM, vm_type::SNP).unwrap() as i32;
    let init = SevInit::default();
    let other = command(&task, (vm, sev::GUEST_STATUS), &[0u8; 16]);
    assert!(
        !other.unwrap_err().is_injected(),
        "the kernel's own refusal"
    );
    let first = command(&task, (vm, sev::INIT2), &init);
    assert_eq!(errno(first.map(|_| 0)), Some(Errno::EBUSY));
    command(&task, (vm, sev::INIT2), &init).unwrap();
}

/// The ioctl counts whatever command it has, and a structure that cannot be read is the kernel's to refuse.
#[test]
fn the_ioctl_of_commands_can_be_named_itself() {
    let kernel = kernel("[[fault]]\ncall = 'KVM_MEMORY_ENCRYPT_OP'\nnth = 3\nerrno = 'EPERM'");
    let task = Task::new();
    let kvm = task.open(kernel.open_kvm()).unwrap();
    let vm = task.ioctl(kvm, ioctl::KVM_CREATE_VM, vm_type::SEV).unwrap() as i32;
    let bad = task.ioctl(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, 1).unwrap_err();
    assert!(bad.errno() == Errno::EFAULT && !bad.is_injected());
    let init = SevInit::default();
    command(&task, (vm, sev::INIT2), &init).unwrap();
    let third = command(&task, (vm, sev::GUEST_STATUS), &init);
    assert_eq!(errno(third.map(|_| 0)), Some(Errno::EPERM));
}
