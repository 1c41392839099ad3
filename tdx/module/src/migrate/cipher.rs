//! AES-256-GCM as migration uses it: one message for each bundle or page, the IV made of counter and stream.

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};

/// A MAC.
pub(crate) type Tag = [u8; 16];
/// A key as the migration TD writes it: four words, the first the lowest bytes.
pub(crate) type KeyWords = [u64; 4];

/// A key in use, expanded.
#[derive(Clone)]
pub(crate) struct Working(Aes256Gcm);

impl Working {
    pub(crate) fn new(words: KeyWords) -> Self {
        let mut key = [0; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Working(Aes256Gcm::new(&key.into()))
    }

    /// Encrypts a message in place and returns its MAC.
    pub(crate) fn seal(&self, counter: u64, stream: u16, aad: &[u8], text: &mut [u8]) -> Tag {
        self.seal_to(counter, stream, aad, text.into())
    }

    /// Encrypts a message in place, or from one buffer into another, and returns its MAC.
    pub(crate) fn seal_to(
        &self,
        counter: u64,
        stream: u16,
        aad: &[u8],
        text: InOutBuf<'_, '_, u8>,
    ) -> Tag {
        self.0
            .encrypt_inout_detached(&nonce(counter, stream), aad, text)
            // Only a text of 64 GiB and more is refused.
            .map_or([0; 16], Into::into)
    }

    /// Decrypts a message in place if its MAC is right, and otherwise leaves it.
    #[must_use]
    pub(crate) fn open(
        &self,
        counter: u64,
        stream: u16,
        aad: &[u8],
        text: &mut [u8],
        mac: &Tag,
    ) -> bool {
        self.open_to(counter, stream, aad, text.into(), mac)
    }

    /// Decrypts a message, in place or from one buffer into another, if its MAC is right, and otherwise writes
    /// nothing.
    #[must_use]
    pub(crate) fn open_to(
        &self,
        counter: u64,
        stream: u16,
        aad: &[u8],
        text: InOutBuf<'_, '_, u8>,
        mac: &Tag,
    ) -> bool {
        self.0
            .decrypt_inout_detached(&nonce(counter, stream), aad, text, &(*mac).into())
            .is_ok()
    }

    /// Decrypts a message of which the end, and so the MAC, has not come yet. In counter mode decrypting is
    /// encrypting.
    pub(crate) fn peek(&self, counter: u64, stream: u16, text: &mut [u8]) {
        self.seal(counter, stream, &[], text);
    }
}

fn nonce(counter: u64, stream: u16) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut iv = [0; 12];
    iv[..8].copy_from_slice(&counter.to_le_bytes());
    iv[8..10].copy_from_slice(&stream.to_le_bytes());
    iv.into()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_message_opens_only_as_it_was_sealed() {
        let key = Working::new([1, 2, 3, 4]);
        let plain = [7; 4096];
        let mut text = plain;
        let mac = key.seal(9, 1, b"aad", &mut text);
        assert_ne!(text, plain);
        let opens = |counter, stream, aad: &[u8], mac: &Tag| {
            let mut copy = text;
            let ok = key.open(counter, stream, aad, &mut copy, mac);
            assert_eq!(ok, copy == plain);
            ok
        };
        assert!(opens(9, 1, b"aad", &mac));
        assert!(!opens(10, 1, b"aad", &mac));
        assert!(!opens(9, 2, b"aad", &mac));
        assert!(!opens(9, 1, b"abc", &mac));
        assert!(!opens(9, 1, b"aad", &[0; 16]));
    }

    #[test]
    fn the_beginning_of_a_message_can_be_read_before_its_end() {
        let key = Working::new([1, 2, 3, 4]);
        let mut text = [7; 8192];
        key.seal(9, 1, b"aad", &mut text);
        key.peek(9, 1, &mut text[..4096]);
        assert_eq!(text[..4096], [7; 4096]);
    }
}
