//! Descriptor-table registers, and the instructions that look at descriptors.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use crate::fault::Exception;
use crate::segment::{Segment, TableRegister};
use crate::state::{CR0_ET, CR4_UMIP, Core, R};

pub(super) fn load_table(c: &mut Core, i: &Instruction) -> R<()> {
    c.privileged()?;
    let seg = Core::operand_segment(i);
    let at = c.offset(i);
    let limit = c.read(seg, at, 2)? as u16;
    let size = if c.bits == 64 { 8 } else { 4 };
    let mut base = c.read(seg, at.wrapping_add(2), size)?;
    // With 16-bit operands the base has 24 bits.
    if i.code() == iced_x86::Code::Lgdt_m1632_16 || i.code() == iced_x86::Code::Lidt_m1632_16 {
        base &= 0xff_ffff;
    }
    if c.bits == 64 && !c.canonical_base(base) {
        return Err(c.gp(0));
    }
    let table = TableRegister { base, limit };
    if i.mnemonic() == M::Lgdt {
        c.gdtr = table;
    } else {
        c.idtr = table;
    }
    Ok(())
}

/// #GP(0) for what CR4.UMIP hides from CPL 1 to 3.
fn hidden(c: &mut Core) -> R<()> {
    if c.cr4 & CR4_UMIP != 0 && c.cpl != 0 {
        Err(c.gp(0))
    } else {
        Ok(())
    }
}

pub(super) fn store_table(c: &mut Core, i: &Instruction) -> R<()> {
    hidden(c)?;
    let table = if i.mnemonic() == M::Sgdt {
        c.gdtr
    } else {
        c.idtr
    };
    let size = if c.bits == 64 { 8 } else { 4 };
    let seg = Core::operand_segment(i);
    let offset = c.offset(i);
    let at = c.linear(seg, offset, 2 + size as u64, true)?;
    let mut data = [0; 10];
    data[..2].copy_from_slice(&table.limit.to_le_bytes());
    data[2..].copy_from_slice(&table.base.to_le_bytes());
    c.write_linear(seg, at, &data[..2 + size], crate::paging::WRITE)
}

pub(super) fn load_system(c: &mut Core, i: &Instruction) -> R<()> {
    if c.paragraphs() {
        return Err(c.ud());
    }
    c.privileged()?;
    let selector = c.get(i, 0)? as u16;
    if i.mnemonic() == M::Lldt {
        c.load_ldt(selector)
    } else {
        c.load_tr(selector)
    }
}

pub(super) fn store_system(c: &mut Core, i: &Instruction) -> R<()> {
    if c.paragraphs() && i.mnemonic() != M::Smsw {
        return Err(c.ud());
    }
    hidden(c)?;
    let value = match i.mnemonic() {
        M::Sldt => c.ldtr.selector.into(),
        M::Str => c.tr.selector.into(),
        _ => c.cr0 | CR0_ET,
    };
    c.put(i, 0, value)
}

/// LAR, LSL, VERR and VERW: ZF says if the selector can be used.
pub(super) fn verify(c: &mut Core, i: &Instruction) -> R<()> {
    if c.paragraphs() {
        return Err(c.ud());
    }
    let m = i.mnemonic();
    let last = i.op_count() - 1;
    let selector = if i.op_kind(last) == OpKind::Memory {
        let seg = Core::operand_segment(i);
        let at = c.offset(i);
        c.read(seg, at, 2)? as u16
    } else {
        c.get(i, last)? as u16
    };
    let found = visible(c, selector, m)?;
    if let (Some((s, low)), true) = (found, matches!(m, M::Lar | M::Lsl)) {
        let value = if m == M::Lsl {
            s.limit.into()
        } else {
            low >> 32 & 0x00ff_ff00
        };
        c.put(i, 0, value)?;
    }
    c.f.set_zf(found.is_some());
    Ok(())
}

fn visible(c: &mut Core, selector: u16, m: M) -> R<Option<(Segment, u64)>> {
    let index = u64::from(selector & !7);
    let in_table = if selector & 4 == 0 {
        index + 7 <= u64::from(c.gdtr.limit)
    } else {
        c.ldtr.usable() && index + 7 <= u64::from(c.ldtr.limit)
    };
    if selector & !3 == 0 || !in_table {
        return Ok(None);
    }
    let d = c.descriptor(selector, Exception::GP, 0)?;
    let s = Segment::from_descriptor(selector, d.low);
    let privileged = s.dpl() < c.cpl.max(selector as u8 & 3);
    let reachable = s.is_code() && s.conforming() || !privileged;
    let kind_ok = match m {
        M::Verr => s.readable(),
        M::Verw => s.writable(),
        _ if s.is_memory() => true,
        M::Lar if c.long_mode() => matches!(s.kind(), 2 | 9 | 11 | 12),
        M::Lar => matches!(s.kind(), 1..=5 | 9 | 11 | 12),
        _ if c.long_mode() => matches!(s.kind(), 2 | 9 | 11),
        _ => matches!(s.kind(), 1..=3 | 9 | 11),
    };
    Ok((reachable && kind_ok).then_some((s, d.low)))
}

pub(super) fn arpl(c: &mut Core, i: &Instruction) -> R<()> {
    if c.paragraphs() {
        return Err(c.ud());
    }
    let (a, b) = (c.get(i, 0)?, c.get(i, 1)?);
    let lower = a & 3 < b & 3;
    if lower {
        c.put(i, 0, a & !3 | b & 3)?;
    }
    c.f.set_zf(lower);
    Ok(())
}
