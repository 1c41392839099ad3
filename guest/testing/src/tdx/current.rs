//! The vCPU that a thread runs, for kernels whose `tdcall` is a function without a receiver.

use super::Vcpu;
use std::cell::RefCell;

thread_local! {
    static CURRENT: RefCell<Vec<Vcpu>> = const { RefCell::new(Vec::new()) };
}

/// A thread runs a vCPU for as long as this lives.
pub(super) struct Current(());

impl Current {
    pub(super) fn enter(vcpu: &Vcpu) -> Self {
        CURRENT.with_borrow_mut(|stack| stack.push(vcpu.same()));
        Self(())
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        CURRENT.with_borrow_mut(Vec::pop);
    }
}

/// TDCALL on the vCPU that this thread runs, with the registers in encoding order: RAX, RCX, RDX, RBX, RSP,
/// RBP, RSI, RDI, R8 to R15. For a kernel whose wrapper of the instruction is a plain function:
///
/// ```
/// use kvm_ops_guest_test::tdx::{TestTd, tdcall};
///
/// /// A kernel's own TDG.VP.INFO. In the kernel `execute` is the instruction, here it is `tdcall`.
/// fn gpa_width(execute: fn(&mut [u64; 16])) -> u64 {
///     let mut registers = [0; 16];
///     registers[0] = 1; // RAX: TDG.VP.INFO
///     execute(&mut registers);
///     registers[1] & 0x3f // RCX
/// }
///
/// let td = TestTd::builder().build()?;
/// assert_eq!(td.run(|_| gpa_width(tdcall))?, 48);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A vCPU that the host never enters again unwinds the code, as
/// [`TdcallPort::tdcall`](kvm_ops_guest::tdx::TdcallPort::tdcall) of [`Vcpu`] does.
///
/// # Panics
/// This thread runs no vCPU: the call is outside of [`TestTd::run`](super::TestTd::run) and
/// [`TestTd::run_all`](super::TestTd::run_all).
pub fn tdcall(registers: &mut [u64; 16]) {
    let vcpu = CURRENT.with_borrow(|stack| stack.last().map(Vcpu::same));
    match vcpu {
        Some(mut vcpu) => vcpu.tdcall_or_unwind(registers),
        None => panic!("TDCALL on a thread that runs no vcpu: call it inside of TestTd::run"),
    }
}
