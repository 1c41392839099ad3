//! Guests that share a context, each with slots of its own.

use iced_x86::code_asm::*;
use kvm_ops_uapi::memory::UserspaceMemoryRegion2;
use kvm_ops_uapi::state::Sregs;
use kvm_ops_uapi::{U64, cap, ioctl, sev};

use crate::guest::*;

#[test]
fn a_mirror_runs_on_from_its_own_slots_when_the_owners_are_gone() {
    let mut guest = Guest::prepared_by(
        LATE,
        |a| {
            for word in [1, 2, 3] {
                a.mov(eax, word)?;
                a.out(u32::from(SAY), eax)?;
            }
            Ok(())
        },
        |w, vm| {
            w.bare(vm, sev::INIT).unwrap();
        },
    );
    guest.launch(0);
    assert_eq!(guest.says(), 1);
    let (owner, owners_vcpu) = (guest.vm, guest.vcpu);
    let sregs: Sregs = guest.get(owners_vcpu, ioctl::KVM_GET_SREGS);
    let regs = behind_port_access(guest.regs());
    let mirror = guest.w.vm(LATE);
    let copy = cap::VM_COPY_ENC_CONTEXT_FROM;
    guest.w.enable(mirror, copy, owner as u64).unwrap();
    guest.set_slot_of(mirror);
    let vcpu = guest.w.vcpu(mirror, 0);
    guest.set_state(vcpu, &sregs, &regs);

    let gone = UserspaceMemoryRegion2 {
        memory_size: U64::ZERO,
        ..UserspaceMemoryRegion2::default()
    };
    guest.w.region(owner, &gone).unwrap();
    (guest.vm, guest.vcpu) = (mirror, vcpu);
    assert_eq!(guest.says(), 2);
    guest.w.task.close(owners_vcpu).unwrap();
    guest.w.task.close(owner).unwrap();
    assert_eq!(guest.says(), 3);
}
