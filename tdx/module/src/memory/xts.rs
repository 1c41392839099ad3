//! AES-128-XTS over lines of 64 bytes, the lines of a page at once.
//!
//! A cipher's rounds wait for each other, so blocks are quick only beside other blocks. Crates for XTS go through a
//! data unit block by block, and a line has four; here a page's 64 tweaks are one call of the cipher and its 256
//! blocks another.

use super::{LINE, PAGE};
use aes::Aes128;
use aes::cipher::inout::InOutBuf;
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

    /// Encrypts whole lines, the first of which is at `pa`: in place, or from one buffer into another.
    pub(super) fn encrypt(&self, pa: u64, lines: InOutBuf<'_, '_, u8>) {
        self.each(pa, lines, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts whole lines, the first of which is at `pa`: in place, or from one buffer into another.
    pub(super) fn decrypt(&self, pa: u64, lines: InOutBuf<'_, '_, u8>) {
        self.each(pa, lines, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn each(
        &self,
        mut pa: u64,
        mut lines: InOutBuf<'_, '_, u8>,
        cipher: impl Fn(&mut [Block<Aes128>]),
    ) {
        while lines.len() >= PAGE {
            let (page, rest) = lines.split_at(PAGE);
            self.together::<LINES>(pa, page, &cipher);
            (pa, lines) = (pa.wrapping_add(PAGE as u64), rest);
        }
        while lines.len() >= LINE {
            let (line, rest) = lines.split_at(LINE);
            self.together::<1>(pa, line, &cipher);
            (pa, lines) = (pa.wrapping_add(LINE as u64), rest);
        }
    }

    /// Passes `N` lines through the cipher together.
    fn together<const N: usize>(
        &self,
        pa: u64,
        mut lines: InOutBuf<'_, '_, u8>,
        cipher: impl Fn(&mut [Block<Aes128>]),
    ) {
        // Filled where they are: arrays that a function makes are copied once more.
        let mut tweaks = [Block::<Aes128>::default(); N];
        for (tweak, at) in tweaks.iter_mut().zip((pa..).step_by(LINE)) {
            *tweak = u128::from(at).to_le_bytes().into();
        }
        self.tweak.encrypt_blocks(&mut tweaks);
        let mut masks = [[0; BLOCKS]; N];
        for (masks, tweak) in masks.iter_mut().zip(tweaks) {
            *masks = masks_of(tweak.into());
        }
        let masks = masks.as_flattened();
        mask(lines.reborrow(), masks);
        let lines = lines.get_out();
        cipher(Array::<u8, U16>::slice_as_chunks_mut(lines).0);
        mask(lines.into(), masks);
    }
}

/// The masks of a line's blocks: the encrypted tweak, doubled from block to block in the field of XTS.
fn masks_of(tweak: [u8; BLOCK]) -> [u128; BLOCKS] {
    let mut next = u128::from_le_bytes(tweak);
    core::array::from_fn(|_| {
        let this = next;
        next = (this << 1) ^ ((this >> 127) * 0x87);
        this
    })
}

fn mask(lines: InOutBuf<'_, '_, u8>, masks: &[u128]) {
    for (mut block, mask) in lines.into_chunks::<U16>().0.into_iter().zip(masks) {
        let masked = u128::from_le_bytes(block.clone_in().into()) ^ mask;
        *block.get_out() = masked.to_le_bytes().into();
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
            ours.encrypt(pa, (&mut text[..]).into());
            prop_assert_eq!(&text, &expected);
            let mut copy = vec![fill; text.len()];
            let from_to = InOutBuf::new(&text[..], &mut copy[..]);
            ours.decrypt(pa, from_to.expect("of equal length"));
            prop_assert_eq!(&copy, &plain);
            ours.decrypt(pa, (&mut text[..]).into());
            prop_assert_eq!(&text, &plain);
        }
    }
}
