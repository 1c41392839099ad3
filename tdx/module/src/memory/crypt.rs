//! Keys of private memory: AES-XTS over a line with its address as tweak.

use super::LINE;
use super::xts::Xts;
use crate::arena::lock;
use aes::cipher::inout::InOutBuf;
use kvm_ops_turns::Turns;
use sha2::{Digest, Sha384};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use zeroize::Zeroizing;

/// The key programmed for a private key id. The round keys are wiped when the last user lets go.
pub(crate) struct LineKey {
    generation: u32,
    /// The turns at its open pages.
    turns: Arc<Turns>,
    xts: Xts,
}

impl LineKey {
    fn new(generation: u32, [data, tweak]: &[[u8; 16]; 2]) -> Self {
        LineKey {
            generation,
            turns: Arc::default(),
            xts: Xts::new(data, tweak),
        }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// Encrypts whole lines, the first of which is at `pa`.
    pub(super) fn encrypt(&self, pa: u64, lines: &mut [u8]) {
        self.xts.encrypt(pa, lines.into());
    }

    /// Decrypts whole lines, the first of which is at `pa`, into a buffer of the same length.
    pub(super) fn decrypt_to(&self, pa: u64, from: &[u8], to: &mut [u8]) {
        if let Ok(lines) = InOutBuf::new(from, to) {
            self.xts.decrypt(pa, lines);
        }
    }
}

/// Makes keys and finds them by generation while they live.
pub(crate) struct KeyRing {
    enabled: bool,
    /// The turns at the open pages of all TDs, if encryption is off.
    turns_without_key: Arc<Turns>,
    escrow: bool,
    seed: Zeroizing<[u8; 32]>,
    made: Mutex<u32>,
    live: RwLock<HashMap<u32, Arc<LineKey>>>,
}

impl KeyRing {
    /// `enabled`: whether private memory is encrypted at all. `escrow`: keep dead keys for observation.
    pub(crate) fn new(enabled: bool, escrow: bool, seed: [u8; 32]) -> Self {
        KeyRing {
            enabled,
            turns_without_key: Arc::default(),
            escrow,
            seed: Zeroizing::new(seed),
            made: Mutex::new(0),
            live: RwLock::default(),
        }
    }

    /// The turns at the open pages of a key; `None` if encryption is off.
    pub(crate) fn turns<'a>(&'a self, key: Option<&'a Arc<LineKey>>) -> &'a Arc<Turns> {
        key.map_or(&self.turns_without_key, |key| &key.turns)
    }

    /// A fresh key, as PCONFIG makes one; `None` if encryption is off.
    pub(crate) fn generate(&self) -> Option<Arc<LineKey>> {
        if !self.enabled {
            return None;
        }
        let generation = {
            let mut made = lock(&self.made);
            *made = made.checked_add(1).unwrap_or(1);
            *made
        };
        let mut hash = Sha384::new();
        hash.update(b"memory key");
        hash.update(*self.seed);
        hash.update(generation.to_le_bytes());
        let digest = Zeroizing::new(<[u8; 48]>::from(hash.finalize()));
        let mut secret = Zeroizing::new([[0; 16]; 2]);
        secret.as_flattened_mut().copy_from_slice(&digest[..32]);
        let key = Arc::new(LineKey::new(generation, &secret));
        self.live
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(generation, key.clone());
        Some(key)
    }

    /// Forgets a key. With escrow it stays available to observation alone.
    pub(crate) fn destroy(&self, key: &LineKey) {
        if !self.escrow {
            self.live
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&key.generation);
        }
    }

    pub(super) fn of_generation(&self, generation: u32) -> Option<Arc<LineKey>> {
        if generation == 0 {
            return None;
        }
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.get(&generation).cloned()
    }

    /// Fills whole lines with the contents of zeros under a key, the first line at `pa`. Once the key is dead, its
    /// ciphertext cannot be told from noise, so the lines hold noise.
    pub(super) fn encrypt_zeros(&self, generation: u32, pa: u64, lines: &mut [u8]) {
        if let Some(key) = self.of_generation(generation) {
            lines.fill(0);
            key.encrypt(pa, lines);
            return;
        }
        for (line, at) in lines.chunks_exact_mut(LINE).zip((pa..).step_by(LINE)) {
            let mut hash = sha2::Sha512::new();
            hash.update(b"dead key");
            hash.update(*self.seed);
            hash.update(generation.to_le_bytes());
            hash.update(at.to_le_bytes());
            line.copy_from_slice(&hash.finalize());
        }
    }
}
