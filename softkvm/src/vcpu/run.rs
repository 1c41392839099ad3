//! `KVM_RUN`.

use kvm_ops::{Exit, Privacy, VcpuOps};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::run::{ARGUMENT, IMMEDIATE_EXIT, INITIALIZED, UNINITIALIZED_EXIT};
use kvm_ops_uapi::run::{IoapicEoi, exit_reason};
use kvm_ops_uapi::state::mp_state;
use kvm_ops_uapi::system::vm_type;

use super::exits::{self, Next};
use super::held::Held;
use super::page::Page;
use super::{Cpu, State, sev, sync, td};
use crate::Process;
use crate::file::VcpuFile;
use crate::machine::Processor;
use crate::refusal::{Result, ensure};
use crate::stats::Count;
use crate::vm::Lending;

/// IA32_APIC_BASE after power-on: enabled, at its place.
const APIC_BASE: u64 = 0xfee0_0800;

pub(super) fn run(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    ensure(argument == 0, ARGUMENT)?;
    let page = Page(&**file.vcpu.run_area());
    let mut state = file.state();
    if file.vm.kind() == vm_type::TDX {
        return td::run(file, process, page, &mut state);
    }
    let State {
        cpu,
        cpuid,
        has_run,
        waits,
        ..
    } = &mut *state;
    match cpu {
        Cpu::Held(held) => {
            run_held(held, page, file.vm.has_protected_state())?;
            Ok(0)
        }
        Cpu::Processor(vcpu) => {
            let immediate = page.asks_for_exit();
            if sev::mp_state(vcpu)? == kvm_ops::MpState::Uninitialized {
                ensure(!immediate, UNINITIALIZED_EXIT)?;
            }
            sync::check(page, file.vm.has_protected_state())?;
            let secret = sev::is_protected(vcpu);
            if !secret {
                let parts = file.vm.lock().event_parts;
                sync::load(page, vcpu, cpuid, parts)?;
            }
            waits.answer(page, vcpu)?;
            if !may_run(file) {
                ensure(!immediate, IMMEDIATE_EXIT)?;
                return Err(INITIALIZED.into());
            }
            if !secret {
                prepare(file, page, vcpu)?;
            }
            if immediate {
                vcpu.kick_handle().kick();
            }
            *has_run = true;
            let (next, answer) = enter(file, process, page, vcpu, immediate);
            *waits = next;
            if sev::is_protected(vcpu) {
                let vm = file.vm.lock();
                let boots = file.vcpu.id == vm.boot_id();
                page.set_secret_state(vm.has_apics(), APIC_BASE, boots);
            } else {
                leave(file, page, vcpu)?;
            }
            answer
        }
    }
}

/// The kernel lets no guest of types 2 to 4 run that was only moved onto, or not initialised at all.
fn may_run(file: &VcpuFile) -> bool {
    file.vm.is_plain() || file.vm.lock().sev.was_initialised_here()
}

/// The checks of a run of a vCPU without a back end.
fn run_held(held: &Held, page: Page<'_>, protected: bool) -> Result<()> {
    let immediate = page.asks_for_exit();
    if held.mp_state == mp_state::UNINITIALIZED {
        // Nothing can wake it, so the wait is over at once.
        ensure(!immediate, UNINITIALIZED_EXIT)?;
        return Err(Errno::EAGAIN.into());
    }
    sync::check(page, protected)?;
    ensure(!immediate, IMMEDIATE_EXIT)?;
    Err(INITIALIZED.into())
}

/// What user space does for a vCPU without a local APIC in the kernel.
fn prepare(file: &VcpuFile, page: Page<'_>, vcpu: &mut Processor) -> Result<()> {
    if file.vm.lock().has_apics() {
        return Ok(());
    }
    let mut sregs = vcpu.sregs()?;
    if sregs.cr8 != page.cr8() {
        sregs.cr8 = page.cr8();
        if sregs.cr8 > 15 {
            return Err(Errno::EINVAL.into());
        }
        vcpu.set_sregs(&sregs)?;
    }
    if page.asks_for_window() {
        vcpu.enable_irq_window()?;
    }
    Ok(())
}

/// Runs the guest up to an exit for user space.
fn enter(
    file: &VcpuFile,
    process: &dyn Process,
    page: Page<'_>,
    vcpu: &mut Processor,
    immediate: bool,
) -> (super::answer::Waits, Result<i64>) {
    let nothing = super::answer::Waits::Nothing;
    let mut tried = None;
    loop {
        let next = match vcpu.vcpu_run() {
            Err(error) => sev::refused(vcpu, page, error),
            Ok(exit) => match exit {
                Exit::Interrupted if tells_end(file, page) => return (nothing, Ok(0)),
                Exit::Interrupted if immediate => return (nothing, Err(IMMEDIATE_EXIT.into())),
                Exit::Interrupted if is_interrupted(process, page) => {
                    file.vcpu.counts().add(Count::SignalExits);
                    page.set_reason(exit_reason::INTR);
                    return (nothing, Err(Errno::EINTR.into()));
                }
                // A kick of a run that ended before it.
                Exit::Interrupted => Ok(Next::Again),
                Exit::MemoryFault { gpa, access, .. }
                    if lends_again(file, process, (gpa.get(), access), &mut tried) =>
                {
                    Ok(Next::Again)
                }
                exit => {
                    exits::count(&exit, file.vcpu.counts());
                    exits::tell(exit, file, page, vcpu)
                }
            },
        };
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Return(waits)) => return (waits, Ok(0)),
            Ok(Next::Fail(errno)) => return (nothing, Err(errno.into())),
            Err(refusal) => return (nothing, Err(refusal)),
        }
    }
}

/// True if memory that the guest came to in vain is there now: shared memory, or any of a guest whose accesses choose.
/// Memory that was there before may have come for another vCPU that missed it at the same time. So the guest tries once more,
/// unless no memory came since it `tried`.
pub(super) fn lends_again(
    file: &VcpuFile,
    process: &dyn Process,
    (gpa, access): (u64, Privacy),
    tried: &mut Option<u64>,
) -> bool {
    if access != Privacy::Shared && file.vm.has_private_memory() {
        return false;
    }
    match file.vm.lock().lend_again(process, gpa) {
        Lending::Refused => false,
        Lending::New => true,
        Lending::Old(lendings) => tried.replace(lendings) != Some(lendings),
    }
}

/// Leaves for the end of an interrupt of user space's I/O APIC, if there is one to tell.
fn tells_end(file: &VcpuFile, page: Page<'_>) -> bool {
    let Some(vector) = file.vm.irq().take_end(file.vcpu.id) else {
        return false;
    };
    page.set_exit(exit_reason::IOAPIC_EOI, &IoapicEoi { vector });
    true
}

pub(super) fn is_interrupted(process: &dyn Process, page: Page<'_>) -> bool {
    process.signal_pending() || page.0.signal_pending()
}

/// What every run leaves in the run page.
fn leave(file: &VcpuFile, page: Page<'_>, vcpu: &Processor) -> Result<()> {
    let sregs = vcpu.sregs()?;
    let has_apic = file.vm.lock().has_apics();
    page.set_state(vcpu, &sregs, has_apic)?;
    sync::store(page, vcpu, &sregs, || file.vm.lock().event_parts)
}
