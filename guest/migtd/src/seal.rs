//! Sealed messages: AES-256-GCM under keys that only the two ends can derive.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use hkdf::Hkdf;
use p256::ecdh::SharedSecret;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::request::Role;

/// The two directions of an exchange, each with its key and its count of messages.
pub(crate) struct Sealer {
    send: Direction,
    receive: Direction,
    #[cfg(feature = "snp")]
    name: String,
    #[cfg(feature = "snp")]
    derive: Hkdf<Sha256>,
}

struct Direction {
    cipher: Aes256Gcm,
    next: u64,
}

impl Direction {
    fn new(key: &[u8; 32]) -> Self {
        let key: &Key<Aes256Gcm> = key.into();
        Self {
            cipher: Aes256Gcm::new(key),
            next: 0,
        }
    }

    /// The nonce of the next message. A key lives for one exchange, which has three of them.
    fn nonce(&mut self) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        nonce
    }
}

/// A key for one purpose of one kind of guest.
fn derived(derive: &Hkdf<Sha256>, name: &str, purpose: &str) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    // HKDF gives up to 255 hashes; one is asked for.
    derive
        .expand_multi_info(&[name.as_bytes(), b": ", purpose.as_bytes()], &mut *key)
        .expect("one hash of key material");
    key
}

impl Sealer {
    /// Derives the keys of both directions from the shared secret and from everything that was said
    /// so far, so that ends that saw different things have different keys.
    pub(crate) fn new(name: &str, role: Role, shared: &SharedSecret, said: &[&[u8]]) -> Self {
        let mut transcript = Sha256::new();
        for part in said {
            transcript.update((part.len() as u64).to_le_bytes());
            transcript.update(part);
        }
        let derive = Hkdf::new(Some(&transcript.finalize()), shared.raw_secret_bytes());
        let direction = |purpose| Direction::new(&derived(&derive, name, purpose));
        let (to_target, to_source) = (direction("to target"), direction("to source"));
        let (send, receive) = match role {
            Role::Source => (to_target, to_source),
            Role::Target => (to_source, to_target),
        };
        Self {
            send,
            receive,
            #[cfg(feature = "snp")]
            name: name.to_owned(),
            #[cfg(feature = "snp")]
            derive,
        }
    }

    /// A key for another purpose than the messages of the exchange, which both ends have.
    #[cfg(feature = "snp")]
    pub(crate) fn key(&self, purpose: &str) -> Zeroizing<[u8; 32]> {
        derived(&self.derive, &self.name, purpose)
    }

    pub(crate) fn seal(&mut self, about: &[u8], plain: &[u8]) -> Result<Vec<u8>, Failure> {
        let nonce = self.send.nonce();
        let payload = Payload {
            msg: plain,
            aad: about,
        };
        let sealed = self.send.cipher.encrypt(Nonce::from_slice(&nonce), payload);
        sealed.map_err(|_| Failure::Seal)
    }

    pub(crate) fn open(
        &mut self,
        about: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let nonce = self.receive.nonce();
        let payload = Payload {
            msg: sealed,
            aad: about,
        };
        let plain = self
            .receive
            .cipher
            .decrypt(Nonce::from_slice(&nonce), payload);
        plain.map(Zeroizing::new).map_err(|_| Failure::Seal)
    }
}
