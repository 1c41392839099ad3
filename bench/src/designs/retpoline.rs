//! A retpoline: an indirect call without branch prediction.
//!
//! `-Zretpoline` needs a nightly compiler and a standard library built with it. This thunk is the
//! code that it emits (`__x86_indirect_thunk_r11` in Linux), so a stable compiler measures the
//! same.

use core::arch::{asm, global_asm};

global_asm!(
    ".globl kvm_ops_bench_retpoline_r11",
    "kvm_ops_bench_retpoline_r11:",
    "call 3f",
    "2:",
    "pause",
    "lfence",
    "jmp 2b",
    "3:",
    "mov qword ptr [rsp], r11",
    "ret",
);

unsafe extern "C" {
    fn kvm_ops_bench_retpoline_r11();
}

/// An operation of a table: its arguments are the VM's data and the MSR's number.
pub type Op = unsafe extern "C" fn(*const (), u32) -> bool;

/// Calls `op` through the thunk.
///
/// # Safety
/// As for `op(vm, index)`.
#[inline(always)]
pub unsafe fn call(op: Op, vm: *const (), index: u32) -> bool {
    let answer: u8;
    // SAFETY: the thunk jumps to r11 with the arguments in the registers of the C calling
    // convention, and `clobber_abi` declares the registers that a C function may change.
    unsafe {
        asm!(
            "call {thunk}",
            thunk = sym kvm_ops_bench_retpoline_r11,
            inout("r11") op => _,
            inout("rdi") vm => _,
            inout("esi") index => _,
            out("al") answer,
            clobber_abi("C"),
        );
    }
    answer != 0
}
