//! The checks. Each creates its VMs, and tears them down whatever it finds.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Outcome, Subject};
use crate::{
    Backend, CpuId, EncCmd, EncRegion, EncTransfer, Error, Exception, Field, FreeReport, Gfn, Gpa,
    HostRange, Hpa, InitialPage, InitialPageKind, KeyReleased, Level, MemSlot, Pfn, Privacy,
    PrivateSpte, Result, SegmentName, SlotId, SpteChange, Step, VcpuId, VcpuOps, VmOps,
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
        ("the key is released once", release_once),
        (
            "another VM's token is refused and handed back",
            foreign_token
        ),
        (
            "no operation of the VM panics or changes its step",
            vm_operations
        ),
        ("no operation of the vCPU panics", vcpu_operations),
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
            let mut read_only = slot;
            read_only.flags.read_only = true;
            let _ = vm.delete_memory_slot(&slot);
            said("set_memory_slot read-only", vm.set_memory_slot(&read_only))?;
            said("delete_memory_slot", vm.delete_memory_slot(&read_only))?;
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

fn release_once<S: Subject>(subject: &mut S) -> Outcome {
    judge(|| {
        let mut vm = said("create", subject.create())?;
        said("vm_init", vm.vm_init())?;
        let key = said("mmu_release_hkid", vm.mmu_release_hkid())?;
        let again = is_wrong_state(
            "mmu_release_hkid twice",
            Step::KeyReleased,
            vm.mmu_release_hkid(),
        );
        free_with(vm, key)?;
        again
    })
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
    let (absent, far) = (PrivateSpte::Absent, PrivateSpte::Mapped(Pfn::new(u64::MAX)));
    for (old, new) in [(absent, far), (far, absent), (far, far), (absent, absent)] {
        for level in Level::ALL {
            let _ = vm.set_private_spte(&SpteChange {
                gfn: Gfn::new(u64::MAX),
                level,
                old,
                new,
            });
        }
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
    for transfer in [EncTransfer::Copy, EncTransfer::Move] {
        if let Ok(context) = vm.release_enc_context(transfer) {
            let _ = vm.adopt_enc_context(context);
        }
    }
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
            if !vcpu.is_valid_cr0(1 << 63) {
                expect(
                    "set_cr0 of what is not valid is refused",
                    vcpu.set_cr0(1 << 63).is_err(),
                    true,
                )?;
            }
            if !vcpu.is_valid_cr4(1 << 63) {
                expect(
                    "set_cr4 of what is not valid is refused",
                    vcpu.set_cr4(1 << 63).is_err(),
                    true,
                )?;
            }
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
    let mut data = [0xff; 64];
    let mut cmd = EncCmd {
        id: u32::MAX,
        flags: u32::MAX,
        data: &mut data,
        firmware_status: 0,
    };
    let _ = vcpu.vcpu_mem_enc_op(&mut cmd);
    if let Ok(regs) = vcpu.get_regs() {
        let _ = vcpu.set_regs(&regs);
    }
    let _ = vcpu.set_cpuid(&[]);
    for msr in [0, 0x10, 0xc000_0080, u32::MAX] {
        let _ = (vcpu.get_msr(msr), vcpu.set_msr(msr, u64::MAX));
    }
    let _ = vcpu.set_efer(u64::MAX);
    for name in SegmentName::ALL {
        let _ = vcpu.get_segment_base(name);
        if let Ok(segment) = vcpu.get_segment(name) {
            let _ = vcpu.set_segment(name, &segment);
        }
    }
    let _ = (vcpu.get_cpl(), vcpu.get_cs_db_l_bits());
    for table in [vcpu.get_idt(), vcpu.get_gdt()].into_iter().flatten() {
        let _ = (vcpu.set_idt(table), vcpu.set_gdt(table));
    }
    let _ = vcpu.set_dr7(0x400);
    let _ = (vcpu.get_rflags(), vcpu.set_rflags(2), vcpu.get_if_flag());
    let _ = (
        vcpu.set_guest_debug(true, true),
        vcpu.set_guest_debug(false, false),
    );
    let _ = vcpu.load_mmu_pgd(Hpa::new(u64::MAX), u8::MAX);
    let _ = (vcpu.inject_irq(u8::MAX), vcpu.inject_nmi());
    for vector in [0, 14, 31, 32, 255] {
        let _ = vcpu.inject_exception(Exception {
            vector,
            error: Some(u32::MAX),
        });
    }
    let _ = (
        vcpu.interrupt_allowed(),
        vcpu.nmi_allowed(),
        vcpu.cancel_injection(),
    );
    let _ = (
        vcpu.get_nmi_mask(),
        vcpu.set_nmi_mask(true),
        vcpu.set_nmi_mask(false),
    );
    let _ = vcpu.enable_irq_window();
    let _ = (vcpu.get_interrupt_shadow(), vcpu.set_interrupt_shadow(0));
    let _ = (
        vcpu.write_tsc_offset(u64::MAX),
        vcpu.write_tsc_multiplier(0),
    );
    let _ = vcpu.setup_mce(u64::MAX);
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
