//! Integer arithmetic on the lanes of a vector.

use iced_x86::Mnemonic as M;

use super::Packed;
use crate::flags::{sign, zero};

/// Applies `f` to each pair of lanes of `size` bytes; the result is cut to the lane.
#[inline(always)]
fn each(size: u32, a: u128, b: u128, f: impl Fn(u64, u64) -> u64) -> u128 {
    let bits = size * 8;
    let mask = u128::MAX >> (128 - bits);
    let mut r = 0;
    for n in 0..16 / size {
        let shift = n * bits;
        let v = f((a >> shift & mask) as u64, (b >> shift & mask) as u64);
        r |= (u128::from(v) & mask) << shift;
    }
    r
}

/// The same with sign-extended lanes.
#[inline(always)]
fn signed(size: u32, a: u128, b: u128, f: impl Fn(i64, i64) -> i64) -> u128 {
    each(size, a, b, |x, y| {
        f(sign(x, size) as i64, sign(y, size) as i64) as u64
    })
}

fn saturate(v: i64, bits: u32) -> i64 {
    v.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
}

fn saturate_unsigned(v: i64, bits: u32) -> i64 {
    v.clamp(0, (1 << bits) - 1)
}

fn all(on: bool) -> u64 {
    if on { u64::MAX } else { 0 }
}

/// Adds or subtracts neighbours: the lanes of `a` give the lower half, those of `b` the upper.
fn neighbours(size: u32, a: u128, b: u128, f: impl Fn(i64, i64) -> i64) -> u128 {
    let bits = size * 8;
    let mask = u128::MAX >> (128 - bits);
    let lane = |v: u128, n: u32| sign((v >> (n * bits) & mask) as u64, size) as i64;
    let lanes = 16 / size;
    let mut r = 0;
    for n in 0..lanes {
        let from = if n < lanes / 2 { a } else { b };
        let at = n % (lanes / 2) * 2;
        let v = f(lane(from, at), lane(from, at + 1));
        r |= (u128::from(v as u64) & mask) << (n * bits);
    }
    r
}

/// Shifts lanes by the count in the low 64 bits of `b`, or by the immediate.
fn shift(size: u32, a: u128, count: u64, f: impl Fn(u64, u32) -> u64) -> u128 {
    let count = count.min(u64::from(size) * 8) as u32;
    each(size, a, 0, |x, _| f(x, count))
}

fn left(size: u32, a: u128, count: u64) -> u128 {
    shift(
        size,
        a,
        count,
        |x, n| if n >= size * 8 { 0 } else { x << n },
    )
}

fn right(size: u32, a: u128, count: u64) -> u128 {
    shift(
        size,
        a,
        count,
        |x, n| if n >= size * 8 { 0 } else { x >> n },
    )
}

fn arithmetic(size: u32, a: u128, count: u64) -> u128 {
    shift(size, a, count, |x, n| {
        (sign(x, size) as i64 >> n.min(size * 8 - 1)) as u64
    })
}

/// The count of a shift: an immediate, or the low half of a vector.
fn count(b: u128, imm: u8) -> u64 {
    b as u64 | u64::from(imm)
}

/// Converts lanes of `from` bytes in the low part of `b` to lanes of `to` bytes.
fn widen(from: u32, to: u32, b: u128, signs: bool) -> u128 {
    let mut r = 0;
    for n in 0..16 / to {
        let x = zero((b >> (n * from * 8)) as u64, from);
        let x = if signs { zero(sign(x, from), to) } else { x };
        r |= u128::from(x) << (n * to * 8);
    }
    r
}

/// Sums of pairs of products of 16-bit lanes.
fn multiply_add(a: u128, b: u128) -> u128 {
    let mut r = 0;
    for n in 0..4 {
        let lane = |v: u128, k: u32| i64::from((v >> (n * 32 + k * 16)) as i16);
        let sum = lane(a, 0) * lane(b, 0) + lane(a, 1) * lane(b, 1);
        r |= u128::from(sum as u32) << (n * 32);
    }
    r
}

/// Unsigned bytes of `a` times signed bytes of `b`, pairs added with saturation.
fn multiply_add_bytes(a: u128, b: u128) -> u128 {
    let mut r = 0;
    for n in 0..8 {
        let x = |k: u32| i64::from((a >> (n * 16 + k * 8)) as u8);
        let y = |k: u32| i64::from((b >> (n * 16 + k * 8)) as i8);
        let sum = saturate(x(0) * y(0) + x(1) * y(1), 16);
        r |= u128::from(sum as u16) << (n * 16);
    }
    r
}

fn sum_of_differences(a: u128, b: u128) -> u128 {
    let half = |shift: u32| -> u128 {
        (0..8)
            .map(|n| {
                let at = shift + n * 8;
                u128::from(((a >> at) as u8).abs_diff((b >> at) as u8))
            })
            .sum()
    };
    half(0) | half(64) << 64
}

/// MPSADBW: sums of differences of four bytes at eight offsets.
fn multiple_sums(a: u128, b: u128, imm: u8) -> u128 {
    let from = u32::from(imm >> 2 & 1) * 32;
    let fixed = u32::from(imm & 3) * 32;
    let mut r = 0;
    for n in 0..8 {
        let sum: u128 = (0..4)
            .map(|k| {
                let x = (a >> (from + (n + k) * 8)) as u8;
                let y = (b >> (fixed + k * 8)) as u8;
                u128::from(x.abs_diff(y))
            })
            .sum();
        r |= sum << (n * 16);
    }
    r
}

fn minimum_position(b: u128) -> u128 {
    let (mut best, mut at) = (u16::MAX, 0);
    for n in (0..8).rev() {
        let v = (b >> (n * 16)) as u16;
        if v <= best {
            (best, at) = (v, n);
        }
    }
    u128::from(best) | at << 16
}

pub(super) fn operation(m: M) -> Option<Packed> {
    Some(match m {
        M::Pand | M::Andps | M::Andpd => |a, b, _| a & b,
        M::Pandn | M::Andnps | M::Andnpd => |a, b, _| !a & b,
        M::Por | M::Orps | M::Orpd => |a, b, _| a | b,
        M::Pxor | M::Xorps | M::Xorpd => |a, b, _| a ^ b,
        M::Paddb => |a, b, _| each(1, a, b, u64::wrapping_add),
        M::Paddw => |a, b, _| each(2, a, b, u64::wrapping_add),
        M::Paddd => |a, b, _| each(4, a, b, u64::wrapping_add),
        M::Paddq => |a, b, _| each(8, a, b, u64::wrapping_add),
        M::Psubb => |a, b, _| each(1, a, b, u64::wrapping_sub),
        M::Psubw => |a, b, _| each(2, a, b, u64::wrapping_sub),
        M::Psubd => |a, b, _| each(4, a, b, u64::wrapping_sub),
        M::Psubq => |a, b, _| each(8, a, b, u64::wrapping_sub),
        M::Paddsb => |a, b, _| signed(1, a, b, |x, y| saturate(x + y, 8)),
        M::Paddsw => |a, b, _| signed(2, a, b, |x, y| saturate(x + y, 16)),
        M::Psubsb => |a, b, _| signed(1, a, b, |x, y| saturate(x - y, 8)),
        M::Psubsw => |a, b, _| signed(2, a, b, |x, y| saturate(x - y, 16)),
        M::Paddusb => |a, b, _| each(1, a, b, |x, y| (x + y).min(0xff)),
        M::Paddusw => |a, b, _| each(2, a, b, |x, y| (x + y).min(0xffff)),
        M::Psubusb => |a, b, _| each(1, a, b, u64::saturating_sub),
        M::Psubusw => |a, b, _| each(2, a, b, u64::saturating_sub),
        M::Pmullw => |a, b, _| each(2, a, b, u64::wrapping_mul),
        M::Pmulld => |a, b, _| each(4, a, b, u64::wrapping_mul),
        M::Pmulhw => |a, b, _| signed(2, a, b, |x, y| (x * y) >> 16),
        M::Pmulhuw => |a, b, _| each(2, a, b, |x, y| (x * y) >> 16),
        M::Pmulhrsw => |a, b, _| signed(2, a, b, |x, y| (((x * y) >> 14) + 1) >> 1),
        M::Pmuludq => |a, b, _| each(8, a, b, |x, y| (x & 0xffff_ffff) * (y & 0xffff_ffff)),
        M::Pmuldq => |a, b, _| {
            each(8, a, b, |x, y| {
                (i64::from(x as i32) * i64::from(y as i32)) as u64
            })
        },
        M::Pmaddwd => |a, b, _| multiply_add(a, b),
        M::Pmaddubsw => |a, b, _| multiply_add_bytes(a, b),
        M::Pavgb => |a, b, _| each(1, a, b, |x, y| (x + y + 1) >> 1),
        M::Pavgw => |a, b, _| each(2, a, b, |x, y| (x + y + 1) >> 1),
        M::Pminub => |a, b, _| each(1, a, b, u64::min),
        M::Pminuw => |a, b, _| each(2, a, b, u64::min),
        M::Pminud => |a, b, _| each(4, a, b, u64::min),
        M::Pmaxub => |a, b, _| each(1, a, b, u64::max),
        M::Pmaxuw => |a, b, _| each(2, a, b, u64::max),
        M::Pmaxud => |a, b, _| each(4, a, b, u64::max),
        M::Pminsb => |a, b, _| signed(1, a, b, i64::min),
        M::Pminsw => |a, b, _| signed(2, a, b, i64::min),
        M::Pminsd => |a, b, _| signed(4, a, b, i64::min),
        M::Pmaxsb => |a, b, _| signed(1, a, b, i64::max),
        M::Pmaxsw => |a, b, _| signed(2, a, b, i64::max),
        M::Pmaxsd => |a, b, _| signed(4, a, b, i64::max),
        M::Pcmpeqb => |a, b, _| each(1, a, b, |x, y| all(x == y)),
        M::Pcmpeqw => |a, b, _| each(2, a, b, |x, y| all(x == y)),
        M::Pcmpeqd => |a, b, _| each(4, a, b, |x, y| all(x == y)),
        M::Pcmpeqq => |a, b, _| each(8, a, b, |x, y| all(x == y)),
        M::Pcmpgtb => |a, b, _| signed(1, a, b, |x, y| all(x > y) as i64),
        M::Pcmpgtw => |a, b, _| signed(2, a, b, |x, y| all(x > y) as i64),
        M::Pcmpgtd => |a, b, _| signed(4, a, b, |x, y| all(x > y) as i64),
        M::Pcmpgtq => |a, b, _| signed(8, a, b, |x, y| all(x > y) as i64),
        M::Pabsb => |_, b, _| signed(1, b, 0, |x, _| x.abs()),
        M::Pabsw => |_, b, _| signed(2, b, 0, |x, _| x.abs()),
        M::Pabsd => |_, b, _| signed(4, b, 0, |x, _| x.abs()),
        M::Psignb => |a, b, _| signed(1, a, b, |x, y| x * y.signum()),
        M::Psignw => |a, b, _| signed(2, a, b, |x, y| x * y.signum()),
        M::Psignd => |a, b, _| signed(4, a, b, |x, y| x * y.signum()),
        M::Phaddw => |a, b, _| neighbours(2, a, b, |x, y| x + y),
        M::Phaddd => |a, b, _| neighbours(4, a, b, |x, y| x + y),
        M::Phaddsw => |a, b, _| neighbours(2, a, b, |x, y| saturate(x + y, 16)),
        M::Phsubw => |a, b, _| neighbours(2, a, b, |x, y| x - y),
        M::Phsubd => |a, b, _| neighbours(4, a, b, |x, y| x - y),
        M::Phsubsw => |a, b, _| neighbours(2, a, b, |x, y| saturate(x - y, 16)),
        M::Psadbw => |a, b, _| sum_of_differences(a, b),
        M::Mpsadbw => multiple_sums,
        M::Phminposuw => |_, b, _| minimum_position(b),
        M::Psllw => |a, b, i| left(2, a, count(b, i)),
        M::Pslld => |a, b, i| left(4, a, count(b, i)),
        M::Psllq => |a, b, i| left(8, a, count(b, i)),
        M::Psrlw => |a, b, i| right(2, a, count(b, i)),
        M::Psrld => |a, b, i| right(4, a, count(b, i)),
        M::Psrlq => |a, b, i| right(8, a, count(b, i)),
        M::Psraw => |a, b, i| arithmetic(2, a, count(b, i)),
        M::Psrad => |a, b, i| arithmetic(4, a, count(b, i)),
        M::Pslldq => |a, _, i| if i > 15 { 0 } else { a << (u32::from(i) * 8) },
        M::Psrldq => |a, _, i| if i > 15 { 0 } else { a >> (u32::from(i) * 8) },
        M::Packsswb => |a, b, _| pack(2, a, b, saturate),
        M::Packssdw => |a, b, _| pack(4, a, b, saturate),
        M::Packuswb => |a, b, _| pack(2, a, b, saturate_unsigned),
        M::Packusdw => |a, b, _| pack(4, a, b, saturate_unsigned),
        M::Pmovsxbw => |_, b, _| widen(1, 2, b, true),
        M::Pmovsxbd => |_, b, _| widen(1, 4, b, true),
        M::Pmovsxbq => |_, b, _| widen(1, 8, b, true),
        M::Pmovsxwd => |_, b, _| widen(2, 4, b, true),
        M::Pmovsxwq => |_, b, _| widen(2, 8, b, true),
        M::Pmovsxdq => |_, b, _| widen(4, 8, b, true),
        M::Pmovzxbw => |_, b, _| widen(1, 2, b, false),
        M::Pmovzxbd => |_, b, _| widen(1, 4, b, false),
        M::Pmovzxbq => |_, b, _| widen(1, 8, b, false),
        M::Pmovzxwd => |_, b, _| widen(2, 4, b, false),
        M::Pmovzxwq => |_, b, _| widen(2, 8, b, false),
        M::Pmovzxdq => |_, b, _| widen(4, 8, b, false),
        _ => return None,
    })
}

/// Lanes of `size` bytes of `a`, then of `b`, narrowed to half with saturation.
fn pack(size: u32, a: u128, b: u128, narrow: fn(i64, u32) -> i64) -> u128 {
    let (bits, half) = (size * 8, size * 4);
    let lanes = 16 / size;
    let mut r = 0;
    for n in 0..lanes * 2 {
        let from = if n < lanes { a } else { b };
        let x = sign((from >> (n % lanes * bits)) as u64, size) as i64;
        let v = narrow(x, half) as u64;
        r |= u128::from(v & ((1 << half) - 1)) << (n * half);
    }
    r
}
