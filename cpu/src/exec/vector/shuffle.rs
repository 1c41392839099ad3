//! Shuffles, blends and interleaving.

use iced_x86::Mnemonic as M;

use super::Packed;

fn lane(v: u128, n: u32, bits: u32) -> u128 {
    v >> (n * bits) & u128::MAX >> (128 - bits)
}

/// Interleaves the low or high half of the lanes.
fn interleave(size: u32, high: bool, a: u128, b: u128) -> u128 {
    let bits = size * 8;
    let lanes = 16 / size;
    let first = if high { lanes / 2 } else { 0 };
    let mut r = 0;
    for n in 0..lanes / 2 {
        r |= lane(a, first + n, bits) << (2 * n * bits);
        r |= lane(b, first + n, bits) << ((2 * n + 1) * bits);
    }
    r
}

/// Takes lanes where the top bit of the selector's lane is set from `b`.
pub(super) fn blend(a: u128, b: u128, selector: u128, size: u32) -> u128 {
    let bits = size * 8;
    let mut r = 0;
    for n in 0..16 / size {
        let on = selector >> (n * bits + bits - 1) & 1 != 0;
        r |= lane(if on { b } else { a }, n, bits) << (n * bits);
    }
    r
}

/// Takes lane `n` from `b` if bit `n` of the immediate is set.
fn blend_imm(size: u32, a: u128, b: u128, imm: u8) -> u128 {
    let bits = size * 8;
    let mut r = 0;
    for n in 0..16 / size {
        let from = if imm >> n & 1 != 0 { b } else { a };
        r |= lane(from, n, bits) << (n * bits);
    }
    r
}

fn shuffle_bytes(a: u128, b: u128) -> u128 {
    let mut r = 0;
    for n in 0..16 {
        let control = (b >> (n * 8)) as u8;
        if control & 0x80 == 0 {
            r |= lane(a, u32::from(control & 15), 8) << (n * 8);
        }
    }
    r
}

fn align(a: u128, b: u128, imm: u8) -> u128 {
    match u32::from(imm) * 8 {
        0 => b,
        n @ 1..128 => b >> n | a << (128 - n),
        128 => a,
        n @ 129..256 => a >> (n - 128),
        _ => 0,
    }
}

/// Four lanes of `b` by two bits each.
fn four(b: u128, bits: u32, imm: u8) -> u128 {
    (0..4)
        .map(|n| lane(b, u32::from(imm >> (n * 2) & 3), bits) << (n * bits))
        .sum()
}

pub(super) fn operation(m: M) -> Option<Packed> {
    Some(match m {
        M::Punpcklbw => |a, b, _| interleave(1, false, a, b),
        M::Punpcklwd => |a, b, _| interleave(2, false, a, b),
        M::Punpckldq | M::Unpcklps => |a, b, _| interleave(4, false, a, b),
        M::Punpcklqdq | M::Unpcklpd => |a, b, _| interleave(8, false, a, b),
        M::Punpckhbw => |a, b, _| interleave(1, true, a, b),
        M::Punpckhwd => |a, b, _| interleave(2, true, a, b),
        M::Punpckhdq | M::Unpckhps => |a, b, _| interleave(4, true, a, b),
        M::Punpckhqdq | M::Unpckhpd => |a, b, _| interleave(8, true, a, b),
        M::Pshufb => |a, b, _| shuffle_bytes(a, b),
        M::Pshufd => |_, b, i| four(b, 32, i),
        M::Pshuflw => |_, b, i| b & !(u64::MAX as u128) | four(b & u64::MAX as u128, 16, i),
        M::Pshufhw => |_, b, i| b & u64::MAX as u128 | four(b >> 64, 16, i) << 64,
        M::Shufps => |a, b, i| {
            let low = four(a, 32, i) & u64::MAX as u128;
            low | four(b, 32, i) & !(u64::MAX as u128)
        },
        M::Shufpd => |a, b, i| lane(a, (i & 1).into(), 64) | lane(b, (i >> 1 & 1).into(), 64) << 64,
        M::Palignr => align,
        M::Pblendw => |a, b, i| blend_imm(2, a, b, i),
        M::Blendps => |a, b, i| blend_imm(4, a, b, i),
        M::Blendpd => |a, b, i| blend_imm(8, a, b, i),
        // XMM0 is their third operand, which the caller has.
        M::Pblendvb | M::Blendvps | M::Blendvpd => |a, _, _| a,
        _ => return None,
    })
}
