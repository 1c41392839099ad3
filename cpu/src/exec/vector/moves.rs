//! Moves between XMM registers, memory and general registers.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::number;
use crate::exec::Exec;
use crate::state::{Core, R};

const LOW: u128 = u64::MAX as u128;

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    Some(match i.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa => {
            aligned
        }
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => unaligned,
        M::Movss => scalar,
        M::Movsd if i.code() != Code::Movsd_m32_m32 => scalar,
        M::Movd | M::Movq => low,
        M::Movlps | M::Movlpd | M::Movhps | M::Movhpd => half,
        M::Movhlps | M::Movlhps => halves,
        M::Movddup | M::Movshdup | M::Movsldup => duplicate,
        M::Movmskps | M::Movmskpd | M::Pmovmskb => mask,
        M::Maskmovdqu => masked_store,
        M::Pinsrb | M::Pinsrw | M::Pinsrd | M::Pinsrq => insert,
        M::Pextrb | M::Pextrw | M::Pextrd | M::Pextrq | M::Extractps => extract,
        M::Insertps => insert_float,
        _ => return None,
    })
}

fn aligned(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    if i.op0_kind() == OpKind::Memory || i.op1_kind() == OpKind::Memory {
        c.aligned_operand(i)?;
    }
    unaligned(c, i)
}

fn unaligned(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    if i.op0_kind() == OpKind::Memory {
        let v = c.fpu.xmm[number(i.op1_register())];
        let offset = c.offset(i);
        return c.write_wide(Core::operand_segment(i), offset, 16, v);
    }
    let v = if i.op1_kind() == OpKind::Memory {
        let offset = c.offset(i);
        c.read_wide(Core::operand_segment(i), offset, 16)?
    } else {
        c.fpu.xmm[number(i.op1_register())]
    };
    c.fpu.xmm[number(i.op0_register())] = v;
    Ok(())
}

/// MOVSS and MOVSD: registers merge, loads clear the rest.
fn scalar(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let size = if i.mnemonic() == M::Movss { 4 } else { 8 };
    let kept = u128::MAX << (size * 8);
    if i.op0_kind() == OpKind::Memory {
        let v = c.fpu.xmm[number(i.op1_register())];
        let offset = c.offset(i);
        return c.write_wide(Core::operand_segment(i), offset, size, v);
    }
    let v = c.vector_operand(i, 1)?;
    let to = &mut c.fpu.xmm[number(i.op0_register())];
    *to = if i.op1_kind() == OpKind::Memory {
        v
    } else {
        *to & kept | v & !kept
    };
    Ok(())
}

/// MOVD and MOVQ.
fn low(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let to = i.op0_register();
    if i.op0_kind() == OpKind::Register && to.is_xmm() {
        let v = c.vector_operand(i, 1)? & LOW;
        c.fpu.xmm[number(to)] = v;
        return Ok(());
    }
    let v = c.fpu.xmm[number(i.op1_register())] as u64;
    c.put(i, 0, v)
}

fn half(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let high = matches!(i.mnemonic(), M::Movhps | M::Movhpd);
    if i.op0_kind() == OpKind::Memory {
        let v = c.fpu.xmm[number(i.op1_register())] >> if high { 64 } else { 0 };
        return c.put(i, 0, v as u64);
    }
    let v = c.vector_operand(i, 1)? & LOW;
    let to = &mut c.fpu.xmm[number(i.op0_register())];
    *to = if high {
        *to & LOW | v << 64
    } else {
        *to & !LOW | v
    };
    Ok(())
}

fn halves(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let v = c.fpu.xmm[number(i.op1_register())];
    let to = &mut c.fpu.xmm[number(i.op0_register())];
    *to = if i.mnemonic() == M::Movhlps {
        *to & !LOW | v >> 64
    } else {
        *to & LOW | v << 64
    };
    Ok(())
}

fn duplicate(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let v = c.vector_operand(i, 1)?;
    let even = 0x0000_0000_ffff_ffff_0000_0000_ffff_ffff;
    let r = match i.mnemonic() {
        M::Movddup => v & LOW | v << 64,
        M::Movsldup => v & even | (v & even) << 32,
        _ => v & !even | (v & !even) >> 32,
    };
    c.fpu.xmm[number(i.op0_register())] = r;
    Ok(())
}

fn mask(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let v = c.fpu.xmm[number(i.op1_register())];
    let size = match i.mnemonic() {
        M::Movmskps => 32,
        M::Movmskpd => 64,
        _ => 8,
    };
    let mut r = 0;
    for n in 0..128 / size {
        r |= u64::from(v >> (n * size + size - 1) & 1 != 0) << n;
    }
    c.put(i, 0, r)
}

fn masked_store(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let (v, mask) = (
        c.fpu.xmm[number(i.op1_register())],
        c.fpu.xmm[number(i.op2_register())],
    );
    let seg = Core::operand_segment(i);
    let base = match i.op0_kind() {
        OpKind::MemorySegRDI => c.r[7],
        OpKind::MemorySegEDI => c.r[7] & 0xffff_ffff,
        _ => c.r[7] & 0xffff,
    };
    for n in 0..16 {
        if mask >> (n * 8 + 7) & 1 != 0 {
            c.write(seg, base.wrapping_add(n), 1, (v >> (n * 8)) as u64 & 0xff)?;
        }
    }
    Ok(())
}

fn insert(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let size = match i.mnemonic() {
        M::Pinsrb => 8,
        M::Pinsrw => 16,
        M::Pinsrd => 32,
        _ => 64,
    };
    let v = c.get(i, 1)?;
    let shift = u32::from(i.immediate8()) % (128 / size) * size;
    let mask = (u128::MAX >> (128 - size)) << shift;
    let to = &mut c.fpu.xmm[number(i.op0_register())];
    *to = *to & !mask | u128::from(v) << shift & mask;
    Ok(())
}

fn extract(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let size = match i.mnemonic() {
        M::Pextrb => 8,
        M::Pextrw => 16,
        M::Pextrq => 64,
        _ => 32,
    };
    let shift = u32::from(i.immediate8()) % (128 / size) * size;
    let v = c.fpu.xmm[number(i.op1_register())] >> shift & u128::MAX >> (128 - size);
    c.put(i, 0, v as u64)
}

fn insert_float(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let imm = i.immediate8();
    let v = c.vector_operand(i, 1)?;
    let from = if i.op1_kind() == OpKind::Memory {
        0
    } else {
        u32::from(imm >> 6) * 32
    };
    let shift = u32::from(imm >> 4 & 3) * 32;
    let to = &mut c.fpu.xmm[number(i.op0_register())];
    *to = *to & !(0xffff_ffff << shift) | (v >> from & 0xffff_ffff) << shift;
    for n in 0..4 {
        if imm & 1 << n != 0 {
            *to &= !(0xffff_ffff << (n * 32));
        }
    }
    Ok(())
}
