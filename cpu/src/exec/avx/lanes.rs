//! Permutations, shifts by lane, blends, tests and gathers.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::{Halves, halves, number};
use crate::exec::Exec;
use crate::flags::{CF, ZF, sign};
use crate::operand::address_bits;
use crate::state::{Core, R};

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    Some(match i.mnemonic() {
        M::Vpermilps | M::Vpermilpd => permute_inside,
        M::Vperm2f128 | M::Vperm2i128 => permute_halves,
        M::Vpermps | M::Vpermd => permute_by_vector,
        M::Vpermpd | M::Vpermq => permute_by_immediate,
        M::Vpsllvd | M::Vpsllvq | M::Vpsrlvd | M::Vpsrlvq | M::Vpsravd => shift,
        M::Vpblendd => blend_doublewords,
        M::Vblendvps | M::Vblendvpd | M::Vpblendvb => blend,
        M::Vptest | M::Vtestps | M::Vtestpd => test,
        M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq
        | M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd => gather,
        _ => return None,
    })
}

/// Lane `n` of `size` bytes, counted over both halves.
pub(super) fn lane(v: &Halves, n: u32, size: u32) -> u64 {
    let lanes = 16 / size;
    let shifted = v[(n / lanes) as usize & 1] >> (n % lanes * size * 8);
    crate::flags::zero(shifted as u64, size)
}

pub(super) fn put(v: &mut Halves, n: u32, size: u32, value: u64) {
    let lanes = 16 / size;
    let shift = n % lanes * size * 8;
    let mask = u128::MAX >> (128 - size * 8) << shift;
    let half = &mut v[(n / lanes) as usize & 1];
    *half = *half & !mask | u128::from(value) << shift & mask;
}

/// Makes a vector of lanes.
fn build(i: &Instruction, size: u32, mut one: impl FnMut(u32) -> u64) -> Halves {
    let mut r = [0; 2];
    for n in 0..halves(i) as u32 * (16 / size) {
        put(&mut r, n, size, one(n));
    }
    r
}

/// VPERMILPS and VPERMILPD, by an immediate or a vector.
fn permute_inside(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let size = if i.mnemonic() == M::Vpermilps { 4 } else { 8 };
    let lanes = 16 / size;
    let by_immediate = i.op2_kind() == OpKind::Immediate8;
    let (v, control) = match by_immediate {
        true => (c.source(i, 1)?, [0; 2]),
        false => (c.vector(i.op1_register()), c.source(i, 2)?),
    };
    let imm = u64::from(i.immediate8());
    let r = build(i, size, |n| {
        let choice = match (by_immediate, size) {
            (true, 4) => imm >> (n % 4 * 2) & 3,
            (true, _) => imm >> n & 1,
            (false, 4) => lane(&control, n, 4) & 3,
            (false, _) => lane(&control, n, 8) >> 1 & 1,
        };
        lane(&v, n / lanes * lanes + choice as u32, size)
    });
    c.set_vector(i.op0_register(), r);
    Ok(())
}

fn permute_halves(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let (a, b) = (c.vector(i.op1_register()), c.source(i, 2)?);
    let half = |control: u8| match control & 0xb {
        0 => a[0],
        1 => a[1],
        2 => b[0],
        3 => b[1],
        _ => 0,
    };
    let imm = i.immediate8();
    c.set_vector(i.op0_register(), [half(imm), half(imm >> 4)]);
    Ok(())
}

fn permute_by_vector(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let (control, v) = (c.vector(i.op1_register()), c.source(i, 2)?);
    let r = build(i, 4, |n| lane(&v, lane(&control, n, 4) as u32 & 7, 4));
    c.set_vector(i.op0_register(), r);
    Ok(())
}

fn permute_by_immediate(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let v = c.source(i, 1)?;
    let imm = u32::from(i.immediate8());
    let r = build(i, 8, |n| lane(&v, imm >> (n * 2) & 3, 8));
    c.set_vector(i.op0_register(), r);
    Ok(())
}

/// Shifts of each lane by a count of its own.
fn shift(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let m = i.mnemonic();
    let size = if matches!(m, M::Vpsllvq | M::Vpsrlvq) {
        8
    } else {
        4
    };
    let bits = u64::from(size) * 8;
    let (v, counts) = (c.vector(i.op1_register()), c.source(i, 2)?);
    let r = build(i, size, |n| {
        let (x, count) = (lane(&v, n, size), lane(&counts, n, size));
        match m {
            M::Vpsravd => (sign(x, 4) as i64 >> count.min(31)) as u64,
            _ if count >= bits => 0,
            M::Vpsllvd | M::Vpsllvq => x << count,
            _ => x >> count,
        }
    });
    c.set_vector(i.op0_register(), r);
    Ok(())
}

fn blend_doublewords(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let (a, b) = (c.vector(i.op1_register()), c.source(i, 2)?);
    let imm = i.immediate8();
    let r = build(i, 4, |n| {
        lane(if imm >> n & 1 != 0 { &b } else { &a }, n, 4)
    });
    c.set_vector(i.op0_register(), r);
    Ok(())
}

/// Blends by the sign bits of a fourth operand.
fn blend(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let size = match i.mnemonic() {
        M::Vblendvps => 4,
        M::Vblendvpd => 8,
        _ => 1,
    };
    let (a, b) = (c.vector(i.op1_register()), c.source(i, 2)?);
    let choice = c.vector(i.op3_register());
    let r = build(i, size, |n| {
        let second = lane(&choice, n, size) >> (size * 8 - 1) & 1 != 0;
        lane(if second { &b } else { &a }, n, size)
    });
    c.set_vector(i.op0_register(), r);
    Ok(())
}

/// VPTEST looks at all bits, VTESTPS and VTESTPD at signs.
fn test(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let looked_at = match i.mnemonic() {
        M::Vptest => u128::MAX,
        M::Vtestps => 0x8000_0000_8000_0000_8000_0000_8000_0000,
        _ => 0x8000_0000_0000_0000_8000_0000_0000_0000,
    };
    let (a, b) = (c.vector(i.op0_register()), c.source(i, 1)?);
    let both = (0..2).all(|n| a[n] & b[n] & looked_at == 0);
    let second = (0..2).all(|n| !a[n] & b[n] & looked_at == 0);
    c.f.set(if both { ZF } else { 0 } | if second { CF } else { 0 });
    Ok(())
}

/// Gathers: each lane that is loaded takes its bit from the mask, so that a fault in the middle goes on there.
fn gather(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let (to, mask) = (i.op0_register(), i.op2_register());
    let index = i.memory_index();
    let (a, b, x) = (number(to), number(mask), number(index));
    if a == b || a == x || b == x {
        return Err(c.ud());
    }
    use M::{Vgatherdpd, Vgatherqpd, Vpgatherdq, Vpgatherqq};
    let m = i.mnemonic();
    let size = match m {
        Vpgatherdq | Vpgatherqq | Vgatherdpd | Vgatherqpd => 8,
        _ => 4,
    };
    let index_size = match m {
        M::Vpgatherdd | M::Vpgatherdq | M::Vgatherdps | M::Vgatherdpd => 4,
        _ => 8,
    };
    // As many as the wider of index and data has room for.
    let bytes = if to.is_ymm() || index.is_ymm() {
        32
    } else {
        16
    };
    let count = bytes / size.max(index_size);
    let indices = c.vector(index);
    let (mut value, mut left) = (c.vector(to), c.vector(mask));
    let seg = Core::operand_segment(i);
    let base = i.memory_base();
    let address = address_bits(i);
    let mut start = i.memory_displacement64();
    if base != iced_x86::Register::None {
        start = start.wrapping_add(c.reg(base));
    }
    for n in 0..count {
        if lane(&left, n, size) >> (size * 8 - 1) & 1 != 0 {
            let scaled = sign(lane(&indices, n, index_size), index_size)
                .wrapping_mul(i.memory_index_scale().into());
            let mut offset = start.wrapping_add(scaled);
            if address == 32 {
                offset &= 0xffff_ffff;
            }
            match c.read(seg, offset, size) {
                Ok(v) => put(&mut value, n, size, v),
                Err(stop) => {
                    c.set_vector(to, value);
                    c.set_vector(mask, left);
                    return Err(stop);
                }
            }
        }
        put(&mut left, n, size, 0);
    }
    // Lanes that have no index are zero.
    for n in count..32 / size {
        put(&mut value, n, size, 0);
    }
    c.set_vector(to, value);
    c.set_vector(mask, [0; 2]);
    Ok(())
}
