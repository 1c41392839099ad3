//! Registers that are a guest's secret, and runs of guests that are not ready.

use iced_x86::code_asm::*;
use kvm_ops_uapi::checks::run;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::run::{FailEntry, SystemEvent, exit_reason};
use kvm_ops_uapi::sev;
use kvm_ops_uapi::state::{DebugRegs, Fpu, MpState, Regs, Sregs, VcpuEvents, XSAVE_SIZE, Xcrs};
use kvm_ops_uapi::system::vm_type::{SEV, SEV_ES, SNP};
use kvm_ops_uapi::{Errno, cap};
use zerocopy::{FromZeros, IntoBytes};

use crate::guest::*;

fn errno(guest: &Guest, ioctl: Ioctl, bytes: usize) -> Option<Errno> {
    let at = guest.w.task.map(bytes);
    let answer = guest.w.ioctl(guest.vcpu, ioctl, at);
    answer.err().map(|refusal| refusal.errno())
}

/// Groups of registers with their sizes, and those of extended state.
const GROUPS: [(Ioctl, usize); 7] = [
    (ioctl::KVM_GET_REGS, size_of::<Regs>()),
    (ioctl::KVM_SET_REGS, size_of::<Regs>()),
    (ioctl::KVM_GET_SREGS, size_of::<Sregs>()),
    (ioctl::KVM_SET_SREGS, size_of::<Sregs>()),
    (ioctl::KVM_GET_DEBUGREGS, size_of::<DebugRegs>()),
    (ioctl::KVM_SET_DEBUGREGS, size_of::<DebugRegs>()),
    (ioctl::KVM_GET_XCRS, size_of::<Xcrs>()),
];
const EXTENDED: [(Ioctl, usize); 4] = [
    (ioctl::KVM_GET_FPU, size_of::<Fpu>()),
    (ioctl::KVM_SET_FPU, size_of::<Fpu>()),
    (ioctl::KVM_GET_XSAVE, XSAVE_SIZE),
    (ioctl::KVM_SET_XSAVE, XSAVE_SIZE),
];

#[test]
fn registers_are_refused_once_they_are_measured() {
    for kind in SECRET {
        let guest = Guest::prepared(kind, terminate);
        let (regs, bytes) = GROUPS[0];
        assert_eq!(errno(&guest, regs, bytes), None, "not measured yet");
        guest.launch(if kind == SEV_ES { 4 } else { 0 });
        for (ioctl, bytes) in GROUPS {
            let refused = Some(Errno::EINVAL);
            assert_eq!(errno(&guest, ioctl, bytes), refused, "{}", ioctl.name());
        }
        // The kernel never marks an SNP guest's extended state as secret.
        let refused = (kind == SEV_ES).then_some(Errno::EINVAL);
        for (ioctl, bytes) in EXTENDED {
            assert_eq!(errno(&guest, ioctl, bytes), refused, "{}", ioctl.name());
        }
        for (ioctl, bytes) in [
            (ioctl::KVM_GET_MP_STATE, size_of::<MpState>()),
            (ioctl::KVM_GET_VCPU_EVENTS, size_of::<VcpuEvents>()),
        ] {
            assert_eq!(errno(&guest, ioctl, bytes), None, "{}", ioctl.name());
        }
        assert_eq!(guest.run(), exit_reason::SYSTEM_EVENT);
    }
}

/// MTRRphysBase0, and a value that it can have.
const MTRR: (u32, u64) = (0x200, 0x2_3450_0006);

/// RDMSR of it by the GHCB page.
fn reads_mtrr(a: &mut CodeAssembler, snp: bool) -> Assembled {
    const RCX: i32 = 0x308;
    const RDX: i32 = 0x310;
    use_page(a, snp)?;
    page_request(a, 0x7c, [0, 0], &[(RCX, MTRR.0.into())])?;
    a.mov(r12, qword_ptr(r15 + RAX))?;
    a.mov(r13, qword_ptr(r15 + RDX))?;
    say_by_page(a, r12)?;
    say_by_page(a, r13)
}

/// The number of entries that a call for MSRs took, and what is in the first.
fn one_msr(guest: &Guest, ioctl: Ioctl, index: u32, data: u64) -> (i64, u64) {
    let at = guest.w.task.put(&[1, u64::from(index), data]);
    let taken = guest.w.ioctl(guest.vcpu, ioctl, at).unwrap();
    (taken, guest.w.task.get(at + 16).unwrap())
}

#[test]
fn an_msr_beside_the_measured_registers_is_set_before_the_launch_and_stays() {
    for kind in SECRET {
        let code: Part = match kind {
            SNP => |a| reads_mtrr(a, true),
            _ => |a| reads_mtrr(a, false),
        };
        let guest = Guest::prepared(kind, code);
        let (index, value) = MTRR;
        let set = one_msr(&guest, ioctl::KVM_SET_MSRS, index, value);
        assert_eq!(set.0, 1);
        let refused = one_msr(&guest, ioctl::KVM_SET_MSRS, index, value | 0xf00);
        assert_eq!(refused.0, 0, "reserved bits");
        let read = one_msr(&guest, ioctl::KVM_GET_MSRS, index, 0);
        assert_eq!(read, (1, value));
        assert_eq!(one_msr(&guest, ioctl::KVM_GET_MSRS, 0xdead, 0).0, 0);
        guest.launch(if kind == SEV_ES { 4 } else { 0 });
        let said = [guest.says(), guest.says()].map(u64::from);
        assert_eq!(said[1] << 32 | said[0], value);
    }
}

#[test]
fn a_guest_that_became_sev_es_late_answers_without_meaning() {
    let guest = Guest::prepared_by(LATE, terminate, |w, vm| {
        w.bare(vm, sev::ES_INIT).unwrap();
    });
    guest.launch(4);
    for (ioctl, bytes) in GROUPS.iter().chain(&EXTENDED) {
        // Zeros are no valid special registers.
        if *ioctl == ioctl::KVM_SET_SREGS {
            continue;
        }
        assert_eq!(errno(&guest, *ioctl, *bytes), None, "{}", ioctl.name());
    }
    assert_eq!(guest.regs().as_bytes(), Regs::new_zeroed().as_bytes());
    let event: SystemEvent = guest.runs_to(exit_reason::SYSTEM_EVENT);
    assert_eq!(
        event.data[0].get(),
        TERMINATE,
        "its registers are as measured"
    );
}

#[test]
fn the_run_page_carries_no_registers_of_types_with_protected_state() {
    for (kind, allowed) in [(SEV, true), (SEV_ES, false), (SNP, false)] {
        let guest = Guest::new(kind, |a| a.hlt());
        let caps = guest
            .w
            .ioctl(guest.vm, ioctl::KVM_CHECK_EXTENSION, cap::SYNC_REGS.into());
        assert_eq!(caps.unwrap() != 0, allowed);
        guest.area().write(288, &[1]);
        match guest.try_run() {
            Ok(_) => assert!(allowed),
            Err(refusal) => {
                assert!(!allowed);
                assert_eq!(refusal.check(), Some(run::SYNC_REGS));
            }
        }
    }
}

#[test]
fn a_guest_whose_launch_has_not_ended_is_refused_by_the_processor() {
    for kind in KINDS {
        let guest = Guest::prepared(kind, |a| a.hlt());
        let fail: FailEntry = guest.runs_to(exit_reason::FAIL_ENTRY);
        assert_eq!(fail.reason.get(), u64::MAX);
    }
}

#[test]
fn a_vm_that_was_not_initialised_does_not_run() {
    for kind in KINDS {
        let guest = Guest::prepared_by(kind, |a| a.hlt(), |_, _| ());
        assert_eq!(guest.try_run().unwrap_err().check(), Some(run::INITIALIZED));
    }
}

#[test]
fn an_immediate_exit_completes_the_last_one() {
    let guest = Guest::new(SEV, |a| {
        a.in_(eax, 0x90u32)?;
        a.mov(ebx, eax)?;
        a.hlt()
    });
    assert_eq!(guest.run(), exit_reason::IO);
    guest.area().write(4096, &[7, 0, 0, 0]);
    guest.area().write(1, &[1]);
    let refusal = guest.try_run().unwrap_err();
    assert_eq!(refusal.check(), Some(run::IMMEDIATE_EXIT));
    assert_eq!(guest.regs().rax.get(), 7);
    guest.area().write(1, &[0]);
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rbx.get(), 7);
}

/// A context that moves takes its secret registers along; those of a SEV guest are user space's to carry.
#[test]
fn a_guest_goes_on_where_its_context_moved_to() {
    for secret in [false, true] {
        let init = move |w: &crate::common::World, vm: i32| {
            w.bare(vm, if secret { sev::ES_INIT } else { sev::INIT })
                .unwrap();
        };
        let code: Part = match secret {
            true => |a| {
                msr_request(a, 0x080)?;
                a.hlt()?;
                terminate(a)
            },
            false => |a| {
                a.mov(r12d, 0x55)?;
                a.out(u32::from(SAY), eax)?;
                a.mov(eax, r12d)?;
                a.out(u32::from(SAY), eax)
            },
        };
        let mut guest = Guest::prepared_by(LATE, code, init);
        guest.launch(if secret { 4 } else { 0 });
        let first = if secret {
            exit_reason::HLT
        } else {
            exit_reason::IO
        };
        assert_eq!(guest.run(), first);
        let regs = guest.regs();
        let sregs: Sregs = guest.get(guest.vcpu, ioctl::KVM_GET_SREGS);
        let (old, vm) = (guest.vm, guest.w.vm(LATE));
        let vcpu = guest.w.vcpu(vm, 0);
        guest.set_slot_of(vm);
        let moved = guest
            .w
            .enable(vm, cap::VM_MOVE_ENC_CONTEXT_FROM, old as u64);
        moved.unwrap();
        assert_eq!(guest.try_run().unwrap_err().errno(), Errno::EIO);
        (guest.vm, guest.vcpu) = (vm, vcpu);
        if secret {
            assert_eq!(guest.run(), exit_reason::SYSTEM_EVENT);
            continue;
        }
        guest.set_state(vcpu, &sregs, &behind_port_access(regs));
        assert_eq!(guest.says(), 0x55);
    }
}
