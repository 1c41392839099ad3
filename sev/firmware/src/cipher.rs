//! Memory encryption.
//!
//! Each 16-byte block is encrypted with AES-128 between two additions of a tweak that is the
//! block's address under a second key (XEX). Hardware uses a tweak function that AMD does not
//! publish; what software can observe is the same: equal plain text at two addresses or under two
//! keys differs, and a block moved to another address decrypts to noise.

use aes::Aes128;
use aes::cipher::generic_array::GenericArray;
use aes::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};

type Block = aes::Block;

/// Granularity of memory encryption.
pub(crate) const BLOCK: usize = 16;
/// Blocks handled at once: one page.
const BATCH: usize = 256;

/// The key of one guest's memory.
pub(crate) struct MemoryKey {
    data: Aes128,
    tweak: Aes128,
}

impl MemoryKey {
    pub(crate) fn new(seed: &[u8; 32]) -> Self {
        let (data, tweak) = seed.split_at(16);
        Self {
            data: Aes128::new(GenericArray::from_slice(data)),
            tweak: Aes128::new(GenericArray::from_slice(tweak)),
        }
    }

    /// Encrypts whole blocks that lie at `address`, in place.
    pub(crate) fn encrypt(&self, address: u64, data: &mut [u8]) {
        self.apply(address, data, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts whole blocks that lie at `address`, in place.
    pub(crate) fn decrypt(&self, address: u64, data: &mut [u8]) {
        self.apply(address, data, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn apply(&self, address: u64, data: &mut [u8], cipher: impl Fn(&mut [Block])) {
        debug_assert_eq!((address as usize | data.len()) % BLOCK, 0);
        let mut tweaks = [Block::default(); BATCH];
        let mut blocks = [Block::default(); BATCH];
        for (batch, part) in data.chunks_mut(BATCH * BLOCK).enumerate() {
            let n = part.len() / BLOCK;
            let (tweaks, blocks) = (&mut tweaks[..n], &mut blocks[..n]);
            for (i, tweak) in tweaks.iter_mut().enumerate() {
                let at = address + ((batch * BATCH + i) * BLOCK) as u64;
                *tweak = Block::default();
                tweak[..8].copy_from_slice(&at.to_le_bytes());
            }
            self.tweak.encrypt_blocks(tweaks);
            for ((block, bytes), tweak) in blocks
                .iter_mut()
                .zip(part.chunks_exact(BLOCK))
                .zip(&*tweaks)
            {
                *block = xor(bytes, tweak);
            }
            cipher(blocks);
            for ((block, bytes), tweak) in blocks
                .iter()
                .zip(part.chunks_exact_mut(BLOCK))
                .zip(&*tweaks)
            {
                bytes.copy_from_slice(&xor(block, tweak));
            }
        }
    }
}

fn xor(a: &[u8], b: &Block) -> Block {
    let mut out = *b;
    for (o, x) in out.iter_mut().zip(a) {
        *o ^= x;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_decrypts_only_at_its_address_and_under_its_key() {
        let (key, other) = (MemoryKey::new(&[1; 32]), MemoryKey::new(&[2; 32]));
        let plain = [7_u8; 3 * 4096 + 48];
        let mut data = plain;
        key.encrypt(0x1000, &mut data);
        // Equal plain text, different addresses.
        assert_ne!(data[..16], data[16..32]);
        for (k, address) in [(&other, 0x1000), (&key, 0x2000)] {
            let mut copy = data;
            k.decrypt(address, &mut copy);
            assert!(copy.chunks(16).all(|b| b != [7; 16]));
        }
        let mut part = data[4096..4112].to_vec();
        key.decrypt(0x2000, &mut part);
        assert_eq!(part, plain[..16]);
        key.decrypt(0x1000, &mut data);
        assert_eq!(data, plain);
    }
}
