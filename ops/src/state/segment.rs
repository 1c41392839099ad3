//! Segment registers and descriptor tables.

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
    Ldt,
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
        Self::Ldt,
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

/// The default operand and address size of a code segment (`get_cs_db_l_bits` in main.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeSize {
    /// 16 bits: D and L are clear.
    Bits16,
    /// 32 bits: D is set.
    Bits32,
    /// 64 bits: L is set.
    Bits64,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescTable {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}
