//! Guests that move between VMs of one host, and mirrors: the moves of the software platform, by the kernel's calls.

use kvm_ops::kvm::KvmHost;
use kvm_ops::{
    AnyVcpu, AnyVm, Call, EncCmd, Error, Exit, Field, Gpa, InitialPage, InitialPageKind, Privacy,
    Result, SevParams, SlotId, Step, Tech, VcpuId, VcpuOps, Vm, VmOps, create,
};
use vm_memory::MmapRegion;

use crate::common::inside;
use crate::guest::*;

type Guest = Vm<AnyVm<KvmHost>>;
type Vcpu = AnyVcpu<KvmHost>;

/// The technologies whose guests the kernel moves.
const MOVE: [Tech; 2] = [Tech::Sev, Tech::SevEs];
/// The offset of the reset vector in the last page.
const RESET: usize = 0xff0;
/// The offset of a counter there.
const COUNT: usize = 0xf00;
/// KVM_SYSTEM_EVENT_SEV_TERM.
const SEV_TERM: u32 = 6;

/// A program that leaves the guest with a number. That of SEV counts, by a port. Of SEV-ES the host sees no registers: that
/// asks to end (GHCB specification, 2.3.1), with the number of times that it began.
fn program(tech: Tech) -> [u8; 4096] {
    let mut page = [0x90; 4096];
    let code: &[u8] = match tech {
        // again: inc al; out 0x80, al; jmp again
        Tech::Sev => &[0xfe, 0xc0, 0xe6, 0x80, 0xeb, 0xfa],
        _ => &[
            0x2e, 0x66, 0xff, 0x06, 0x00, 0xff, // inc dword cs:[COUNT]
            0x2e, 0x66, 0xa1, 0x00, 0xff, // mov eax, cs:[COUNT]
            0x66, 0xc1, 0xe0, 0x10, // shl eax, 16
            0xb4, 0x01, // mov ah, 1: "end"
            0x66, 0xb9, 0x30, 0x01, 0x01, 0xc0, // mov ecx, the GHCB MSR
            0x66, 0x31, 0xd2, // xor edx, edx
            0x0f, 0x30, // wrmsr
            0xf3, 0x0f, 0x01, 0xd9, // again: vmgexit
            0xeb, 0xfa, // jmp again
        ],
    };
    page[..code.len()].copy_from_slice(code);
    page[COUNT..COUNT + 4].fill(0);
    // jmp to the begin of the page.
    page[RESET..RESET + 3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    page
}

/// The number that the program leaves with the `times`th time.
fn number(tech: Tech, times: u64) -> u64 {
    match tech {
        Tech::Sev => times,
        _ => 1,
    }
}

fn movable(tech: Tech) -> SevParams {
    SevParams {
        // Debug commands are allowed; the rest is the technology's.
        policy: Some(if tech == Tech::SevEs { 1 << 2 } else { 0 }),
        ghcb_version: 1,
        movable: true,
        ..SevParams::default()
    }
}

/// A VM whose guest arrives from another.
fn awaiting(host: &KvmHost, tech: Tech) -> Guest {
    let params = SevParams {
        arrives: true,
        ..SevParams::default()
    };
    create(host, &config(tech, params)).unwrap()
}

/// A guest with the program as its last page, in its launch.
fn launching(
    host: &KvmHost,
    params: SevParams,
    tech: Tech,
    memory: &MmapRegion<()>,
) -> (Guest, Vcpu) {
    let mut vm = create(host, &config(tech, params)).unwrap();
    vm.set_memory_slot(slot(memory)).unwrap();
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    vm.add_initial_page(&InitialPage {
        gpa: Gpa::new(FIRST + (PAGES - 1) * 4096),
        contents: &program(tech),
        kind: InitialPageKind::Measured,
    })
    .unwrap();
    (vm, vcpu)
}

/// The same guest, launched.
fn counting(
    host: &KvmHost,
    params: SevParams,
    tech: Tech,
    memory: &MmapRegion<()>,
) -> (Guest, Vcpu) {
    let (mut vm, vcpu) = launching(host, params, tech, memory);
    vm.finalize().unwrap();
    (vm, vcpu)
}

/// Runs to the next number. A move that was refused has kicked the vCPU.
fn next(vcpu: &mut Vcpu) -> u64 {
    match vcpu.vcpu_run() {
        Ok(Exit::Interrupted) => next(vcpu),
        Ok(Exit::IoOut { port: 0x80, .. }) => vcpu.exit_data()[0].into(),
        Ok(Exit::SystemEvent { kind: SEV_TERM }) => {
            let value = u64::from_le_bytes(*vcpu.exit_data().first_chunk().unwrap());
            assert_eq!(value & 0xffff, 0x100);
            value >> 16
        }
        other => panic!("{other:?}"),
    }
}

/// Hands the last exit's answer over: the guest does no more.
fn finish(vcpu: &mut Vcpu) {
    vcpu.kick_handle().kick();
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
}

/// Moves a guest, and its registers where the host sees them.
fn move_on(host: &KvmHost, from: &mut Guest, old: &mut Vcpu) -> (Guest, Vcpu) {
    finish(old);
    let mut to = awaiting(host, from.tech());
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    let carried = match from.tech() {
        Tech::Sev => Some((old.regs().unwrap(), old.sregs().unwrap())),
        _ => None,
    };
    from.move_to(&mut to).unwrap();
    if let Some((regs, sregs)) = carried {
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&regs).unwrap();
    }
    (to, vcpu)
}

#[test]
fn a_guest_counts_on_in_each_vm_that_it_moves_to() {
    if !inside("moves::a_guest_counts_on_in_each_vm_that_it_moves_to") {
        return;
    }
    for tech in MOVE {
        let (host, memory) = (host(), memory());
        let (mut vm, mut vcpu) = counting(&host, movable(tech), tech, &memory);
        assert_eq!([next(&mut vcpu), next(&mut vcpu)], [1, number(tech, 2)]);
        for times in [3, 4, 5] {
            let (mut to, mut there) = move_on(&host, &mut vm, &mut vcpu);
            assert_eq!((vm.step(), to.step()), (Step::Poisoned, Step::Runnable));
            assert_eq!(to.slots().count(), 1, "the slots went along");
            assert_eq!(vcpu.vcpu_run(), Err(Error::Poisoned));
            assert_eq!(there.regs().is_err(), tech == Tech::SevEs);
            assert_eq!(next(&mut there), number(tech, times), "{tech}");
            // Nothing goes back, and nothing is left behind.
            assert_eq!(to.move_to(&mut vm), Err(Error::Poisoned));
            drop(vcpu);
            let report = vm.destroy();
            assert!(report.is_clean(), "{report:?}");
            (vm, vcpu) = (to, there);
        }
        drop(vcpu);
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn what_the_guest_shares_moves_along_and_slots_can_be_given_up() {
    if !inside("moves::what_the_guest_shares_moves_along_and_slots_can_be_given_up") {
        return;
    }
    let (host, memory) = (host(), memory());
    let (mut vm, mut vcpu) = counting(&host, movable(Tech::Sev), Tech::Sev, &memory);
    let first = kvm_ops::Gfn::new(START / 4096);
    vm.set_memory_attributes(first, 1, Privacy::Shared).unwrap();
    let (to, there) = move_on(&host, &mut vm, &mut vcpu);
    assert_eq!(to.back_end().privacy(first), Privacy::Shared);
    to.back_end().delete_memory_slot(&slot(&memory)).unwrap();
    to.back_end().set_memory_slot(&slot(&memory)).unwrap();
    drop((vcpu, there));
    assert!(vm.destroy().is_clean() && to.destroy().is_clean());
}

#[test]
fn a_running_guest_is_stopped_for_its_move() {
    if !inside("moves::a_running_guest_is_stopped_for_its_move") {
        return;
    }
    let (host, memory) = (host(), memory());
    let mut vm = create(&host, &config(Tech::Sev, movable(Tech::Sev))).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let mut endless = [0x90; 4096];
    endless[RESET..RESET + 2].copy_from_slice(&[0xeb, 0xfe]);
    vm.add_initial_page(&InitialPage {
        gpa: Gpa::new(FIRST + (PAGES - 1) * 4096),
        contents: &endless,
        kind: InitialPageKind::Measured,
    })
    .unwrap();
    vm.finalize().unwrap();
    let mut to = awaiting(&host, Tech::Sev);
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            loop {
                match vcpu.vcpu_run() {
                    Ok(Exit::Interrupted) => {}
                    other => break other,
                }
            }
        });
        vm.move_to(&mut to).unwrap();
        assert_eq!(runner.join().unwrap(), Err(Error::Poisoned));
    });
    drop(vcpu);
    assert!(vm.destroy().is_clean() && to.destroy().is_clean());
}

#[test]
fn a_mirror_runs_in_its_owners_memory_and_either_may_end_first() {
    if !inside("moves::a_mirror_runs_in_its_owners_memory_and_either_may_end_first") {
        return;
    }
    for (tech, late) in [(Tech::Sev, false), (Tech::Sev, true), (Tech::SevEs, true)] {
        let (host, memory) = (host(), memory());
        let params = match late {
            true => movable(tech),
            false => SevParams::default(),
        };
        let (mut owner, mut vcpu) = launching(&host, params, tech, &memory);
        if tech == Tech::Sev {
            owner.finalize().unwrap();
        }
        let mut mirror = awaiting(&host, tech);
        owner.copy_to(&mut mirror).unwrap();
        assert_eq!(mirror.step(), Step::Runnable);
        mirror.set_memory_slot(slot(&memory)).unwrap();
        let mut other = mirror.create_vcpu(VcpuId(0)).unwrap();
        if tech == Tech::SevEs {
            // Firmware measures registers during the launch only.
            assert!(other.regs().is_ok());
            run(&mut mirror, kvm_ops_uapi::sev::LAUNCH_UPDATE_VMSA).unwrap();
            assert!(matches!(other.regs(), Err(Error::Protected(_))));
            owner.finalize().unwrap();
        }
        assert_eq!(next(&mut vcpu), 1);
        // A vCPU of its own begins in the same memory.
        let began = if tech == Tech::SevEs { 2 } else { 1 };
        assert_eq!(next(&mut other), began);
        assert_eq!(next(&mut vcpu), number(tech, 2));
        drop((vcpu, other));
        let vms = if late {
            [owner, mirror]
        } else {
            [mirror, owner]
        };
        for vm in vms {
            assert!(vm.destroy().is_clean());
        }
    }
}

fn run(vm: &mut Guest, id: u32) -> Result<()> {
    vm.mem_enc_op(&mut EncCmd {
        id,
        flags: 0,
        data: &mut [],
        firmware_status: 0,
    })
}

#[test]
fn a_mirror_has_no_launch_and_no_mirrors() {
    if !inside("moves::a_mirror_has_no_launch_and_no_mirrors") {
        return;
    }
    let (host, memory) = (host(), memory());
    let (mut owner, vcpu) = counting(&host, SevParams::default(), Tech::Sev, &memory);
    let (mut mirror, mut second) = (awaiting(&host, Tech::Sev), awaiting(&host, Tech::Sev));
    owner.copy_to(&mut mirror).unwrap();
    let page = InitialPage {
        gpa: Gpa::new(FIRST),
        contents: &[0; 4096],
        kind: InitialPageKind::Measured,
    };
    let runnable = Err(Error::WrongState(Step::Runnable));
    assert_eq!(mirror.add_initial_page(&page), runnable);
    assert_eq!(
        mirror.copy_to(&mut second),
        Err(Error::Sys(Call::CopyContext, libc::EINVAL))
    );
    assert_eq!(
        run(&mut mirror, kvm_ops_uapi::sev::LAUNCH_FINISH).map_err(|error| error.errno()),
        Err(libc::EINVAL)
    );
    // It moves as every guest does, and is a mirror where it arrives.
    mirror.set_memory_slot(slot(&memory)).unwrap();
    mirror.move_to(&mut second).unwrap();
    assert_eq!(second.add_initial_page(&page), runnable);
    let mut there = second.create_vcpu(VcpuId(0)).unwrap();
    assert_eq!(next(&mut there), 1);
    drop((vcpu, there));
    for vm in [second, mirror, owner] {
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn vms_that_do_not_fit_are_named_and_stay_as_they_were() {
    if !inside("moves::vms_that_do_not_fit_are_named_and_stay_as_they_were") {
        return;
    }
    let (host, memory, elsewhere) = (host(), memory(), memory());
    let named = |vm: &Guest| Err(Error::Invalid(Field::Vm, vm.id().0));
    for tech in MOVE {
        let (mut vm, mut vcpu) = counting(&host, movable(tech), tech, &memory);
        assert_eq!(next(&mut vcpu), 1);

        // A destination that has, or is to have, a guest of its own; one of another technology.
        let mut own = create(&host, &config(tech, movable(tech))).unwrap();
        assert_eq!(vm.move_to(&mut own), named(&own));
        assert_eq!(vm.copy_to(&mut own), named(&own));
        assert_eq!(own.move_to(&mut vm), named(&own), "its launch is not over");
        let mut mirror = awaiting(&host, tech);
        let early = own.copy_to(&mut mirror);
        assert_eq!(
            early,
            Err(Error::WrongState(Step::Initialized)),
            "nor begun"
        );
        let other = if tech == Tech::Sev {
            Tech::SevEs
        } else {
            Tech::Sev
        };
        let mut other = awaiting(&host, other);
        assert_eq!(vm.move_to(&mut other), named(&other));
        // One with slots in other memory.
        let mut to = awaiting(&host, tech);
        to.set_memory_slot(slot(&elsewhere)).unwrap();
        if tech == Tech::Sev {
            assert_eq!(vm.move_to(&mut to), Err(Error::Busy), "an access is open");
            finish(&mut vcpu);
        } else {
            let count = Err(Error::Invalid(Field::VcpuCount, 1));
            assert_eq!(vm.move_to(&mut to), count);
        }
        let there = to.create_vcpu(VcpuId(0)).unwrap();
        assert_eq!(vm.move_to(&mut to), Err(Error::Invalid(Field::Slot, 0)));
        assert_eq!(vm.copy_to(&mut to), named(&to), "it has a vCPU");
        // One in which no guest arrived launches none.
        assert_eq!(to.finalize(), Err(Error::WrongState(Step::Initialized)));

        assert_eq!((vm.step(), to.step()), (Step::Runnable, Step::Initialized));
        assert_eq!(next(&mut vcpu), number(tech, 2), "{tech}");
        to.delete_memory_slot(SlotId(0)).unwrap();
        if tech == Tech::Sev {
            finish(&mut vcpu);
        }
        vm.move_to(&mut to).unwrap();
        drop((vcpu, there));
        for vm in [vm, own, mirror, other, to] {
            assert!(vm.destroy().is_clean());
        }
    }
}

#[test]
fn guests_that_the_kernel_does_not_move_are_refused() {
    if !inside("moves::guests_that_the_kernel_does_not_move_are_refused") {
        return;
    }
    let (host, memory) = (host(), memory());
    // Types 2 and 3 do not run after a move.
    for tech in MOVE {
        let (mut vm, mut vcpu) = counting(&host, SevParams::default(), tech, &memory);
        let mut to = awaiting(&host, tech);
        let there = to.create_vcpu(VcpuId(0)).unwrap();
        let refused = vm.move_to(&mut to);
        assert!(matches!(refused, Err(Error::NotOffered(_))), "{refused:?}");
        assert_eq!(next(&mut vcpu), 1);
        drop((vcpu, there));
        assert!(vm.destroy().is_clean() && to.destroy().is_clean());
    }
    let create = |tech, params| {
        let refused = create(&host, &config(tech, params));
        refused.map(drop).map_err(|failed| failed.error)
    };
    for params in [
        movable(Tech::SevSnp),
        SevParams {
            arrives: true,
            ..SevParams::default()
        },
    ] {
        let refused = create(Tech::SevSnp, params);
        assert!(matches!(refused, Err(Error::HostLacks(_))), "{refused:?}");
    }
    let version = SevParams {
        ghcb_version: 2,
        ..movable(Tech::SevEs)
    };
    assert_eq!(
        create(Tech::SevEs, version.clone()),
        Err(Error::Invalid(Field::Flags, 2))
    );
    assert_eq!(create(Tech::Sev, version), Ok(()), "no GHCB");
    let features = SevParams {
        vmsa_features: 1 << 5,
        ..movable(Tech::SevEs)
    };
    assert_eq!(
        create(Tech::SevEs, features),
        Err(Error::Invalid(Field::Flags, 1 << 5))
    );
}
