//! The checks. Each creates its VMs, and tears them down, also after a failure.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Outcome, Subject};
use crate::moves::StagingTable;
use crate::{
    Answer, Backend, CpuId, DebugRegs, EncCmd, EncRegion, Error, Events, Exception, Field,
    FreeReport, Gfn, Gpa, GuestDebug, HostRange, InitialPage, InitialPageKind, KeyReleased,
    MemSlot, MpState, Msr, Pfn, Privacy, Regs, Result, SlotId, Sregs, Step, VcpuId, VcpuOps, VmOps,
    Xcrs, Xsave, cr0,
};

type Check<S> = fn(&mut S) -> Outcome;

pub(super) fn all<S: Subject>() -> Vec<(&'static str, Check<S>)> {
    alloc::vec![
        (
            "VMs have numbers of their own and start as created",
            numbers
        ),
        (
            "initialising and finalising work once, in that order",
            steps
        ),
        (
            "vCPUs are created only while the VM is live",
            vcpus_need_a_live_vm
        ),
        ("a vCPU number is used once and checked", vcpu_numbers),
        (
            "slots are set only while the VM is live",
            slots_need_a_live_vm
        ),
        ("a slot is set, changed and deleted once", slots),
        (
            "the teardown works from every step and gives everything back",
            teardown
        ),
        ("a lost token is made again by the same call", lost_tokens),
        (
            "vCPUs run only while the VM is runnable",
            runs_need_a_runnable_vm
        ),
        (
            "another VM's token is refused and handed back",
            foreign_token
        ),
        (
            "no operation of the VM panics or changes its step",
            vm_operations
        ),
        ("no operation of the vCPU panics", vcpu_operations),
        (
            "state that can be written reads back, and protected state refuses both",
            state_groups
        ),
        (
            "a move of a VM that is not ready fails and changes nothing",
            moves
        ),
        (
            "a guest that moves has one VM, and leaves the other to its teardown",
            guest_moves
        ),
        (
            "a staged guest is received once, and runs on if it is taken back",
            guest_is_staged
        ),
        ("many lives one after the other", many_lives),
    ]
}

/// Turns a check that stops at its first surprise into an outcome.
fn judge(check: impl FnOnce() -> Result<(), String>) -> Outcome {
    match check() {
        Ok(()) => Outcome::Passed,
        Err(why) => Outcome::Failed(why),
    }
}

fn expect<T: PartialEq + core::fmt::Debug>(what: &str, got: T, wanted: T) -> Result<(), String> {
    if got == wanted {
        Ok(())
    } else {
        Err(format!("{what}: got {got:?}, wanted {wanted:?}"))
    }
}

fn said<T>(what: &str, result: Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

/// Takes all steps of the teardown.
fn free<V: VmOps>(mut vm: V) -> Result<FreeReport, String> {
    let id = vm.id();
    let key = said("mmu_release_hkid", vm.mmu_release_hkid())?;
    expect("step after mmu_release_hkid", vm.step(), Step::KeyReleased)?;
    let drained = vm
        .drain_private(key)
        .map_err(|(error, _)| format!("drain_private: {error}"))?;
    expect("step after drain_private", vm.step(), Step::Drained)?;
    let report = vm.vm_free(drained);
    expect("VM named by the report", report.vm, id)?;
    expect("leaks", report.leaks.clone(), Vec::new())?;
    Ok(report)
}

/// Runs `body` on a VM in that step, and frees the VM whatever comes.
fn with_vm<S: Subject>(
    subject: &mut S,
    step: Step,
    body: impl FnOnce(&mut S::Vm) -> Result<(), String>,
) -> Result<(), String> {
    let mut vm = said("create", subject.create())?;
    let found = bring_to(&mut vm, step).and_then(|()| body(&mut vm));
    let freed = free(vm);
    found?;
    freed.map(drop)
}

fn bring_to<V: Backend>(vm: &mut V, step: Step) -> Result<(), String> {
    if step >= Step::Initialized {
        said("vm_init", vm.vm_init())?;
    }
    if step >= Step::Runnable {
        add_vcpu(vm)?;
        said("vm_finalize", vm.vm_finalize())?;
    }
    expect("step", vm.step(), step)
}

/// Gives the VM a vCPU, whose handle goes back at once: a TD without one is not finalised.
fn add_vcpu<V: Backend>(vm: &V) -> Result<(), String> {
    let vcpu = said("create_vcpu", vm.create_vcpu(VcpuId(0)))?;
    said("vcpu_free", vcpu.vcpu_free())
}

fn is_wrong_state<T>(what: &str, step: Step, result: Result<T>) -> Result<(), String> {
    expect(what, result.err(), Some(Error::WrongState(step)))
}

fn numbers<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let a = said("create", subject.create())?;
        let b = said("create", subject.create())?;
        let found = expect(
            "step of a new VM",
            (a.step(), b.step()),
            (Step::Created, Step::Created),
        )
        .and_then(|()| expect("same number", a.id() == b.id(), false));
        let freed = (free(a), free(b));
        found.and(freed.0.map(drop)).and(freed.1.map(drop))
    })
}

fn steps<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        with_vm(subject, Step::Created, |vm| {
            is_wrong_state(
                "vm_finalize before vm_init",
                Step::Created,
                vm.vm_finalize(),
            )?;
            said("vm_init", vm.vm_init())?;
            is_wrong_state("vm_init twice", Step::Initialized, vm.vm_init())?;
            expect("step", vm.step(), Step::Initialized)?;
            add_vcpu(vm)?;
            said("vm_finalize", vm.vm_finalize())?;
            is_wrong_state("vm_finalize twice", Step::Runnable, vm.vm_finalize())?;
            is_wrong_state("vm_init late", Step::Runnable, vm.vm_init())?;
            expect("step", vm.step(), Step::Runnable)
        })
    })
}

fn vcpus_need_a_live_vm<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let mut vm = said("create", subject.create())?;
        is_wrong_state(
            "create_vcpu too early",
            Step::Created,
            vm.create_vcpu(VcpuId(0)),
        )?;
        said("vm_init", vm.vm_init())?;
        let key = said("mmu_release_hkid", vm.mmu_release_hkid())?;
        let late = is_wrong_state(
            "create_vcpu too late",
            Step::KeyReleased,
            vm.create_vcpu(VcpuId(0)),
        );
        free_with(vm, key)?;
        late
    })
}

fn free_with<V: VmOps>(mut vm: V, key: KeyReleased) -> Result<(), String> {
    let drained = vm
        .drain_private(key)
        .map_err(|(error, _)| format!("drain_private: {error}"))?;
    expect("leaks", vm.vm_free(drained).leaks, Vec::new())
}

fn vcpu_numbers<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        with_vm(subject, Step::Initialized, |vm| {
            let first = said("create_vcpu", vm.create_vcpu(VcpuId(0)))?;
            let second = said("create_vcpu", vm.create_vcpu(VcpuId(1)))?;
            expect("numbers", (first.id(), second.id()), (VcpuId(0), VcpuId(1)))?;
            let twice = vm.create_vcpu(VcpuId(0)).err();
            expect(
                "create_vcpu twice",
                twice,
                Some(Error::Exists(Field::Vcpu, 0)),
            )?;
            let huge = vm.create_vcpu(VcpuId(u32::MAX)).err();
            expect(
                "create_vcpu far off",
                huge,
                Some(Error::Invalid(Field::Vcpu, u32::MAX.into())),
            )?;
            said("vcpu_free", first.vcpu_free())?;
            said("vcpu_free", second.vcpu_free())
        })
    })
}

const NO_MEMORY: Outcome = Outcome::Skipped("the subject lends no memory");

fn slots_need_a_live_vm<S: Subject>(subject: &mut S) -> Outcome {
    let Some(memory) = subject.memory() else {
        return NO_MEMORY;
    };
    let slot = MemSlot::new(SlotId(0), Gpa::new(0), memory);
    judge(|| {
        let mut vm = said("create", subject.create())?;
        is_wrong_state(
            "set_memory_slot too early",
            Step::Created,
            vm.set_memory_slot(&slot),
        )?;
        said("vm_init", vm.vm_init())?;
        let key = said("mmu_release_hkid", vm.mmu_release_hkid())?;
        let late = is_wrong_state(
            "set_memory_slot too late",
            Step::KeyReleased,
            vm.set_memory_slot(&slot),
        );
        free_with(vm, key)?;
        late
    })
}

fn slots<S: Subject>(subject: &mut S) -> Outcome {
    let Some(memory) = subject.memory() else {
        return NO_MEMORY;
    };
    judge(|| {
        with_vm(subject, Step::Initialized, |vm| {
            let slot = MemSlot::new(SlotId(0), Gpa::new(0x10_0000), memory);
            let odd = MemSlot {
                gpa: Gpa::new(0x10_0001),
                ..slot
            };
            expect(
                "slot off a page",
                vm.set_memory_slot(&odd),
                Err(Error::Invalid(Field::Gpa, 0x10_0001)),
            )?;
            let wrapped = MemSlot {
                gpa: Gpa::new(!0xfff),
                ..slot
            };
            expect(
                "slot that wraps is refused",
                vm.set_memory_slot(&wrapped).is_err(),
                true,
            )?;
            said("set_memory_slot", vm.set_memory_slot(&slot))?;
            let elsewhere = MemSlot {
                gpa: Gpa::new(0x20_0000),
                ..slot
            };
            expect(
                "deleting a slot of that number at another address is refused",
                vm.delete_memory_slot(&elsewhere).is_err(),
                true,
            )?;
            let mut read_only = slot;
            read_only.flags.read_only = true;
            said("delete_memory_slot", vm.delete_memory_slot(&slot))?;
            match vm.set_memory_slot(&read_only) {
                // Not every host has them for every technology; then the slot is not there.
                Err(Error::HostLacks(_)) => {}
                set => {
                    said("set_memory_slot read-only", set)?;
                    said("delete_memory_slot", vm.delete_memory_slot(&read_only))?;
                }
            }
            expect(
                "slot deleted twice is refused",
                vm.delete_memory_slot(&slot).is_err(),
                true,
            )
        })
    })
}

fn teardown<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        for step in [Step::Created, Step::Initialized, Step::Runnable] {
            with_vm(subject, step, |_| Ok(())).map_err(|why| format!("{step}: {why}"))?;
        }
        Ok(())
    })
}

fn lost_tokens<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let mut vm = said("create", subject.create())?;
        said("vm_init", vm.vm_init())?;
        let _lost = said("mmu_release_hkid", vm.mmu_release_hkid())?;
        let key = said("mmu_release_hkid again", vm.mmu_release_hkid())?;
        let _lost = vm
            .drain_private(key)
            .map_err(|(error, _)| format!("drain_private: {error}"))?;
        let key = said("mmu_release_hkid of a drained VM", vm.mmu_release_hkid())?;
        expect("step of a drained VM", vm.step(), Step::Drained)?;
        free_with(vm, key)
    })
}

fn runs_need_a_runnable_vm<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let mut vm = said("create", subject.create())?;
        let found = runs_in_each_step(&mut vm);
        free(vm).map(drop)?;
        found
    })
}

fn runs_in_each_step<V: Backend>(vm: &mut V) -> Result<(), String> {
    said("vm_init", vm.vm_init())?;
    let mut vcpu = said("create_vcpu", vm.create_vcpu(VcpuId(0)))?;
    is_wrong_state("run too early", Step::Initialized, vcpu.vcpu_run())?;
    said("vm_finalize", vm.vm_finalize())?;
    let _token = said("mmu_release_hkid", vm.mmu_release_hkid())?;
    is_wrong_state("run too late", Step::KeyReleased, vcpu.vcpu_run())?;
    said("vcpu_free", vcpu.vcpu_free())
}

fn foreign_token<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let mut a = said("create", subject.create())?;
        let mut b = said("create", subject.create())?;
        let a_key = said("mmu_release_hkid", a.mmu_release_hkid())?;
        let b_key = said("mmu_release_hkid", b.mmu_release_hkid())?;
        match b.drain_private(a_key) {
            Ok(_) => Err(String::from("drain_private took another VM's token")),
            Err((error, a_key)) => {
                expect("token handed back", a_key.vm(), a.id())?;
                expect("error", error, Error::Invalid(Field::Token, a.id().0))?;
                free_with(a, a_key)?;
                free_with(b, b_key)
            }
        }
    })
}

fn vm_operations<S: Subject>(subject: &mut S) -> Outcome {
    let memory = subject.memory();
    judge(|| {
        for step in [Step::Created, Step::Initialized, Step::Runnable] {
            with_vm(subject, step, |vm| {
                call_everything(vm, memory);
                expect("step after every operation", vm.step(), step)
            })?;
        }
        Ok(())
    })
}

/// Calls what takes arguments from outside with arguments that fit nothing. Answers are the back
/// end's own business; that it answers is what is checked.
fn call_everything<V: Backend>(vm: &mut V, memory: Option<HostRange>) {
    let page = InitialPage {
        gpa: Gpa::new(u64::MAX),
        contents: &[0xa5; 4096],
        kind: InitialPageKind::Measured,
    };
    let _ = vm.add_initial_page(&page);
    let _ = vm.measure_initial_page(Gpa::new(u64::MAX));
    let _ = vm.measurement();
    for pages in [0, 1, u64::MAX] {
        for to in [Privacy::Private, Privacy::Shared] {
            let _ = vm.set_memory_attributes(Gfn::new(u64::MAX), pages, to);
        }
        let _ = vm.pre_fault_memory(Gfn::new(u64::MAX), pages);
    }
    let _ = vm.flush_private_tlb();
    let _ = vm.gmem_max_mapping_level(Pfn::new(u64::MAX), Privacy::Private);
    let mut data = [0xff; 64];
    let mut cmd = EncCmd {
        id: u32::MAX,
        flags: u32::MAX,
        data: &mut data,
        firmware_status: 0,
    };
    let _ = vm.mem_enc_op(&mut cmd);
    let region = EncRegion {
        address: u64::MAX,
        bytes: u64::MAX,
    };
    let _ = vm.mem_enc_register_region(region);
    let _ = vm.mem_enc_unregister_region(region);
    let _ = vm.set_tss_addr(Gpa::new(1));
    let _ = vm.set_identity_map_addr(Gpa::new(1));
    let _ = vm.has_emulated_msr(u32::MAX);
    let _ = vm.deliver_interrupt(VcpuId(u32::MAX), 0);
    let _ = vm.disable_virtualization_cpu(CpuId(u32::MAX));
    if let Some(memory) = memory {
        let slot = MemSlot::new(SlotId(u32::MAX), Gpa::new(0), memory);
        let _ = vm.dirty_log(&slot, &mut []);
        let _ = vm.delete_memory_slot(&slot);
    }
}

fn vcpu_operations<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        with_vm(subject, Step::Initialized, |vm| {
            let mut vcpu = said("create_vcpu", vm.create_vcpu(VcpuId(0)))?;
            call_every_vcpu_operation(&mut vcpu);
            vcpu.kick_handle().kick();
            said("vcpu_free", vcpu.vcpu_free())
        })
    })
}

fn call_every_vcpu_operation<V: VcpuOps>(vcpu: &mut V) {
    for init in [false, true] {
        let _ = vcpu.vcpu_reset(init);
    }
    let _ = vcpu.vcpu_load(CpuId(0));
    vcpu.vcpu_put();
    let _ = vcpu.exit_data().len();
    for answer in [Answer::Value(0), Answer::Msr(0), Answer::InjectGp] {
        let _ = vcpu.answer(answer);
    }
    let mut data = [0xff; 64];
    let mut cmd = EncCmd {
        id: u32::MAX,
        flags: u32::MAX,
        data: &mut data,
        firmware_status: 0,
    };
    let _ = vcpu.vcpu_mem_enc_op(&mut cmd);
    let _ = vcpu.set_cpuid(&[]);
    for index in [0, 0x10, 0xc000_0080, u32::MAX] {
        let _ = vcpu.msrs(&mut [Msr::read(index)]);
        let _ = vcpu.set_msrs(&[Msr::write(index, u64::MAX)]);
    }
    let exception = Exception::new(255, Some(u32::MAX));
    let _ = vcpu.set_events(&Events {
        exception: Some(exception),
        ..Events::default()
    });
    for debug in [true, false] {
        let _ = vcpu.set_guest_debug(GuestDebug {
            enabled: debug,
            single_step: debug,
            hardware: None,
        });
    }
    let _ = (vcpu.inject_irq(u8::MAX), vcpu.inject_nmi());
    let _ = vcpu.enable_irq_window();
    let _ = vcpu.write_tsc_offset(u64::MAX);
    let _ = vcpu.write_tsc_multiplier(0);
    let _ = vcpu.setup_mce(u64::MAX);
}

fn state_groups<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        with_vm(subject, Step::Initialized, |vm| {
            let mut vcpu = said("create_vcpu", vm.create_vcpu(VcpuId(0)))?;
            let found = every_group(&mut vcpu);
            said("vcpu_free", vcpu.vcpu_free())?;
            found
        })
    })
}

/// Writes a group, reads it back, and compares. A group that is refused is refused both ways, by the
/// same error.
fn group<V: VcpuOps, T: PartialEq + core::fmt::Debug>(
    name: &str,
    vcpu: &mut V,
    get: impl Fn(&V) -> Result<T>,
    change: impl Fn(&mut T),
    set: impl Fn(&mut V, &T) -> Result<()>,
    any: T,
) -> Result<(), String> {
    match get(vcpu) {
        Ok(mut value) => {
            change(&mut value);
            said(name, set(vcpu, &value))?;
            expect(name, get(vcpu), Ok(value))
        }
        Err(Error::NotOffered(_)) => expect(
            name,
            matches!(set(vcpu, &any), Err(Error::NotOffered(_))),
            true,
        ),
        Err(Error::Protected(_)) => expect(
            name,
            matches!(set(vcpu, &any), Err(Error::Protected(_))),
            true,
        ),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

fn every_group<V: VcpuOps>(vcpu: &mut V) -> Result<(), String> {
    group(
        "regs",
        vcpu,
        V::regs,
        |r| r.rbx = 0x1234,
        V::set_regs,
        Regs::default(),
    )?;
    group(
        "sregs",
        vcpu,
        V::sregs,
        |s| s.cr2 = 0x1000,
        V::set_sregs,
        Sregs::default(),
    )?;
    let initial = Xsave::initial();
    group("xsave", vcpu, V::xsave, |_| (), V::set_xsave, initial)?;
    let mask = |events: &mut Events| events.nmi.masked = true;
    group(
        "events",
        vcpu,
        V::events,
        mask,
        V::set_events,
        Events::default(),
    )?;
    group(
        "debug_regs",
        vcpu,
        V::debug_regs,
        |d| d.db[0] = 8,
        V::set_debug_regs,
        DebugRegs::default(),
    )?;
    group("xcrs", vcpu, V::xcrs, |_| (), V::set_xcrs, Xcrs::default())?;
    let set_mp_state = |vcpu: &mut V, state: &MpState| vcpu.set_mp_state(*state);
    group(
        "mp_state",
        vcpu,
        V::mp_state,
        |_| (),
        set_mp_state,
        MpState::default(),
    )?;
    if let Ok(sregs) = vcpu.sregs() {
        let paging_without_protection = Sregs {
            cr0: cr0::PG,
            ..sregs
        };
        let refused = vcpu.set_sregs(&paging_without_protection).is_err();
        expect("set_sregs refuses an invalid CR0", refused, true)?;
    }
    Ok(())
}

fn moves<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let mut from = said("create", subject.create())?;
        let mut to = said("create", subject.create())?;
        let moved = S::Vm::move_context(&mut from, &mut to).is_err();
        let copied = S::Vm::copy_context(&mut from, &mut to).is_err();
        let steps = (from.step(), to.step());
        free(from).map(drop)?;
        free(to).map(drop)?;
        expect("a move before vm_init fails", moved, true)?;
        expect("a copy before vm_init fails", copied, true)?;
        expect(
            "steps after a failed move",
            steps,
            (Step::Created, Step::Created),
        )
    })
}

/// Runs `go` on a VM with a guest and one that may take it, and frees both whatever comes.
fn guest_and_room<S: Subject>(
    subject: &mut S,
    go: impl FnOnce(&mut S::Vm, &mut S::Vm) -> Result<(), String>,
) -> Result<(), String> {
    let mut from = said("create", subject.create())?;
    let mut to = said("create", subject.create_receiver())?;
    let found = bring_to(&mut from, Step::Runnable)
        .and_then(|()| bring_to(&mut to, Step::Initialized))
        .and_then(|()| go(&mut from, &mut to));
    let freed = (free(from), free(to));
    found?;
    freed.0.map(drop)?;
    freed.1.map(drop)
}

/// Tries to hand a guest over. An encrypted vCPU may need one there to go on in; then it is created.
fn with_vcpu<V: Backend, T>(
    to: &mut V,
    mut hand_over: impl FnMut(&mut V) -> Result<T>,
) -> Result<Result<T>, String> {
    match hand_over(to) {
        Err(Error::Invalid(Field::VcpuCount, _)) => {
            add_vcpu(to)?;
            Ok(hand_over(to))
        }
        done => Ok(done),
    }
}

fn has_moved<V: Backend>(from: &mut V, to: &mut V) -> Result<(), String> {
    let steps = (from.step(), to.step());
    expect(
        "steps after a move",
        steps,
        (Step::Poisoned, Step::Runnable),
    )?;
    let again = V::move_context(from, to).is_err() && V::move_context(to, from).is_err();
    expect("a second move, and one back, fail", again, true)?;
    let vcpu = from.create_vcpu(VcpuId(1)).is_err();
    expect("the source creates no vCPU", vcpu, true)?;
    expect("steps after that", (from.step(), to.step()), steps)
}

fn guest_moves<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        guest_and_room(subject, |from, to| {
            match with_vcpu(to, |to| S::Vm::move_context(from, to))? {
                Ok(()) => has_moved(from, to),
                Err(Error::NotOffered(_)) => {
                    let steps = (from.step(), to.step());
                    expect("steps", steps, (Step::Runnable, Step::Initialized))
                }
                Err(error) => Err(format!("move_context: {error}")),
            }
        })
    })
}

fn guest_is_staged<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| guest_and_room(subject, stage_twice))
}

fn stage_twice<V: Backend>(from: &mut V, to: &mut V) -> Result<(), String> {
    let table = Arc::new(StagingTable::new());
    let mut drawn = 0;
    let mut send = |from: &mut V| {
        let (mut token, mut random) = (None, |out: &mut [u8]| {
            drawn += 1;
            out.fill(drawn);
            Ok(())
        });
        let staged = from.local_send(&table, &mut random, &mut |made| {
            token = Some(*made);
            Ok(())
        });
        staged.map(|()| token)
    };
    let first = match send(from) {
        Err(Error::NotOffered(_)) => return expect("step", from.step(), Step::Runnable),
        sent => said("local_send", sent)?.ok_or("no token was delivered")?,
    };
    expect("step of a staged VM", from.step(), Step::Poisoned)?;
    said("local_cancel", from.local_cancel())?;
    expect("step after local_cancel", from.step(), Step::Runnable)?;
    let worthless = to.local_receive(&table, &first, &mut |_| Ok(()));
    let not_good = Some(Error::NotFound(Field::Token, 0));
    expect("a token that was taken back", worthless.err(), not_good)?;

    let second = said("local_send", send(from))?.ok_or("no token was delivered")?;
    let receive = |to: &mut V| to.local_receive(&table, &second, &mut |_| Ok(()));
    said("local_receive", with_vcpu(to, receive)?)?;
    expect("a token that was traded", receive(to).err(), not_good)?;
    expect("tokens left", table.len(), 0)?;
    has_moved(from, to)
}

fn many_lives<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        for _ in 0..50 {
            with_vm(subject, Step::Initialized, |vm| {
                let vcpu = said("create_vcpu", vm.create_vcpu(VcpuId(0)))?;
                said("vm_finalize", vm.vm_finalize())?;
                said("vcpu_free", vcpu.vcpu_free())
            })?;
        }
        Ok(())
    })
}
