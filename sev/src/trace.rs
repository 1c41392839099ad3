//! Events of the hot path: a load and a compare where nobody listens, nothing where the level is
//! compiled out.

use kvm_ops::{Tech, VcpuId, VmId};
use tracing::Level;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};

use crate::command::Command;
use crate::status::{Instruction, Operation, Status};

#[inline(always)]
fn is_on() -> bool {
    Level::TRACE <= STATIC_MAX_LEVEL && Level::TRACE <= LevelFilter::current()
}

/// Runs a vCPU in a span with its name. The span has a branch for itself, so that the other one holds
/// nothing to drop.
#[inline(always)]
pub(crate) fn run<V, T>(
    vcpu: &mut V,
    name: impl FnOnce(&V) -> (Tech, VmId, VcpuId),
    body: impl FnOnce(&mut V) -> T,
) -> T {
    if is_on() {
        let name = name(vcpu);
        run_in_span(name, || body(vcpu))
    } else {
        body(vcpu)
    }
}

#[cold]
#[inline(never)]
fn run_in_span<T>((technology, vm, vcpu): (Tech, VmId, VcpuId), body: impl FnOnce() -> T) -> T {
    let _span = tracing::trace_span!("vcpu_run", %technology, vm = vm.0, vcpu = vcpu.0).entered();
    body()
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
