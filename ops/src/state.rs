//! Register state of a vCPU in neutral types, so that this crate needs no KVM headers.

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

/// The name of a segment register.
#[allow(missing_docs)] // Each is the register of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SegmentName {
    Cs,
    Ds,
    Es,
    Fs,
    Gs,
    Ss,
    Tr,
    Ldtr,
}

impl SegmentName {
    /// Every segment register.
    pub const ALL: [SegmentName; 8] = [
        Self::Cs,
        Self::Ds,
        Self::Es,
        Self::Fs,
        Self::Gs,
        Self::Ss,
        Self::Tr,
        Self::Ldtr,
    ];
}

/// A segment register with its hidden part (`struct kvm_segment`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, with the granularity applied.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Type field of the descriptor, 4 bits.
    pub kind: u8,
    /// Present.
    pub present: bool,
    /// Descriptor privilege level, 0 to 3.
    pub dpl: u8,
    /// Default operation size: 32 bits.
    pub db: bool,
    /// Code or data, not a system segment.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// Granularity of 4 KiB.
    pub g: bool,
    /// Available for software.
    pub avl: bool,
    /// Unusable.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescTable {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Which event to inject as an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The vector, 0 to 31.
    pub vector: u8,
    /// The error code, for a vector that has one.
    pub error: Option<u32>,
}

/// One CPUID leaf (`struct kvm_cpuid_entry2`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// Leaf (EAX on input).
    pub leaf: u32,
    /// Subleaf (ECX on input).
    pub subleaf: u32,
    /// Whether the subleaf matters.
    pub subleaf_significant: bool,
    /// EAX, EBX, ECX, EDX on output.
    pub regs: [u32; 4],
}
