//! `KVM_RUN`.

use kvm_ops::{Error, Exit, Privacy, VcpuOps};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::run::{
    ARGUMENT, IMMEDIATE_EXIT, INITIALIZED, SYNC_REGS, UNINITIALIZED_EXIT,
};
use kvm_ops_uapi::run::{EXIT_OFFSET, IoapicEoi, exit_reason};
use kvm_ops_uapi::state::mp_state;
use kvm_ops_uapi::system::vm_type;

use super::exits::{self, Next};
use super::held::Held;
use super::page::Page;
use super::{Cpu, State, sync, td};
use crate::Process;
use crate::file::VcpuFile;
use crate::machine::Processor;
use crate::refusal::{Result, ensure};
use crate::stats::Count;

/// KVM_INTERNAL_ERROR_EMULATION.
const EMULATION: u32 = 1;

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
            run_held(file, held, page)?;
            *has_run = true;
            Ok(0)
        }
        Cpu::Processor(vcpu) => {
            let immediate = page.asks_for_exit();
            if vcpu.mp_state()? == kvm_ops::MpState::Uninitialized {
                ensure(!immediate, UNINITIALIZED_EXIT)?;
            }
            sync::check(page)?;
            let parts = file.vm.lock().event_parts;
            sync::load(page, vcpu, cpuid, parts)?;
            waits.answer(page, vcpu)?;
            prepare(file, page, vcpu)?;
            if immediate {
                vcpu.kick_handle().kick();
            }
            *has_run = true;
            let (next, answer) = enter(file, process, page, vcpu, immediate);
            *waits = next;
            leave(file, page, vcpu)?;
            answer
        }
    }
}

/// The checks of a run whose code is not executed: it ends as the kernel ends one whose instruction it
/// cannot fetch.
fn run_held(file: &VcpuFile, held: &Held, page: Page<'_>) -> Result<()> {
    let immediate = page.asks_for_exit();
    if held.mp_state == mp_state::UNINITIALIZED {
        // Nothing can wake it, so the wait is over at once.
        ensure(!immediate, UNINITIALIZED_EXIT)?;
        return Err(Errno::EAGAIN.into());
    }
    ensure(page.valid_regs() | page.dirty_regs() == 0, SYNC_REGS)?;
    ensure(!immediate, IMMEDIATE_EXIT)?;
    let may_run = file.vm.is_plain() || file.vm.lock().sev.was_initialised_here();
    ensure(may_run, INITIALIZED)?;
    page.set_reason(exit_reason::INTERNAL_ERROR);
    page.0.write(EXIT_OFFSET as u64, &EMULATION.to_le_bytes());
    page.0.write(EXIT_OFFSET as u64 + 4, &0u32.to_le_bytes());
    Ok(())
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
    loop {
        let exit = match vcpu.vcpu_run() {
            Ok(exit) => exit,
            // The VM was closed or moved away meanwhile.
            Err(Error::WrongState(_)) => return (nothing, Err(Errno::EIO.into())),
            Err(error) => return (nothing, Err(error.into())),
        };
        let next = match exit {
            Exit::Interrupted if tells_end(file, page) => return (nothing, Ok(0)),
            Exit::Interrupted if immediate => return (nothing, Err(IMMEDIATE_EXIT.into())),
            Exit::Interrupted if is_interrupted(process, page) => {
                file.vcpu.counts().add(Count::SignalExits);
                page.set_reason(exit_reason::INTR);
                return (nothing, Err(Errno::EINTR.into()));
            }
            // A kick of a run that ended before it.
            Exit::Interrupted => Ok(Next::Again),
            Exit::MemoryFault {
                gpa,
                access: Privacy::Shared,
                ..
            } if file.vm.lock().lend_again(process, gpa.get()) => Ok(Next::Again),
            exit => exits::tell(exit, file, page, vcpu),
        };
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Return(waits)) => return (waits, Ok(0)),
            Ok(Next::Fail(errno)) => return (nothing, Err(errno.into())),
            Err(refusal) => return (nothing, Err(refusal)),
        }
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
