//! General registers.

/// RFLAGS bits by the names of SDM vol. 1, 3.4.3.
pub mod rflags {
    /// Bit 1, which is always set.
    pub const RESERVED: u64 = 1 << 1;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
}

/// The general registers, RIP and RFLAGS (`struct kvm_regs`, in its order).
#[allow(missing_docs)] // Each is the register of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl Regs {
    /// True if maskable interrupts are enabled (RFLAGS.IF; `get_if_flag` in main.c).
    ///
    /// ```
    /// use kvm_ops_core::{Regs, rflags};
    /// let regs = Regs { rflags: rflags::RESERVED | rflags::IF, ..Regs::default() };
    /// assert!(regs.interrupts_enabled());
    /// ```
    pub const fn interrupts_enabled(&self) -> bool {
        self.rflags & rflags::IF != 0
    }
}
