//! AES, carry-less multiplication and SHA.

use iced_x86::Mnemonic as M;
use softaes::unprotected::key_schedule::inv_mix_block;
use softaes::unprotected::{Block, SoftAes};

use super::Packed;

fn block(v: u128) -> Block {
    Block::from_bytes(&v.to_le_bytes())
}

/// One of the crate's rounds, on the state `a` with the round key `k`.
fn round(of: fn(&Block, &Block) -> Block, a: u128, k: u128) -> u128 {
    u128::from_le_bytes(of(&block(a), &block(k)).to_bytes())
}

/// The S-box on four bytes: with four equal columns ShiftRows changes nothing.
fn substitute(word: u32) -> u32 {
    let column = u128::from(word);
    let columns = column | column << 32 | column << 64 | column << 96;
    round(SoftAes::block_encrypt_last, columns, 0) as u32
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
        M::Aesenc => |a, b, _| round(SoftAes::block_encrypt, a, b),
        M::Aesenclast => |a, b, _| round(SoftAes::block_encrypt_last, a, b),
        M::Aesdec => |a, b, _| round(SoftAes::block_decrypt, a, b),
        M::Aesdeclast => |a, b, _| round(SoftAes::block_decrypt_last, a, b),
        M::Aesimc => |_, b, _| u128::from_le_bytes(inv_mix_block(block(b)).to_bytes()),
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

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    fn run(m: M, a: u128, b: u128, imm: u8) -> u128 {
        operation(m).expect("an operation")(a, b, imm)
    }

    /// The key schedule as AESKEYGENASSIST is used for it.
    fn schedule(key: u128) -> Vec<u128> {
        let constants = [1, 2, 4, 8, 16, 32, 64, 128, 0x1b, 0x36];
        let mut keys = vec![key];
        for constant in constants {
            let last = keys[keys.len() - 1];
            let assist = run(M::Aeskeygenassist, 0, last, constant) >> 96;
            let sums = last ^ last << 32 ^ last << 64 ^ last << 96;
            keys.push(sums ^ (assist | assist << 32 | assist << 64 | assist << 96));
        }
        keys
    }

    /// FIPS 197, appendix C.1, in the bytes' order in memory.
    #[test]
    fn aes_128_encrypts_and_decrypts_the_standards_example() {
        let plain = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128.swap_bytes();
        let cipher = 0x69c4_e0d8_6a7b_0430_d8cd_b780_70b4_c55a_u128.swap_bytes();
        let keys = schedule(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f_u128.swap_bytes());

        let mut state = plain ^ keys[0];
        for key in &keys[1..10] {
            state = run(M::Aesenc, state, *key, 0);
        }
        assert_eq!(run(M::Aesenclast, state, keys[10], 0), cipher);

        let mut state = cipher ^ keys[10];
        for key in keys[1..10].iter().rev() {
            state = run(M::Aesdec, state, run(M::Aesimc, 0, *key, 0), 0);
        }
        assert_eq!(run(M::Aesdeclast, state, keys[0], 0), plain);
    }
}
