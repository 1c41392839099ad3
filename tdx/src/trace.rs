//! Events of the hot path: a load and a compare where nobody listens, nothing where the level is
//! compiled out.

use kvm_ops::{CpuId, SeamRegs, VcpuId, VmId};
use tracing::Level;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};

use crate::Leaf;
use crate::status::CompletionStatus;

#[inline(always)]
fn is_on() -> bool {
    Level::TRACE <= STATIC_MAX_LEVEL && Level::TRACE <= LevelFilter::current()
}

/// Runs a vCPU in a span with its name. The span has a branch for itself, so that the other one holds
/// nothing to drop.
#[inline(always)]
pub(crate) fn run<V, T>(
    vcpu: &mut V,
    name: impl FnOnce(&V) -> (VmId, VcpuId),
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
fn run_in_span<T>((vm, vcpu): (VmId, VcpuId), body: impl FnOnce() -> T) -> T {
    let _span =
        tracing::trace_span!("vcpu_run", technology = "tdx", vm = vm.0, vcpu = vcpu.0).entered();
    body()
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
