//! Events of the hot path: a load and a compare where nobody listens, nothing where the level is
//! compiled out.

use kvm_ops::{Life, VcpuId};
use tracing::Level;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::span::EnteredSpan;

use crate::command::Command;
use crate::status::{Instruction, Operation, Status};

#[inline(always)]
fn is_on() -> bool {
    Level::TRACE <= STATIC_MAX_LEVEL && Level::TRACE <= LevelFilter::current()
}

/// The span of a run of a vCPU.
#[inline(always)]
pub(crate) fn run(life: &Life, vcpu: VcpuId) -> Option<EnteredSpan> {
    is_on().then(|| enter(life, vcpu))
}

#[cold]
#[inline(never)]
fn enter(life: &Life, vcpu: VcpuId) -> EnteredSpan {
    let (technology, vm, vcpu) = (life.tech(), life.id().0, vcpu.0);
    tracing::trace_span!("vcpu_run", %technology, vm, vcpu).entered()
}

/// A command of the AMD SP, and the answer.
#[inline(always)]
pub(crate) fn command(command: Command, buffer: &[u8], status: Status) {
    if is_on() {
        commanded(command, buffer, status);
    }
}

/// The buffer is shown by its length: it may hold keys and secrets.
#[cold]
#[inline(never)]
fn commanded(command: Command, buffer: &[u8], status: Status) {
    let (command, buffer) = (command.name(), buffer.len());
    tracing::trace!(command, buffer, %status);
}

/// An RMP instruction on the page at that address, and the answer.
#[inline(always)]
pub(crate) fn instruction(instruction: Instruction, page: u64, code: u32) {
    if is_on() {
        executed(instruction, page, code);
    }
}

#[cold]
#[inline(never)]
fn executed(instruction: Instruction, page: u64, code: u32) {
    let name = Operation::Instruction(instruction).name();
    let status = match code {
        0 => Some("SUCCESS"),
        _ => instruction.code_name(code),
    };
    tracing::trace!(instruction = name, page = %format_args!("{page:#x}"), code, status);
}
