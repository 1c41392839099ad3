//! AES, carry-less multiplication and SHA.

use aes::hazmat::{cipher_round, equiv_inv_cipher_round, inv_mix_columns, mix_columns};
use iced_x86::Mnemonic as M;

use super::Packed;

fn block(v: u128, f: impl Fn(&mut aes::Block)) -> u128 {
    let mut b = aes::Block::from(v.to_le_bytes());
    f(&mut b);
    u128::from_le_bytes(b.into())
}

fn key(v: u128) -> aes::Block {
    aes::Block::from(v.to_le_bytes())
}

/// The last round has no MixColumns, so that of the crate's round is undone.
fn last_round(a: u128, k: u128) -> u128 {
    block(a, |b| {
        cipher_round(b, &key(0));
        inv_mix_columns(b);
    }) ^ k
}

fn last_inverse_round(a: u128, k: u128) -> u128 {
    block(a, |b| {
        equiv_inv_cipher_round(b, &key(0));
        mix_columns(b);
    }) ^ k
}

/// The S-box on four bytes: with four equal columns ShiftRows changes nothing.
fn substitute(word: u32) -> u32 {
    let column = u128::from(word);
    last_round(column | column << 32 | column << 64 | column << 96, 0) as u32
}

fn key_assist(b: u128, imm: u8) -> u128 {
    let one = substitute((b >> 32) as u32);
    let three = substitute((b >> 96) as u32);
    let turned = |w: u32| u128::from(w.rotate_right(8) ^ u32::from(imm));
    u128::from(one) | turned(one) << 32 | u128::from(three) << 64 | turned(three) << 96
}

fn carryless(a: u128, b: u128, imm: u8) -> u128 {
    let x = a >> if imm & 1 != 0 { 64 } else { 0 };
    let y = (b >> if imm & 16 != 0 { 64 } else { 0 }) as u64;
    let x = u128::from(x as u64);
    (0..64)
        .filter(|n| y >> n & 1 != 0)
        .fold(0, |r, n| r ^ x << n)
}

/// 32-bit lane `n`.
fn word(v: u128, n: u32) -> u32 {
    (v >> (n * 32)) as u32
}

fn words(w: [u32; 4]) -> u128 {
    w.iter().rev().fold(0, |r, w| r << 32 | u128::from(*w))
}

fn sha1_rounds(a: u128, b: u128, imm: u8) -> u128 {
    let (mut s, mut e) = ([word(a, 3), word(a, 2), word(a, 1), word(a, 0)], 0u32);
    let constant = [0x5a82_7999, 0x6ed9_eba1, 0x8f1b_bcdc, 0xca62_c1d6][usize::from(imm & 3)];
    for n in 0..4 {
        let [x, y, z, w] = s;
        let f = match imm & 3 {
            0 => y & z ^ !y & w,
            2 => y & z ^ y & w ^ z & w,
            _ => y ^ z ^ w,
        };
        let next = f
            .wrapping_add(x.rotate_left(5))
            .wrapping_add(word(b, 3 - n))
            .wrapping_add(e)
            .wrapping_add(constant);
        e = w;
        s = [next, x, y.rotate_left(30), z];
    }
    words([s[3], s[2], s[1], s[0]])
}

fn sha1_message1(a: u128, b: u128) -> u128 {
    words([
        word(a, 0) ^ word(b, 2),
        word(a, 1) ^ word(b, 3),
        word(a, 2) ^ word(a, 0),
        word(a, 3) ^ word(a, 1),
    ])
}

fn sha1_message2(a: u128, b: u128) -> u128 {
    let w16 = (word(a, 3) ^ word(b, 2)).rotate_left(1);
    let w17 = (word(a, 2) ^ word(b, 1)).rotate_left(1);
    let w18 = (word(a, 1) ^ word(b, 0)).rotate_left(1);
    let w19 = (word(a, 0) ^ w16).rotate_left(1);
    words([w19, w18, w17, w16])
}

fn sha256_message1(a: u128, b: u128) -> u128 {
    let s0 = |w: u32| w.rotate_right(7) ^ w.rotate_right(18) ^ w >> 3;
    let w = [word(a, 0), word(a, 1), word(a, 2), word(a, 3), word(b, 0)];
    words([0, 1, 2, 3].map(|n| w[n].wrapping_add(s0(w[n + 1]))))
}

fn sha256_message2(a: u128, b: u128) -> u128 {
    let s1 = |w: u32| w.rotate_right(17) ^ w.rotate_right(19) ^ w >> 10;
    let w16 = word(a, 0).wrapping_add(s1(word(b, 2)));
    let w17 = word(a, 1).wrapping_add(s1(word(b, 3)));
    words([
        w16,
        w17,
        word(a, 2).wrapping_add(s1(w16)),
        word(a, 3).wrapping_add(s1(w17)),
    ])
}

/// SHA256RNDS2: `a` is CDGH, `b` ABEF, `k` the message words with their constants.
pub(super) fn sha256_rounds(a: u128, b: u128, k: u128) -> u128 {
    let mut s = [
        word(b, 3),
        word(b, 2),
        word(a, 3),
        word(a, 2),
        word(b, 1),
        word(b, 0),
        word(a, 1),
        word(a, 0),
    ];
    for n in 0..2 {
        let [x, y, z, w, e, f, g, h] = s;
        let choose = e & f ^ !e & g;
        let majority = x & y ^ x & z ^ y & z;
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let s0 = x.rotate_right(2) ^ x.rotate_right(13) ^ x.rotate_right(22);
        let t = choose
            .wrapping_add(s1)
            .wrapping_add(word(k, n))
            .wrapping_add(h);
        s = [
            t.wrapping_add(majority).wrapping_add(s0),
            x,
            y,
            z,
            t.wrapping_add(w),
            e,
            f,
            g,
        ];
    }
    words([s[5], s[4], s[1], s[0]])
}

pub(super) fn operation(m: M) -> Option<Packed> {
    Some(match m {
        M::Aesenc => |a, b, _| block(a, |x| cipher_round(x, &key(b))),
        M::Aesenclast => |a, b, _| last_round(a, b),
        M::Aesdec => |a, b, _| block(a, |x| equiv_inv_cipher_round(x, &key(b))),
        M::Aesdeclast => |a, b, _| last_inverse_round(a, b),
        M::Aesimc => |_, b, _| block(b, inv_mix_columns),
        M::Aeskeygenassist => |_, b, i| key_assist(b, i),
        M::Pclmulqdq => carryless,
        M::Sha1rnds4 => sha1_rounds,
        M::Sha1nexte => |a, b, _| {
            let e = word(a, 3).rotate_left(30);
            words([
                word(b, 0),
                word(b, 1),
                word(b, 2),
                word(b, 3).wrapping_add(e),
            ])
        },
        M::Sha1msg1 => |a, b, _| sha1_message1(a, b),
        M::Sha1msg2 => |a, b, _| sha1_message2(a, b),
        M::Sha256msg1 => |a, b, _| sha256_message1(a, b),
        M::Sha256msg2 => |a, b, _| sha256_message2(a, b),
        // XMM0 is its third operand, which the caller has.
        M::Sha256rnds2 => |a, _, _| a,
        _ => return None,
    })
}
