//! PCMPESTRI, PCMPESTRM, PCMPISTRI and PCMPISTRM (Intel SDM volume 2, 4.1).

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::number;
use crate::exec::Exec;
use crate::flags;
use crate::state::{Core, R};

pub(super) fn select(m: M) -> Option<Exec> {
    matches!(
        m,
        M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm | M::Pcmpestri64 | M::Pcmpestrm64
    )
    .then_some(compare as Exec)
}

/// A string of up to 16 elements.
struct Text {
    elements: [i32; 16],
    len: usize,
}

fn text(v: u128, imm: u8, len: Option<u64>) -> Text {
    let words = imm & 1 != 0;
    let count = if words { 8 } else { 16 };
    let mut elements = [0; 16];
    for (n, e) in elements.iter_mut().enumerate().take(count) {
        let raw = if words { v >> (n * 16) } else { v >> (n * 8) };
        *e = match imm & 3 {
            0 => i32::from(raw as u8),
            1 => i32::from(raw as u16),
            2 => i32::from(raw as i8),
            _ => i32::from(raw as i16),
        };
    }
    let len = match len {
        Some(len) => len.min(count as u64) as usize,
        None => elements[..count]
            .iter()
            .position(|e| *e == 0)
            .unwrap_or(count),
    };
    Text { elements, len }
}

/// Bit `j` of the intermediate result, for the aggregation in bits 3:2 of the immediate.
fn aggregate(a: &Text, b: &Text, imm: u8, count: usize, j: usize) -> bool {
    match imm >> 2 & 3 {
        0 => j < b.len && a.elements[..a.len].contains(&b.elements[j]),
        1 => {
            j < b.len
                && a.elements[..a.len & !1]
                    .chunks_exact(2)
                    .any(|r| r[0] <= b.elements[j] && b.elements[j] <= r[1])
        }
        2 => match (j < a.len, j < b.len) {
            (true, true) => a.elements[j] == b.elements[j],
            (false, false) => true,
            _ => false,
        },
        _ => (0..count - j)
            .all(|i| i >= a.len || j + i < b.len && a.elements[i] == b.elements[i + j]),
    }
}

fn explicit_len(c: &Core, n: usize, wide: bool) -> u64 {
    if wide {
        (c.r[n] as i64).unsigned_abs()
    } else {
        (c.r[n] as i32).unsigned_abs().into()
    }
}

fn compare(c: &mut Core, i: &Instruction) -> R<()> {
    c.sse()?;
    let (m, imm) = (i.mnemonic(), i.immediate8());
    let explicit = !matches!(m, M::Pcmpistri | M::Pcmpistrm);
    let wide = matches!(
        i.code(),
        Code::Pcmpestri64_xmm_xmmm128_imm8 | Code::Pcmpestrm64_xmm_xmmm128_imm8
    );
    let lens = explicit.then(|| (explicit_len(c, 0, wide), explicit_len(c, 2, wide)));
    let a = text(c.fpu.xmm[number(i.op0_register())], imm, lens.map(|l| l.0));
    let second = if i.op1_kind() == OpKind::Memory {
        let offset = c.offset(i);
        c.read_wide(Core::operand_segment(i), offset, 16)?
    } else {
        c.fpu.xmm[number(i.op1_register())]
    };
    let b = text(second, imm, lens.map(|l| l.1));
    let count = if imm & 1 != 0 { 8 } else { 16 };
    let mut bits = 0u32;
    for j in 0..count {
        let mut on = aggregate(&a, &b, imm, count, j);
        if imm & 0x10 != 0 && (imm & 0x20 == 0 || j < b.len) {
            on = !on;
        }
        bits |= u32::from(on) << j;
    }
    if matches!(m, M::Pcmpestrm | M::Pcmpistrm | M::Pcmpestrm64) {
        c.fpu.xmm[0] = if imm & 0x40 == 0 {
            bits.into()
        } else {
            spread(bits, count)
        };
    } else {
        let index = match bits {
            0 => count as u32,
            b if imm & 0x40 == 0 => b.trailing_zeros(),
            b => 31 - b.leading_zeros(),
        };
        c.set_gpr(1, 4, index.into());
    }
    let flag = |on: bool, f: u64| if on { f } else { 0 };
    c.f.set(
        flag(bits != 0, flags::CF)
            | flag(b.len < count, flags::ZF)
            | flag(a.len < count, flags::SF)
            | flag(bits & 1 != 0, flags::OF),
    );
    Ok(())
}

/// Each bit becomes an element of ones.
fn spread(bits: u32, count: usize) -> u128 {
    let size = 128 / count;
    (0..count)
        .filter(|n| bits >> n & 1 != 0)
        .map(|n| (u128::MAX >> (128 - size)) << (n * size))
        .sum()
}
