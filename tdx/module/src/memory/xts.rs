//! AES-128-XTS over lines of 64 bytes, the lines of a page at once.
//!
//! A cipher's rounds wait for each other, so blocks are quick only beside other blocks. Crates for XTS go through a
//! data unit block by block, and a line has four; here a page's 64 tweaks are one call of the cipher and its 256
//! blocks another.

use super::{LINE, PAGE};
use aes::Aes128;
use aes::cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16};

const BLOCK: usize = 16;
/// Blocks of a line.
const BLOCKS: usize = LINE / BLOCK;
/// Lines of a page.
const LINES: usize = PAGE / LINE;

/// The two keys of XTS.
pub(super) struct Xts {
    data: Aes128,
    tweak: Aes128,
}

impl Xts {
    pub(super) fn new(data: &[u8; 16], tweak: &[u8; 16]) -> Self {
        Xts {
            data: Aes128::new(data.into()),
            tweak: Aes128::new(tweak.into()),
        }
    }

    /// Encrypts whole lines, the first of which is at `pa`.
    pub(super) fn encrypt(&self, pa: u64, lines: &mut [u8]) {
        self.each(pa, lines, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts whole lines, the first of which is at `pa`.
    pub(super) fn decrypt(&self, pa: u64, lines: &mut [u8]) {
        self.each(pa, lines, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn each(&self, mut pa: u64, lines: &mut [u8], cipher: impl Fn(&mut [Block<Aes128>])) {
        let (pages, rest) = lines.as_chunks_mut::<PAGE>();
        for page in pages {
            self.together::<LINES>(pa, page, &cipher);
            pa = pa.wrapping_add(PAGE as u64);
        }
        for line in rest.as_chunks_mut::<LINE>().0 {
            self.together::<1>(pa, line, &cipher);
            pa = pa.wrapping_add(LINE as u64);
        }
    }

    /// Passes `N` lines through the cipher together.
    fn together<const N: usize>(
        &self,
        pa: u64,
        lines: &mut [u8],
        cipher: impl Fn(&mut [Block<Aes128>]),
    ) {
        let address = |n: usize| u128::from(pa.wrapping_add((n * LINE) as u64));
        let mut tweaks: [Block<Aes128>; N] =
            core::array::from_fn(|n| address(n).to_le_bytes().into());
        self.tweak.encrypt_blocks(&mut tweaks);
        let masks: [[u128; BLOCKS]; N] = core::array::from_fn(|n| masks(tweaks[n].into()));
        let masks = masks.as_flattened();
        mask(lines, masks);
        cipher(Array::<u8, U16>::slice_as_chunks_mut(lines).0);
        mask(lines, masks);
    }
}

/// The masks of a line's blocks: the encrypted tweak, doubled from block to block in the field of XTS.
fn masks(tweak: [u8; BLOCK]) -> [u128; BLOCKS] {
    let mut next = u128::from_le_bytes(tweak);
    core::array::from_fn(|_| {
        let this = next;
        next = (this << 1) ^ ((this >> 127) * 0x87);
        this
    })
}

fn mask(lines: &mut [u8], masks: &[u128]) {
    for (block, mask) in lines.as_chunks_mut::<BLOCK>().0.iter_mut().zip(masks) {
        *block = (u128::from_le_bytes(*block) ^ mask).to_le_bytes();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use aes_before_09::cipher::KeyInit as _;
    use proptest::prelude::*;
    use xts_mode::Xts128;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        /// Pages, lines and pages with lines behind them, at any address.
        #[test]
        fn lines_are_encrypted_as_another_implementation_does(
            keys: [[u8; 16]; 2],
            first in 0u64..1 << 46,
            count in prop_oneof![1usize..4, 62usize..67, 128usize..131],
            fill: u8,
        ) {
            let [data, tweak] = keys;
            let key = |bytes: [u8; 16]| aes_before_09::Aes128::new(&bytes.into());
            let other = Xts128::new(key(data), key(tweak));
            let pa = first * LINE as u64;
            let plain: Vec<u8> = (0..count * LINE).map(|n| fill ^ (n % 251) as u8).collect();
            let mut expected = plain.clone();
            for (line, at) in expected.chunks_mut(LINE).zip((pa..).step_by(LINE)) {
                other.encrypt_sector(line, u128::from(at).to_le_bytes());
            }
            let ours = Xts::new(&data, &tweak);
            let mut text = plain.clone();
            ours.encrypt(pa, &mut text);
            prop_assert_eq!(&text, &expected);
            ours.decrypt(pa, &mut text);
            prop_assert_eq!(&text, &plain);
        }
    }
}
