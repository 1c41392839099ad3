//! Control of x87 and SSE state: FXSAVE, XSAVE and their counterparts.

pub(crate) mod compact;

use iced_x86::{Code, Instruction, Mnemonic as M};

use crate::exec::Exec;
use crate::fault::Exception;
use crate::fpu::Fpu;
use crate::paging::{READ, WRITE};
use crate::state::{CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, Core, R};

/// State components: x87, SSE, the upper halves of YMM registers, and PKRU.
pub(crate) const X87: u64 = 1;
pub(crate) const SSE: u64 = 2;
pub(crate) const AVX: u64 = 4;
pub(crate) const PKRU: u64 = 1 << 9;
/// Place of the upper halves in the standard format.
pub(crate) const HIGH: usize = 576;
pub(crate) const HIGH_BYTES: usize = 256;
/// Place of PKRU in the standard format, which is that of Intel's processors: behind AVX-512, which this one lacks.
pub(crate) const PKRU_AT: usize = 2688;
pub(crate) const PKRU_BYTES: usize = 8;

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Fxsave | M::Fxsave64 => fxsave,
        M::Fxrstor | M::Fxrstor64 => fxrstor,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => xsave,
        M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64 => compact::save,
        M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64 => xrstor,
        M::Ldmxcsr => |c, i| {
            c.sse()?;
            let v = c.get(i, 0)? as u32;
            c.load_mxcsr(v)
        },
        M::Stmxcsr => |c, i| {
            c.sse()?;
            let v = c.fpu.mxcsr;
            c.put(i, 0, v.into())
        },
        _ => return None,
    })
}

impl Core {
    pub(crate) fn load_mxcsr(&mut self, value: u32) -> R<()> {
        if value & !self.fpu.mxcsr_mask != 0 {
            return Err(self.gp(0));
        }
        self.fpu.mxcsr = value;
        Ok(())
    }

    /// XINUSE: the components that differ from their initial state.
    pub(crate) fn in_use(&self) -> u64 {
        self.fpu.in_use() | if self.pkru == 0 { 0 } else { PKRU }
    }

    /// Gives PKRU another value, which translations depend on.
    pub(crate) fn set_pkru(&mut self, value: u32) {
        if self.pkru != value {
            self.pkru = value;
            self.flush_linear();
        }
    }

    /// XMM registers in the area: 16 in 64-bit mode, 8 otherwise.
    fn xmm_count(&self) -> usize {
        if self.bits == 64 { 16 } else { 8 }
    }

    /// Linear address of a save area.
    fn area(&mut self, i: &Instruction, size: u64, align: u64, write: bool) -> R<u64> {
        let seg = Self::operand_segment(i);
        let offset = self.offset(i);
        let at = self.linear(seg, offset, size, write)?;
        if at & (align - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(at)
    }
}

/// Writes the x87 part of the legacy area: all bytes below 160 but those of MXCSR and its mask.
pub(crate) fn legacy_x87(f: &Fpu, area: &mut [u8; 512], wide: bool) {
    area[..24].fill(0);
    area[32..160].fill(0);
    area[0..2].copy_from_slice(&f.control.to_le_bytes());
    area[2..4].copy_from_slice(&f.status.to_le_bytes());
    area[4] = f.tags;
    area[6..8].copy_from_slice(&f.opcode.to_le_bytes());
    if wide {
        area[8..16].copy_from_slice(&f.instruction.to_le_bytes());
        area[16..24].copy_from_slice(&f.operand.to_le_bytes());
    } else {
        area[8..12].copy_from_slice(&(f.instruction as u32).to_le_bytes());
        area[16..20].copy_from_slice(&(f.operand as u32).to_le_bytes());
    }
    let top = usize::from(f.status >> 11 & 7);
    for n in 0..8 {
        let value = f.st[(top + n) & 7].to_le_bytes();
        area[32 + n * 16..42 + n * 16].copy_from_slice(&value[..10]);
    }
}

pub(crate) fn legacy_mxcsr(f: &Fpu, area: &mut [u8; 512]) {
    area[24..28].copy_from_slice(&f.mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&f.mxcsr_mask.to_le_bytes());
}

pub(crate) fn legacy_xmm(f: &Fpu, area: &mut [u8; 512], count: usize) {
    for n in 0..count {
        area[160 + n * 16..176 + n * 16].copy_from_slice(&f.xmm[n].to_le_bytes());
    }
}

pub(crate) fn word(area: &[u8], at: usize, len: usize) -> u128 {
    let mut bytes = [0; 16];
    bytes[..len].copy_from_slice(&area[at..at + len]);
    u128::from_le_bytes(bytes)
}

pub(crate) fn restore_x87(f: &mut Fpu, area: &[u8], wide: bool) {
    f.control = word(area, 0, 2) as u16 & 0x1f3f | 0x40;
    f.status = word(area, 2, 2) as u16;
    f.tags = area[4];
    f.opcode = word(area, 6, 2) as u16 & 0x7ff;
    let len = if wide { 8 } else { 4 };
    f.instruction = word(area, 8, len) as u64;
    f.operand = word(area, 16, len) as u64;
    let top = usize::from(f.status >> 11 & 7);
    for n in 0..8 {
        f.st[(top + n) & 7] = word(area, 32 + n * 16, 10);
    }
    f.summarize();
}

pub(crate) fn restore_xmm(f: &mut Fpu, area: &[u8], count: usize) {
    for n in 0..count {
        f.xmm[n] = word(area, 160 + n * 16, 16);
    }
}

/// The upper halves of YMM registers.
pub(crate) fn save_high(f: &Fpu, area: &mut [u8], count: usize) {
    for (bytes, value) in area.chunks_exact_mut(16).zip(&f.high[..count]) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

pub(crate) fn restore_high(f: &mut Fpu, area: &[u8], count: usize) {
    for (n, value) in f.high[..count].iter_mut().enumerate() {
        *value = word(area, n * 16, 16);
    }
}

/// 64-bit forms keep whole pointers.
fn wide(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Fxsave64_m512byte
            | Code::Fxrstor64_m512byte
            | Code::Xsave64_mem
            | Code::Xrstor64_mem
            | Code::Xrstors64_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec64_mem
            | Code::Xsaves64_mem
    )
}

fn is_supervisor(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64
    )
}

fn fxsave(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87()?;
    let at = c.area(i, 512, 16, true)?;
    let mut area = [0; 512];
    let seg = Core::operand_segment(i);
    // Bytes 464 to 511 are software's, and the XMM part stays without OSFXSR.
    c.read_linear(seg, at, &mut area, READ)?;
    legacy_x87(&c.fpu, &mut area, wide(i));
    legacy_mxcsr(&c.fpu, &mut area);
    if c.cr4 & CR4_OSFXSR != 0 {
        legacy_xmm(&c.fpu, &mut area, c.xmm_count());
    }
    c.write_linear(seg, at, &area, WRITE)
}

fn fxrstor(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87()?;
    let at = c.area(i, 512, 16, false)?;
    let mut area = [0; 512];
    c.read_linear(Core::operand_segment(i), at, &mut area, READ)?;
    c.load_mxcsr(word(&area, 24, 4) as u32)?;
    let count = c.xmm_count();
    restore_x87(&mut c.fpu, &area, wide(i));
    if c.cr4 & CR4_OSFXSR != 0 {
        restore_xmm(&mut c.fpu, &area, count);
    }
    Ok(())
}

/// Components that EDX:EAX asks for and XCR0 enables. There are none that IA32_XSS could enable.
fn requested(c: &mut Core, i: &Instruction) -> R<u64> {
    if c.cr4 & CR4_OSXSAVE == 0 {
        return Err(c.ud());
    }
    if c.cr0 & CR0_TS != 0 {
        return Err(c.fault(Exception::plain(Exception::NM)));
    }
    if is_supervisor(i) {
        c.privileged()?;
    }
    Ok((c.r[2] << 32 | c.r[0] & 0xffff_ffff) & c.fpu.xcr0)
}

/// The bytes of an area of the standard format that holds these components.
pub(crate) const fn area_bytes(mask: u64) -> usize {
    if mask & PKRU != 0 {
        PKRU_AT + PKRU_BYTES
    } else if mask & AVX != 0 {
        HIGH + HIGH_BYTES
    } else {
        HIGH
    }
}

/// Writes PKRU as a component.
fn write_pkru(c: &mut Core, seg: usize, at: u64) -> R<()> {
    let bytes = u64::from(c.pkru).to_le_bytes();
    c.write_linear(seg, at, &bytes, WRITE)
}

fn xsave(c: &mut Core, i: &Instruction) -> R<()> {
    let mask = requested(c, i)?;
    let at = c.area(i, area_bytes(mask) as u64, 64, true)?;
    let seg = Core::operand_segment(i);
    let optimised = matches!(i.mnemonic(), M::Xsaveopt | M::Xsaveopt64);
    let in_use = c.in_use();
    let saved = if optimised { mask & in_use } else { mask };
    let mut area = [0; 512];
    c.read_linear(seg, at, &mut area, READ)?;
    if saved & X87 != 0 {
        legacy_x87(&c.fpu, &mut area, wide(i));
    }
    if mask & SSE != 0 {
        legacy_mxcsr(&c.fpu, &mut area);
    }
    if saved & SSE != 0 {
        legacy_xmm(&c.fpu, &mut area, c.xmm_count());
    }
    let mut header = [0; 8];
    c.read_linear(seg, at.wrapping_add(512), &mut header, READ)?;
    let bits = u64::from_le_bytes(header) & !mask | in_use & mask;
    if saved & AVX != 0 {
        let mut high = [0; HIGH_BYTES];
        let count = c.xmm_count();
        let used = count * 16;
        save_high(&c.fpu, &mut high, count);
        c.write_linear(seg, at.wrapping_add(HIGH as u64), &high[..used], WRITE)?;
    }
    if saved & PKRU != 0 {
        write_pkru(c, seg, at.wrapping_add(PKRU_AT as u64))?;
    }
    c.write_linear(seg, at.wrapping_add(512), &bits.to_le_bytes(), WRITE)?;
    c.write_linear(seg, at, &area, WRITE)
}

fn xrstor(c: &mut Core, i: &Instruction) -> R<()> {
    let mask = requested(c, i)?;
    let at = c.area(i, HIGH as u64, 64, false)?;
    let seg = Core::operand_segment(i);
    let mut area = [0; HIGH];
    c.read_linear(seg, at, &mut area, READ)?;
    let header = |n: usize| word(&area, 512 + n * 8, 8) as u64;
    let bits = header(0);
    let compacted = header(1) & compact::FORMAT != 0;
    let known = if compacted {
        compact::is_known(core::array::from_fn(header), c.fpu.xcr0)
    } else {
        !is_supervisor(i) && bits & !c.fpu.xcr0 == 0 && header(1) == 0 && header(2) == 0
    };
    if !known {
        return Err(c.gp(0));
    }
    let mut high = [0; HIGH_BYTES];
    if mask & bits & AVX != 0 {
        let at = at.wrapping_add(HIGH as u64);
        c.read_linear(seg, at, &mut high, READ)?;
    }
    // Zeros if the component is in its initial state.
    let mut pkru = [0; 4];
    if mask & bits & PKRU != 0 {
        let place = match compacted {
            true => compact::pkru_at(header(1)),
            false => PKRU_AT,
        };
        c.read_linear(seg, at.wrapping_add(place as u64), &mut pkru, READ)?;
    }
    let initial = Fpu::new();
    if compacted && mask & SSE != 0 && bits & SSE == 0 {
        c.fpu.mxcsr = initial.mxcsr;
    } else if mask & SSE != 0 || !compacted && mask & AVX != 0 {
        c.load_mxcsr(word(&area, 24, 4) as u32)?;
    }
    let count = c.xmm_count();
    let f = &mut c.fpu;
    if mask & X87 != 0 && bits & X87 != 0 {
        restore_x87(f, &area, wide(i));
    } else if mask & X87 != 0 {
        f.reset_x87(&initial);
    }
    if mask & SSE != 0 {
        if bits & SSE != 0 {
            restore_xmm(f, &area, count);
        } else {
            f.xmm[..count].fill(0);
        }
    }
    if mask & AVX != 0 {
        // Zeros if the component is in its initial state.
        restore_high(f, &high, count);
    }
    if mask & PKRU != 0 {
        c.set_pkru(u32::from_le_bytes(pkru));
    }
    Ok(())
}
