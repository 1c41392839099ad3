//! TDCALL.

use crate::tdx::{Regs, TdcallPort};
use core::arch::asm;
use core::mem::offset_of;

/// Executes `$instruction` with the registers of `$regs`, and puts them back into it.
///
/// One register has to hold the address of `Regs` before and after, and all fourteen belong to the
/// call in between, so the address waits on the stack; so does RBX, which LLVM keeps for itself.
macro_rules! with_registers {
    ($instruction:literal, $regs:expr) => {
        asm!(
            "push rbx",
            "push rdi",
            "mov rax, [rdi + {rax}]",
            "mov rcx, [rdi + {rcx}]",
            "mov rdx, [rdi + {rdx}]",
            "mov rbx, [rdi + {rbx}]",
            "mov rsi, [rdi + {rsi}]",
            "mov r8, [rdi + {r8}]",
            "mov r9, [rdi + {r9}]",
            "mov r10, [rdi + {r10}]",
            "mov r11, [rdi + {r11}]",
            "mov r12, [rdi + {r12}]",
            "mov r13, [rdi + {r13}]",
            "mov r14, [rdi + {r14}]",
            "mov r15, [rdi + {r15}]",
            "mov rdi, [rdi + {rdi}]",
            $instruction,
            "xchg rdi, [rsp]",
            "mov [rdi + {rax}], rax",
            "mov [rdi + {rcx}], rcx",
            "mov [rdi + {rdx}], rdx",
            "mov [rdi + {rbx}], rbx",
            "mov [rdi + {rsi}], rsi",
            "mov [rdi + {r8}], r8",
            "mov [rdi + {r9}], r9",
            "mov [rdi + {r10}], r10",
            "mov [rdi + {r11}], r11",
            "mov [rdi + {r12}], r12",
            "mov [rdi + {r13}], r13",
            "mov [rdi + {r14}], r14",
            "mov [rdi + {r15}], r15",
            "pop rax",
            "mov [rdi + {rdi}], rax",
            "pop rbx",
            rax = const offset_of!(Regs, rax),
            rcx = const offset_of!(Regs, rcx),
            rdx = const offset_of!(Regs, rdx),
            rbx = const offset_of!(Regs, rbx),
            rsi = const offset_of!(Regs, rsi),
            rdi = const offset_of!(Regs, rdi),
            r8 = const offset_of!(Regs, r8),
            r9 = const offset_of!(Regs, r9),
            r10 = const offset_of!(Regs, r10),
            r11 = const offset_of!(Regs, r11),
            r12 = const offset_of!(Regs, r12),
            r13 = const offset_of!(Regs, r13),
            r14 = const offset_of!(Regs, r14),
            r15 = const offset_of!(Regs, r15),
            inout("rdi") core::ptr::from_mut::<Regs>($regs) => _,
            out("rax") _,
            out("rcx") _,
            out("rdx") _,
            out("rsi") _,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
        )
    };
}

/// The instruction as a port.
#[derive(Debug)]
pub struct Tdcall(());

impl Tdcall {
    /// The port.
    ///
    /// # Safety
    /// * The code runs at privilege level 0 in a TD, now and at every call.
    /// * Calls change memory: TDG.MEM.PAGE.ACCEPT zeroes pages, TDG.MR.REPORT writes to its operand,
    ///   MapGPA takes pages away. The ranges and addresses given to what uses this port name
    ///   memory that nothing else of this guest uses.
    /// * RCX of a TDG.VP.VMCALL selects no XMM register, or the caller of
    ///   [`tdcall`](TdcallPort::tdcall) expects them to change. No call of this crate does.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

impl TdcallPort for Tdcall {
    fn tdcall(&mut self, regs: &mut Regs) {
        // SAFETY: whoever made this port vouched for privilege level, TD and memory. The assembly
        // touches `regs`, which is borrowed for as long, and the stack below RSP, which is why
        // `nostack` is not given; it saves RBX, restores RSP, never uses RBP, and names all other
        // registers as changed. TDCALL leaves RSP and RBP alone: no mask of this crate selects them.
        unsafe { with_registers!(".byte 0x66, 0x0f, 0x01, 0xcc", regs) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_goes_to_the_instruction_and_comes_back_from_it() {
        let mut regs = Regs {
            rax: 1,
            rcx: 2,
            rdx: 3,
            rbx: 4,
            rsi: 5,
            rdi: 6,
            r8: 7,
            r9: 8,
            r10: 9,
            r11: 10,
            r12: 11,
            r13: 12,
            r14: 13,
            r15: 14,
        };
        // A ring of exchanges: every register ends in its neighbour, the first in the last.
        // SAFETY: exchanges of registers that the macro passes; no memory, no stack.
        unsafe {
            with_registers!(
                "xchg rax, rcx\nxchg rcx, rdx\nxchg rdx, rbx\nxchg rbx, rsi\nxchg rsi, rdi\n\
                 xchg rdi, r8\nxchg r8, r9\nxchg r9, r10\nxchg r10, r11\nxchg r11, r12\n\
                 xchg r12, r13\nxchg r13, r14\nxchg r14, r15",
                &mut regs
            );
        }
        let expected = Regs {
            rax: 2,
            rcx: 3,
            rdx: 4,
            rbx: 5,
            rsi: 6,
            rdi: 7,
            r8: 8,
            r9: 9,
            r10: 10,
            r11: 11,
            r12: 12,
            r13: 13,
            r14: 14,
            r15: 1,
        };
        assert_eq!(regs, expected);
    }
}
