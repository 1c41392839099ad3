//! Extended state from outside, as XSAVE lays it out.

use core::fmt;

use crate::cpu::Cpu;
use crate::exec::xstate::{
    AVX, HIGH, PKRU, PKRU_AT, PKRU_BYTES, SSE, X87, area_bytes, legacy_mxcsr, legacy_x87,
    legacy_xmm, restore_high, restore_x87, restore_xmm, save_high, word,
};
use crate::fpu::Fpu;

/// Bytes of the XSAVE area of this processor in the standard format: legacy region, header, upper halves of the YMM
/// registers, a gap, and PKRU.
pub const XSAVE_BYTES: usize = PKRU_AT + PKRU_BYTES;

/// Place of PKRU in the XSAVE area of this processor in the standard format. Bit 9 of XSTATE_BV says that it is there.
pub const XSAVE_PKRU: usize = PKRU_AT;

const REGISTERS: usize = 16;

/// Errors of [`Cpu::load_xsave`]. Nothing is loaded then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XsaveError {
    /// The area has this many bytes, and the components in it have more.
    Short(usize),
    /// XSTATE_BV names components that the processor lacks, or the format is not the standard one.
    Components(u64),
    /// MXCSR has reserved bits.
    Mxcsr(u32),
}

impl fmt::Display for XsaveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(bytes) => write!(f, "{bytes} bytes are no xsave area"),
            Self::Components(bits) => write!(f, "no such state components: {bits:#x}"),
            Self::Mxcsr(value) => write!(f, "mxcsr can not be {value:#x}"),
        }
    }
}

impl core::error::Error for XsaveError {}

impl Cpu {
    /// x87, SSE and AVX state and PKRU in the standard format of XSAVE. XSTATE_BV has the components that are not
    /// in their initial state.
    pub fn save_xsave(&self) -> [u8; XSAVE_BYTES] {
        let f = &*self.core.fpu;
        let mut legacy = [0; 512];
        legacy_x87(f, &mut legacy, true);
        legacy_mxcsr(f, &mut legacy);
        legacy_xmm(f, &mut legacy, REGISTERS);
        let mut area = [0; XSAVE_BYTES];
        area[..512].copy_from_slice(&legacy);
        area[512..520].copy_from_slice(&self.core.in_use().to_le_bytes());
        save_high(f, &mut area[HIGH..], REGISTERS);
        area[PKRU_AT..][..4].copy_from_slice(&self.core.pkru.to_le_bytes());
        area
    }

    /// Loads x87, SSE and AVX state and PKRU, as XRSTOR does with all components requested.
    ///
    /// # Errors
    ///
    /// [`XsaveError`] names what no processor of this kind can hold.
    pub fn load_xsave(&mut self, area: &[u8]) -> Result<(), XsaveError> {
        // An area without the last component may end before it.
        if area.len() < HIGH {
            return Err(XsaveError::Short(area.len()));
        }
        let header = |n: usize| word(area, 512 + n * 8, 8) as u64;
        let bits = header(0);
        if bits & !(X87 | SSE | AVX | PKRU) != 0 || header(1) != 0 {
            return Err(XsaveError::Components(bits | header(1)));
        }
        if area.len() < area_bytes(bits) {
            return Err(XsaveError::Short(area.len()));
        }
        let mxcsr = word(area, 24, 4) as u32;
        if mxcsr & !self.core.fpu.mxcsr_mask != 0 {
            return Err(XsaveError::Mxcsr(mxcsr));
        }
        let initial = Fpu::new();
        let f = &mut *self.core.fpu;
        f.mxcsr = mxcsr;
        if bits & X87 != 0 {
            restore_x87(f, area, true);
        } else {
            f.reset_x87(&initial);
        }
        if bits & SSE != 0 {
            restore_xmm(f, area, REGISTERS);
        } else {
            f.xmm = initial.xmm;
        }
        if bits & AVX != 0 {
            restore_high(f, &area[HIGH..], REGISTERS);
        } else {
            f.high = initial.high;
        }
        let pkru = match bits & PKRU {
            0 => 0,
            _ => word(area, PKRU_AT, 4) as u32,
        };
        self.core.set_pkru(pkru);
        Ok(())
    }
}
