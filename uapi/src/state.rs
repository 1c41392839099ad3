//! The vCPU file: registers.

use crate::layout::layout;
use crate::{U16, U32, U64};

/// States of `KVM_GET_MP_STATE` on x86.
pub mod mp_state {
    /// Runs.
    pub const RUNNABLE: u32 = 0;
    /// Waits for INIT.
    pub const UNINITIALIZED: u32 = 1;
    /// Got INIT, waits for SIPI.
    pub const INIT_RECEIVED: u32 = 2;
    /// Halted.
    pub const HALTED: u32 = 3;
    /// Got SIPI.
    pub const SIPI_RECEIVED: u32 = 4;
}

layout! {
    /// `struct kvm_regs`.
    Regs 144 {
        0 rax: U64, 8 rbx: U64, 16 rcx: U64, 24 rdx: U64, 32 rsi: U64, 40 rdi: U64, 48 rsp: U64,
        56 rbp: U64, 64 r8: U64, 72 r9: U64, 80 r10: U64, 88 r11: U64, 96 r12: U64, 104 r13: U64,
        112 r14: U64, 120 r15: U64, 128 rip: U64, 136 rflags: U64,
    }
}

layout! {
    /// `struct kvm_segment`. `kind` is `type` in the kernel's header.
    Segment 24 {
        0 base: U64, 8 limit: U32, 12 selector: U16, 14 kind: u8, 15 present: u8, 16 dpl: u8,
        17 db: u8, 18 s: u8, 19 l: u8, 20 g: u8, 21 avl: u8, 22 unusable: u8, 23 padding: u8,
    }
}

layout! {
    /// `struct kvm_dtable`.
    Dtable 16 { 0 base: U64, 8 limit: U16, 10 padding: [U16; 3], }
}

layout! {
    /// `struct kvm_sregs`.
    Sregs 312 {
        0 cs: Segment, 24 ds: Segment, 48 es: Segment, 72 fs: Segment, 96 gs: Segment,
        120 ss: Segment, 144 tr: Segment, 168 ldt: Segment, 192 gdt: Dtable, 208 idt: Dtable,
        224 cr0: U64, 232 cr2: U64, 240 cr3: U64, 248 cr4: U64, 256 cr8: U64, 264 efer: U64,
        272 apic_base: U64, 280 interrupt_bitmap: [U64; 4],
    }
}

layout! {
    /// `struct kvm_mp_state`.
    MpState 4 { 0 mp_state: U32, }
}
