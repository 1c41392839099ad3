//! SHA-512's compression function on several blocks at once (FIPS 180-4, sections 4.1.3, 4.2.3, 5.3.4
//! and 6.4.2). Each lane of a register holds the same word of another message.

use core::arch::x86_64::*;

use zerocopy::transmute;

use crate::{Digest, PAGE_SIZE, Page};

/// Bytes of a block.
const BLOCK: usize = 128;

/// The block that ends a message of one page: a bit, and the length in bits.
const PADDING: [u8; BLOCK] = {
    let mut block = [0; BLOCK];
    block[0] = 0x80;
    let bits = (PAGE_SIZE as u64 * 8).to_be_bytes();
    block.last_chunk_mut::<8>().unwrap().copy_from_slice(&bits);
    block
};

/// The initial state of SHA-384.
const INITIAL: [u64; 8] = [
    0xcbbb_9d5d_c105_9ed8,
    0x629a_292a_367c_d507,
    0x9159_015a_3070_dd17,
    0x152f_ecd8_f70e_5939,
    0x6733_2667_ffc0_0b31,
    0x8eb4_4a87_6858_1511,
    0xdb0c_2e0d_64f9_8fa7,
    0x47b5_481d_befa_4fa4,
];

/// The round constants.
const K: [u64; 80] = [
    0x428a_2f98_d728_ae22,
    0x7137_4491_23ef_65cd,
    0xb5c0_fbcf_ec4d_3b2f,
    0xe9b5_dba5_8189_dbbc,
    0x3956_c25b_f348_b538,
    0x59f1_11f1_b605_d019,
    0x923f_82a4_af19_4f9b,
    0xab1c_5ed5_da6d_8118,
    0xd807_aa98_a303_0242,
    0x1283_5b01_4570_6fbe,
    0x2431_85be_4ee4_b28c,
    0x550c_7dc3_d5ff_b4e2,
    0x72be_5d74_f27b_896f,
    0x80de_b1fe_3b16_96b1,
    0x9bdc_06a7_25c7_1235,
    0xc19b_f174_cf69_2694,
    0xe49b_69c1_9ef1_4ad2,
    0xefbe_4786_384f_25e3,
    0x0fc1_9dc6_8b8c_d5b5,
    0x240c_a1cc_77ac_9c65,
    0x2de9_2c6f_592b_0275,
    0x4a74_84aa_6ea6_e483,
    0x5cb0_a9dc_bd41_fbd4,
    0x76f9_88da_8311_53b5,
    0x983e_5152_ee66_dfab,
    0xa831_c66d_2db4_3210,
    0xb003_27c8_98fb_213f,
    0xbf59_7fc7_beef_0ee4,
    0xc6e0_0bf3_3da8_8fc2,
    0xd5a7_9147_930a_a725,
    0x06ca_6351_e003_826f,
    0x1429_2967_0a0e_6e70,
    0x27b7_0a85_46d2_2ffc,
    0x2e1b_2138_5c26_c926,
    0x4d2c_6dfc_5ac4_2aed,
    0x5338_0d13_9d95_b3df,
    0x650a_7354_8baf_63de,
    0x766a_0abb_3c77_b2a8,
    0x81c2_c92e_47ed_aee6,
    0x9272_2c85_1482_353b,
    0xa2bf_e8a1_4cf1_0364,
    0xa81a_664b_bc42_3001,
    0xc24b_8b70_d0f8_9791,
    0xc76c_51a3_0654_be30,
    0xd192_e819_d6ef_5218,
    0xd699_0624_5565_a910,
    0xf40e_3585_5771_202a,
    0x106a_a070_32bb_d1b8,
    0x19a4_c116_b8d2_d0c8,
    0x1e37_6c08_5141_ab53,
    0x2748_774c_df8e_eb99,
    0x34b0_bcb5_e19b_48a8,
    0x391c_0cb3_c5c9_5a63,
    0x4ed8_aa4a_e341_8acb,
    0x5b9c_ca4f_7763_e373,
    0x682e_6ff3_d6b2_b8a3,
    0x748f_82ee_5def_b2fc,
    0x78a5_636f_4317_2f60,
    0x84c8_7814_a1f0_ab72,
    0x8cc7_0208_1a64_39ec,
    0x90be_fffa_2363_1e28,
    0xa450_6ceb_de82_bde9,
    0xbef9_a3f7_b2c6_7915,
    0xc671_78f2_e372_532b,
    0xca27_3ece_ea26_619c,
    0xd186_b8c7_21c0_c207,
    0xeada_7dd6_cde0_eb1e,
    0xf57d_4f7f_ee6e_d178,
    0x06f0_67aa_7217_6fba,
    0x0a63_7dc5_a2c8_98a6,
    0x113f_9804_bef9_0dae,
    0x1b71_0b35_131c_471b,
    0x28db_77f5_2304_7d84,
    0x32ca_ab7b_40c7_2493,
    0x3c9e_be0a_15c9_bebc,
    0x431d_67c4_9c10_0d4c,
    0x4cc5_d4be_cb3e_42b6,
    0x597f_299c_fc65_7e2a,
    0x5fcb_6fab_3ad6_faec,
    0x6c44_198c_4a47_5817,
];

/// A module for `$n` lanes in the vector type `$v`, out of the operations that differ.
macro_rules! lanes {
    (
        $name:ident, $features:literal, $v:ident, $n:literal,
        $set1:ident, $add:ident, $xor3:ident, $ch:ident, $maj:ident, $ror:ident, $shr:ident
    ) => {
        pub(crate) mod $name {
            use super::*;

            /// Word `t` of every block, in the processor's byte order.
            #[inline]
            #[target_feature(enable = $features)]
            fn words(blocks: [&[u8; BLOCK]; $n]) -> [$v; 16] {
                let mut words = [[0_u64; $n]; 16];
                for (lane, block) in blocks.iter().enumerate() {
                    for (word, bytes) in words.iter_mut().zip(block.as_chunks::<8>().0) {
                        word[lane] = u64::from_be_bytes(*bytes);
                    }
                }
                transmute!(words)
            }

            /// Replaces word `t` of the message schedule by word `t + 16`.
            #[inline]
            #[target_feature(enable = $features)]
            fn schedule(w: &mut [$v; 16], t: usize) {
                let (x, y) = (w[(t + 1) % 16], w[(t + 14) % 16]);
                let s0 = $xor3($ror::<1, 63>(x), $ror::<8, 56>(x), $shr::<7>(x));
                let s1 = $xor3($ror::<19, 45>(y), $ror::<61, 3>(y), $shr::<6>(y));
                w[t] = $add($add(w[t], s0), $add(w[(t + 9) % 16], s1));
            }

            #[target_feature(enable = $features)]
            fn compress(state: &mut [$v; 8], blocks: [&[u8; BLOCK]; $n]) {
                let mut w = words(blocks);
                let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
                for (sixteen, constants) in K.as_chunks::<16>().0.iter().enumerate() {
                    for (t, constant) in constants.iter().enumerate() {
                        let kw = $add(w[t], $set1(*constant as i64));
                        let s1 = $xor3($ror::<14, 50>(e), $ror::<18, 46>(e), $ror::<41, 23>(e));
                        let t1 = $add($add(h, kw), $add(s1, $ch(e, f, g)));
                        let s0 = $xor3($ror::<28, 36>(a), $ror::<34, 30>(a), $ror::<39, 25>(a));
                        let t2 = $add(s0, $maj(a, b, c));
                        (h, g, f, e) = (g, f, e, $add(d, t1));
                        (d, c, b, a) = (c, b, a, $add(t1, t2));
                        if sixteen < 4 {
                            schedule(&mut w, t);
                        }
                    }
                }
                for (old, new) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
                    *old = $add(*old, new);
                }
            }

            /// The SHA-384 of each page.
            #[target_feature(enable = $features)]
            pub(crate) fn pages(pages: [&Page; $n]) -> [Digest; $n] {
                let mut state = [$set1(0); 8];
                for (word, initial) in state.iter_mut().zip(INITIAL) {
                    *word = $set1(initial as i64);
                }
                let blocks = pages.map(|page| page.as_chunks::<BLOCK>().0);
                for block in 0..PAGE_SIZE / BLOCK {
                    compress(&mut state, blocks.map(|blocks| &blocks[block]));
                }
                compress(&mut state, [&PADDING; $n]);
                let words: [[u64; $n]; 8] = transmute!(state);
                let mut digests = [[0; 48]; $n];
                for (lane, digest) in digests.iter_mut().enumerate() {
                    for (bytes, word) in digest.as_chunks_mut::<8>().0.iter_mut().zip(&words) {
                        *bytes = word[lane].to_be_bytes();
                    }
                }
                digests
            }
        }
    };
}

lanes!(
    four,
    "avx2",
    __m256i,
    4,
    _mm256_set1_epi64x,
    _mm256_add_epi64,
    xor3_256,
    ch_256,
    maj_256,
    ror_256,
    shr_256
);

lanes!(
    eight,
    "avx512f",
    __m512i,
    8,
    _mm512_set1_epi64,
    _mm512_add_epi64,
    xor3_512,
    ch_512,
    maj_512,
    ror_512,
    shr_512
);

#[inline]
#[target_feature(enable = "avx2")]
fn xor3_256(x: __m256i, y: __m256i, z: __m256i) -> __m256i {
    _mm256_xor_si256(_mm256_xor_si256(x, y), z)
}

#[inline]
#[target_feature(enable = "avx2")]
fn ch_256(e: __m256i, f: __m256i, g: __m256i) -> __m256i {
    _mm256_xor_si256(g, _mm256_and_si256(e, _mm256_xor_si256(f, g)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn maj_256(a: __m256i, b: __m256i, c: __m256i) -> __m256i {
    _mm256_or_si256(
        _mm256_and_si256(a, b),
        _mm256_and_si256(c, _mm256_or_si256(a, b)),
    )
}

/// Rotates right by `R`; `L` is 64 - `R`, which a constant expression cannot say yet.
#[inline]
#[target_feature(enable = "avx2")]
fn ror_256<const R: i32, const L: i32>(x: __m256i) -> __m256i {
    const { assert!(R + L == 64) };
    _mm256_or_si256(_mm256_srli_epi64::<R>(x), _mm256_slli_epi64::<L>(x))
}

#[inline]
#[target_feature(enable = "avx2")]
fn shr_256<const N: i32>(x: __m256i) -> __m256i {
    _mm256_srli_epi64::<N>(x)
}

// The immediates of VPTERNLOGQ are truth tables: bit 4x + 2y + z is the result for x, y, z.

#[inline]
#[target_feature(enable = "avx512f")]
fn xor3_512(x: __m512i, y: __m512i, z: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0x96>(x, y, z)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn ch_512(e: __m512i, f: __m512i, g: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0xca>(e, f, g)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn maj_512(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0xe8>(a, b, c)
}

/// Rotates right by `R`; `L` is 64 - `R`, as for AVX2.
#[inline]
#[target_feature(enable = "avx512f")]
fn ror_512<const R: i32, const L: i32>(x: __m512i) -> __m512i {
    const { assert!(R + L == 64) };
    _mm512_ror_epi64::<R>(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shr_512<const N: u32>(x: __m512i) -> __m512i {
    _mm512_srli_epi64::<N>(x)
}
