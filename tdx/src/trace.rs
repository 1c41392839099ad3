//! Events of the hot path: a load and a compare where nobody listens, nothing where the level is
//! compiled out.

use kvm_ops::{CpuId, Life, SeamRegs, VcpuId};
use tracing::Level;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::span::EnteredSpan;

use crate::Leaf;
use crate::status::CompletionStatus;

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
    let (vm, vcpu) = (life.id().0, vcpu.0);
    tracing::trace_span!("vcpu_run", technology = "tdx", vm, vcpu).entered()
}

/// A SEAMCALL with its operands, and the answer.
#[inline(always)]
pub(crate) fn call(leaf: Leaf, cpu: CpuId, operands: &SeamRegs, status: CompletionStatus) {
    if is_on() {
        called(leaf, cpu, operands, status);
    }
}

#[cold]
#[inline(never)]
fn called(leaf: Leaf, cpu: CpuId, operands: &SeamRegs, status: CompletionStatus) {
    let SeamRegs {
        rcx, rdx, r8, r9, ..
    } = *operands;
    tracing::trace!(
        technology = "tdx",
        seamcall = leaf.name(),
        cpu = cpu.0,
        rcx = %format_args!("{rcx:#x}"),
        rdx = %format_args!("{rdx:#x}"),
        r8 = %format_args!("{r8:#x}"),
        r9 = %format_args!("{r9:#x}"),
        %status,
    );
}

/// TDH.VP.ENTER and the exit that it ended with.
#[inline(always)]
pub(crate) fn entry(cpu: CpuId, regs: &SeamRegs, tdvpr: u64, status: CompletionStatus) {
    if is_on() {
        entered(cpu, regs, tdvpr, status);
    }
}

#[cold]
#[inline(never)]
fn entered(cpu: CpuId, regs: &SeamRegs, tdvpr: u64, status: CompletionStatus) {
    tracing::trace!(
        technology = "tdx",
        seamcall = Leaf::VpEnter.name(),
        cpu = cpu.0,
        rcx = %format_args!("{tdvpr:#x}"),
        exit_reason = status.detail() as u16,
        exit_gpa = %format_args!("{:#x}", regs.r8),
        %status,
    );
}
