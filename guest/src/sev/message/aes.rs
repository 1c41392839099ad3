//! The cipher of the crate aes-gcm.

use super::MessageKey;
use aes_gcm::KeyInit;
use aes_gcm::aead::AeadInPlace;

/// A message key for the crate `aes-gcm`.
#[derive(Clone)]
pub struct Aes256Gcm(aes_gcm::Aes256Gcm);

impl Aes256Gcm {
    /// With this key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(aes_gcm::Aes256Gcm::new(key.into()))
    }
}

impl core::fmt::Debug for Aes256Gcm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Aes256Gcm").finish_non_exhaustive()
    }
}

impl MessageKey for Aes256Gcm {
    fn seal(&self, nonce: &[u8; 12], header: &[u8], payload: &mut [u8]) -> [u8; 16] {
        let sealed = self
            .0
            .encrypt_in_place_detached(nonce.into(), header, payload);
        // Refused are payloads beyond 64 GiB only; no one accepts a tag of zeros.
        sealed.map_or([0; 16], Into::into)
    }

    fn open(&self, nonce: &[u8; 12], header: &[u8], payload: &mut [u8], tag: &[u8; 16]) -> bool {
        self.0
            .decrypt_in_place_detached(nonce.into(), header, payload, tag.into())
            .is_ok()
    }
}
