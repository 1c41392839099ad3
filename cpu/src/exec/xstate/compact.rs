//! The compacted format of XSAVE: XSAVEC and XSAVES, and what XRSTOR takes of it.
//!
//! The first component behind the header is that of AVX, so its place is the same in both formats. PKRU follows it.

use iced_x86::Instruction;

use super::{
    AVX, HIGH, HIGH_BYTES, PKRU, PKRU_BYTES, SSE, X87, area_bytes, legacy_mxcsr, legacy_x87,
    legacy_xmm, requested, save_high, wide, write_pkru,
};
use crate::fpu::Fpu;
use crate::paging::{READ, WRITE};
use crate::state::{Core, R};

/// Bit of XCOMP_BV that tells the format.
pub(super) const FORMAT: u64 = 1 << 63;
/// Bytes of the legacy region that the processor writes; the rest is software's.
const LEGACY: usize = 464;

/// True if XRSTOR takes this header: XSTATE_BV, XCOMP_BV, and what is reserved.
pub(super) fn is_known(header: [u64; 8], enabled: u64) -> bool {
    let [bits, compact, reserved @ ..] = header;
    let present = compact & !FORMAT;
    present & !enabled == 0 && bits & !present == 0 && reserved == [0; 6]
}

/// The place of PKRU in an area with these components.
pub(super) const fn pkru_at(components: u64) -> usize {
    area_bytes(components & AVX)
}

/// The bytes of an area with these components.
pub(crate) const fn bytes(components: u64) -> usize {
    match components & PKRU {
        0 => area_bytes(components),
        _ => pkru_at(components) + PKRU_BYTES,
    }
}

impl Core {
    /// XINUSE as XSAVEC and XSAVES take it: MXCSR belongs to SSE.
    fn in_use_with_mxcsr(&self) -> u64 {
        let changed = self.fpu.mxcsr != Fpu::new().mxcsr;
        self.in_use() | if changed { SSE } else { 0 }
    }
}

/// XSAVEC and XSAVES. Components in their initial state are not written.
pub(super) fn save(c: &mut Core, i: &Instruction) -> R<()> {
    let mask = requested(c, i)?;
    let at = c.area(i, bytes(mask) as u64, 64, true)?;
    let seg = Core::operand_segment(i);
    let saved = mask & c.in_use_with_mxcsr();
    let count = c.xmm_count();
    if saved & AVX != 0 {
        let mut high = [0; HIGH_BYTES];
        save_high(&c.fpu, &mut high, count);
        let at = at.wrapping_add(HIGH as u64);
        c.write_linear(seg, at, &high[..count * 16], WRITE)?;
    }
    if saved & PKRU != 0 {
        write_pkru(c, seg, at.wrapping_add(pkru_at(mask) as u64))?;
    }
    let mut header = [0; 16];
    header[..8].copy_from_slice(&saved.to_le_bytes());
    header[8..].copy_from_slice(&(mask | FORMAT).to_le_bytes());
    c.write_linear(seg, at.wrapping_add(512), &header, WRITE)?;
    if saved & (X87 | SSE) == 0 {
        return Ok(());
    }
    let mut area = [0; 512];
    c.read_linear(seg, at, &mut area, READ)?;
    if saved & X87 != 0 {
        legacy_x87(&c.fpu, &mut area, wide(i));
    }
    if saved & SSE != 0 {
        legacy_mxcsr(&c.fpu, &mut area);
        legacy_xmm(&c.fpu, &mut area, count);
    }
    c.write_linear(seg, at, &area[..LEGACY], WRITE)
}
