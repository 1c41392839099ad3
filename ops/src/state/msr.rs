//! Model-specific and extended control registers.

/// One MSR (`struct kvm_msr_entry`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msr {
    /// The index, as in ECX of RDMSR.
    pub index: u32,
    /// The value.
    pub value: u64,
}

impl Msr {
    /// An entry to read: the value is 0.
    pub const fn read(index: u32) -> Self {
        Self { index, value: 0 }
    }

    /// An entry to write.
    pub const fn write(index: u32, value: u64) -> Self {
        Self { index, value }
    }
}

/// The extended control registers (`struct kvm_xcrs`). XCR0 is the only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xcrs {
    /// The enabled components of extended state. Bit 0 (x87) is always set.
    pub xcr0: u64,
}

impl Default for Xcrs {
    /// The value after reset: x87 only.
    fn default() -> Self {
        Self { xcr0: 1 }
    }
}
