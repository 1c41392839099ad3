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
    /// `struct kvm_sregs2`.
    Sregs2 320 {
        0 cs: Segment, 24 ds: Segment, 48 es: Segment, 72 fs: Segment, 96 gs: Segment,
        120 ss: Segment, 144 tr: Segment, 168 ldt: Segment, 192 gdt: Dtable, 208 idt: Dtable,
        224 cr0: U64, 232 cr2: U64, 240 cr3: U64, 248 cr4: U64, 256 cr8: U64, 264 efer: U64,
        272 apic_base: U64, 280 flags: U64, 288 pdptrs: [U64; 4],
    }
}

/// The bit of [`Sregs2`]'s `flags`: the entries of the page-directory-pointer table count.
pub const SREGS2_PDPTRS_VALID: u64 = 1;

layout! {
    /// `struct kvm_tpr_access_ctl`.
    TprAccessCtl 40 { 0 enabled: U32, 4 flags: U32, 8 reserved: [U32; 8], }
}

layout! {
    /// The fixed part of `struct kvm_signal_mask`, in front of the set.
    SignalMask 4 { 0 len: U32, }
}

layout! {
    /// `struct kvm_guest_debug`, with [`guest_debug`] in `control`, and DR0 to DR3 and DR7 at their numbers.
    GuestDebug 72 { 0 control: U32, 4 pad: U32, 8 debugreg: [U64; 8], }
}

/// Bits of [`GuestDebug`]'s `control`.
pub mod guest_debug {
    /// The guest is debugged; the other bits count.
    pub const ENABLE: u32 = 1;
    /// Each instruction leaves.
    pub const SINGLESTEP: u32 = 1 << 1;
    /// INT3 leaves.
    pub const USE_SW_BP: u32 = 1 << 16;
    /// The breakpoints of `debugreg` are in place of the guest's.
    pub const USE_HW_BP: u32 = 1 << 17;
    /// #DB is injected, once.
    pub const INJECT_DB: u32 = 1 << 18;
    /// #BP is injected, once.
    pub const INJECT_BP: u32 = 1 << 19;
    /// No interrupt is injected.
    pub const BLOCKIRQ: u32 = 1 << 20;
    /// All of them, as `KVM_CAP_SET_GUEST_DEBUG2` tells.
    pub const ALL: u32 =
        ENABLE | SINGLESTEP | USE_SW_BP | USE_HW_BP | INJECT_DB | INJECT_BP | BLOCKIRQ;
}

layout! {
    /// `struct kvm_one_reg`: a register by [`one_reg`], and the address of its value.
    OneReg 16 { 0 id: U64, 8 addr: U64, }
}

layout! {
    /// The number in front of `struct kvm_reg_list`.
    RegList 8 { 0 n: U64, }
}

/// Parts of [`OneReg`]'s `id`. The lower 32 bits are the register's number, bits 39:32 its kind.
pub mod one_reg {
    /// Where the processor is told.
    pub const ARCH_MASK: u64 = 0xff << 56;
    /// A register of x86.
    pub const X86: u64 = 0x20 << 56;
    /// Where the size is told.
    pub const SIZE_MASK: u64 = 0xf << 52;
    /// 64 bits.
    pub const SIZE_64: u64 = 3 << 52;
    /// What has to be 0.
    pub const RESERVED_MASK: u64 = 0xfff << 40;
    /// Where the kind is told.
    pub const KIND_MASK: u64 = 0xff << 32;
    /// An MSR.
    pub const MSR: u64 = 2 << 32;
    /// A register of KVM's own, of which a guest without shadow stacks has none.
    pub const KVM: u64 = 3 << 32;
}

layout! {
    /// `struct kvm_mp_state`.
    MpState 4 { 0 mp_state: U32, }
}

layout! {
    /// `struct kvm_fpu`.
    Fpu 416 {
        0 fpr: [u8; 128], 128 fcw: U16, 130 fsw: U16, 132 ftwx: u8, 133 pad1: u8,
        134 last_opcode: U16, 136 last_ip: U64, 144 last_dp: U64, 152 xmm: [u8; 256],
        408 mxcsr: U32, 412 pad2: U32,
    }
}

/// Bytes of `struct kvm_xsave`.
pub const XSAVE_SIZE: usize = 4096;

layout! {
    /// `struct kvm_xcr`.
    Xcr 16 { 0 xcr: U32, 4 reserved: U32, 8 value: U64, }
}

layout! {
    /// `struct kvm_xcrs`.
    Xcrs 392 { 0 nr_xcrs: U32, 4 flags: U32, 8 xcrs: [Xcr; 16], 264 padding: [U64; 16], }
}

layout! {
    /// `struct kvm_debugregs`.
    DebugRegs 128 { 0 db: [U64; 4], 32 dr6: U64, 40 dr7: U64, 48 flags: U64, 56 reserved: [U64; 9], }
}

/// Bits of [`VcpuEvents`]' `flags`.
pub mod event_flags {
    /// `nmi_pending` counts.
    pub const NMI_PENDING: u32 = 1;
    /// `sipi_vector` counts.
    pub const SIPI_VECTOR: u32 = 2;
    /// `shadow` counts.
    pub const SHADOW: u32 = 4;
    /// The fields of SMM count.
    pub const SMM: u32 = 8;
    /// `exception_pending` and the payload count.
    pub const PAYLOAD: u32 = 16;
    /// `triple_fault_pending` counts.
    pub const TRIPLE_FAULT: u32 = 32;
}

/// Bits of [`VcpuEvents`]' `shadow`.
pub mod shadow {
    /// After MOV SS.
    pub const MOV_SS: u8 = 1;
    /// After STI.
    pub const STI: u8 = 2;
}

layout! {
    /// `struct kvm_vcpu_events`, with the fields of its parts.
    VcpuEvents 64 {
        0 exception_injected: u8, 1 exception_nr: u8, 2 exception_has_error_code: u8,
        3 exception_pending: u8, 4 exception_error_code: U32, 8 interrupt_injected: u8,
        9 interrupt_nr: u8, 10 interrupt_soft: u8, 11 interrupt_shadow: u8, 12 nmi_injected: u8,
        13 nmi_pending: u8, 14 nmi_masked: u8, 15 nmi_pad: u8, 16 sipi_vector: U32, 20 flags: U32,
        24 smi_smm: u8, 25 smi_pending: u8, 26 smi_inside_nmi: u8, 27 smi_latched_init: u8,
        28 triple_fault_pending: u8, 29 reserved: [u8; 26], 55 exception_has_payload: u8,
        56 exception_payload: U64,
    }
}

layout! {
    /// `struct kvm_interrupt`.
    Interrupt 4 { 0 irq: U32, }
}
