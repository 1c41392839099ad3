//! `KVM_RUN` of a TD's vCPU. Its registers are the guest's secret: the run page has none, and each exit is told
//! by what the guest put into a TDG.VP.VMCALL.

use std::sync::{MutexGuard, PoisonError};

use kvm_ops::{Answer, Error, Exit, IntelVcpu, TdxRequest, VcpuOps};
use kvm_ops_uapi::checks::run::{IMMEDIATE_EXIT, INITIALIZED, UNINITIALIZED_EXIT};
use kvm_ops_uapi::run::{GetQuote, SetupEventNotify, TdVmCallInfo, TdxExit, exit_reason};
use kvm_ops_uapi::state::mp_state;
use kvm_ops_uapi::tdx::{tdvmcall, tdvmcall_status};
use kvm_ops_uapi::{Errno, U64};
use zerocopy::IntoBytes;

use super::answer::Waits;
use super::exits::{self, Next};
use super::page::Page;
use super::run::{is_interrupted, lends_again};
use super::{Cpu, State, cpuid, sync};
use crate::Process;
use crate::file::VcpuFile;
use crate::machine::Processor;
use crate::refusal::{Result, ensure};
use crate::stats::Count;

pub(super) fn run(
    file: &VcpuFile,
    process: &dyn Process,
    page: Page<'_>,
    state: &mut State,
) -> Result<i64> {
    let immediate = page.asks_for_exit();
    if state.cpu.mp_state()? == mp_state::UNINITIALIZED {
        ensure(!immediate, UNINITIALIZED_EXIT)?;
        return Err(Errno::EAGAIN.into());
    }
    sync::check(page, true)?;
    let (vcpu, runs) = {
        let vm = file.vm.lock();
        let id = file.vcpu.id;
        (vm.td.vcpu(id), vm.td.is_finalized())
    };
    let mut vcpu: Option<MutexGuard<'_, Processor>> = vcpu
        .as_ref()
        .map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(vcpu) = &mut vcpu {
        state.waits.answer(page, vcpu)?;
    }
    ensure(!immediate, IMMEDIATE_EXIT)?;
    let vcpu = vcpu.as_mut().filter(|_| runs).ok_or(INITIALIZED)?;
    if !std::mem::replace(&mut state.has_run, true)
        && let Processor::Intel(IntelVcpu::Tdx(td)) = &mut **vcpu
    {
        // From now on the list stays as it is.
        td.set_cpuid_answers(cpuid::entries(&state.cpuid));
    }
    let (waits, answer) = enter(file, process, page, (vcpu, &mut state.cpu));
    state.waits = waits;
    page.set_td_state(file.vcpu.id == 0);
    answer
}

/// Runs the guest up to an exit for user space.
fn enter(
    file: &VcpuFile,
    process: &dyn Process,
    page: Page<'_>,
    (vcpu, cpu): (&mut Processor, &mut Cpu),
) -> (Waits, Result<i64>) {
    let mut tried = None;
    loop {
        let next = match vcpu.vcpu_run() {
            Ok(Exit::Interrupted) if is_interrupted(process, page) => {
                file.vcpu.counts().add(Count::SignalExits);
                page.set_reason(exit_reason::INTR);
                Ok(Next::Fail(Errno::EINTR))
            }
            // A kick of a run that ended before it.
            Ok(Exit::Interrupted) => Ok(Next::Again),
            Ok(Exit::MemoryFault { gpa, access, .. })
                if lends_again(file, process, (gpa.get(), access), &mut tried) =>
            {
                Ok(Next::Again)
            }
            Ok(exit) => {
                exits::count(&exit, file.vcpu.counts());
                tell(exit, file, page, (vcpu, cpu))
            }
            Err(error) => Err(failed(file, error)),
        };
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Return(waits)) => return (waits, Ok(0)),
            Ok(Next::Fail(errno)) => return (Waits::Nothing, Err(errno.into())),
            Err(refusal) => return (Waits::Nothing, Err(refusal)),
        }
    }
}

/// A run that the back end fails. What breaks the TD breaks the VM (`KVM_BUG_ON`).
fn failed(file: &VcpuFile, error: Error) -> crate::Refusal {
    tracing::debug!(%error, "the TD cannot go on");
    match error {
        Error::Poisoned | Error::Firmware(_) => {
            file.vm.die();
            Errno::EIO.into()
        }
        // It was moved or closed meanwhile.
        Error::WrongState(_) => Errno::EIO.into(),
        error => error.into(),
    }
}

/// Tells an exit, or does what the kernel does without user space.
fn tell(
    exit: Exit,
    file: &VcpuFile,
    page: Page<'_>,
    (vcpu, cpu): (&mut Processor, &mut Cpu),
) -> Result<Next> {
    match exit {
        Exit::MapGpaRange { gpa, pages, to } => {
            exits::ask_to_map(file, page, vcpu, (gpa.get(), pages, to))
        }
        Exit::Hypercall { .. } => {
            vcpu.answer(Answer::Value(-exits::KVM_ENOSYS as u64))?;
            Ok(Next::Again)
        }
        Exit::Tdx(request) => {
            page.set_exit(exit_reason::TDX, &tdx_exit(request));
            Ok(Next::Return(Waits::Tdx))
        }
        Exit::ReadMsr { index } => {
            let answer = cpu.td_msr(index).map_or(Answer::InjectGp, Answer::Msr);
            vcpu.answer(answer)?;
            Ok(Next::Again)
        }
        Exit::WriteMsr { index, value } => {
            if !cpu.set_td_msr(index, value) {
                vcpu.answer(Answer::InjectGp)?;
            }
            Ok(Next::Again)
        }
        exit => exits::tell(exit, file, page, vcpu),
    }
}

/// A request of the guest, with the answer that it gets if user space leaves it as it is.
fn tdx_exit(request: TdxRequest) -> TdxExit {
    let unsupported = U64::new(tdvmcall_status::SUBFUNC_UNSUPPORTED);
    let mut exit = TdxExit::default();
    let nr = match request {
        TdxRequest::GetQuote { gpa, bytes } => {
            let call = GetQuote {
                ret: unsupported,
                gpa: U64::new(gpa.get()),
                size: U64::new(bytes),
            };
            put(&mut exit, call.as_bytes());
            tdvmcall::GET_QUOTE
        }
        TdxRequest::GetTdVmCallInfo { leaf } => {
            let call = TdVmCallInfo {
                ret: U64::new(tdvmcall_status::SUCCESS),
                leaf: U64::new(leaf),
                ..TdVmCallInfo::default()
            };
            put(&mut exit, call.as_bytes());
            tdvmcall::GET_TD_VM_CALL_INFO
        }
        TdxRequest::SetupEventNotify { vector } => {
            let call = SetupEventNotify {
                ret: unsupported,
                vector: U64::new(vector.into()),
            };
            put(&mut exit, call.as_bytes());
            tdvmcall::SETUP_EVENT_NOTIFY_INTERRUPT
        }
        // A request that the kernel has no exit for.
        _ => 0,
    };
    exit.nr = U64::new(nr);
    exit
}

fn put(exit: &mut TdxExit, call: &[u8]) {
    exit.call[..call.len()].copy_from_slice(call);
}
