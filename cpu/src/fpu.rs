//! The state of x87, SSE and AVX.

/// An x87 register: 64 bits of significand, sign and exponent above.
pub(crate) type Extended = u128;

/// Registers that software sees.
pub(crate) const SCRATCH: usize = 16;

pub(crate) struct Fpu {
    pub(crate) control: u16,
    pub(crate) status: u16,
    /// One bit for each register, set if it is in use.
    pub(crate) tags: u8,
    pub(crate) opcode: u16,
    pub(crate) instruction: u64,
    pub(crate) operand: u64,
    pub(crate) st: [Extended; 8],
    pub(crate) mxcsr: u32,
    /// MXCSR bits that can be set, which the processor has for good.
    pub(crate) mxcsr_mask: u32,
    /// XMM0 to XMM15, and from [`SCRATCH`] on numbers that instructions with VEX prefixes compute with.
    pub(crate) xmm: [u128; 32],
    /// Upper halves of YMM0 to YMM15.
    pub(crate) high: [u128; 16],
    pub(crate) xcr0: u64,
}

/// MXCSR bits of every processor.
const MXCSR_MASK: u32 = 0xffff;
/// MXCSR.MM of AMD's processors: operands in memory need not be aligned (APM vol. 1, 4.2.2).
pub(crate) const MXCSR_MM: u32 = 1 << 17;

impl Fpu {
    /// The initial state on the same processor.
    pub(crate) fn initial(&self) -> Self {
        Self {
            mxcsr_mask: self.mxcsr_mask,
            ..Self::new()
        }
    }

    pub(crate) fn new() -> Self {
        Self {
            control: 0x37f,
            status: 0,
            tags: 0,
            opcode: 0,
            instruction: 0,
            operand: 0,
            st: [0; 8],
            mxcsr: 0x1f80,
            mxcsr_mask: MXCSR_MASK,
            xmm: [0; 32],
            high: [0; 16],
            xcr0: 1,
        }
    }

    /// Brings the summary bits of the status word up to date with flags and masks.
    pub(crate) fn summarize(&mut self) {
        if self.status & !self.control & 0x3f != 0 {
            self.status |= 0x8080;
        } else {
            self.status &= !0x8080;
        }
    }

    /// Takes the x87 part of another state.
    pub(crate) fn reset_x87(&mut self, from: &Self) {
        (self.control, self.status, self.tags) = (from.control, from.status, from.tags);
        (self.opcode, self.instruction, self.operand) =
            (from.opcode, from.instruction, from.operand);
        self.st = from.st;
    }

    fn x87_initial(&self) -> bool {
        self.control == 0x37f
            && self.status == 0
            && self.tags == 0
            && self.opcode == 0
            && self.instruction == 0
            && self.operand == 0
            && self.st == [0; 8]
    }

    /// XINUSE of x87, SSE and AVX: the components that differ from their initial state.
    pub(crate) fn in_use(&self) -> u64 {
        let used = |registers: &[u128]| u64::from(registers.iter().any(|r| *r != 0));
        u64::from(!self.x87_initial()) | used(&self.xmm[..SCRATCH]) << 1 | used(&self.high) << 2
    }
}
