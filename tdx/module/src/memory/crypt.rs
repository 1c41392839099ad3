//! Keys of private memory: AES-XTS over a line with its address as tweak, and a 28-bit MAC.

use super::turn::Turns;
use crate::arena::lock;
use aes::Aes128;
use aes::cipher::KeyInit;
use sha2::{Digest, Sha384};
use siphasher::sip::SipHasher24;
use std::collections::HashMap;
use std::hash::Hasher;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use xts_mode::Xts128;
use zeroize::{Zeroize, Zeroizing};

/// The key programmed for a private key id. The round keys are wiped when the last user lets go.
pub(crate) struct LineKey {
    generation: u32,
    /// The turns at its open pages.
    turns: Arc<Turns>,
    xts: Xts128<Aes128>,
    mac: [u64; 2],
}

impl Drop for LineKey {
    fn drop(&mut self) {
        self.mac.zeroize();
    }
}

impl LineKey {
    fn new(generation: u32, secret: &[u8; 48]) -> Self {
        let part = |i: usize| -> [u8; 16] {
            let mut p = [0; 16];
            p.copy_from_slice(&secret[i * 16..(i + 1) * 16]);
            p
        };
        let m = u128::from_le_bytes(part(2));
        LineKey {
            generation,
            turns: Arc::default(),
            xts: Xts128::new(Aes128::new(&part(0).into()), Aes128::new(&part(1).into())),
            mac: [m as u64, (m >> 64) as u64],
        }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    pub(super) fn encrypt(&self, line_pa: u64, line: &mut [u8; 64]) {
        self.xts.encrypt_sector(line, tweak(line_pa));
    }

    pub(super) fn decrypt(&self, line_pa: u64, line: &mut [u8; 64]) {
        self.xts.decrypt_sector(line, tweak(line_pa));
    }

    /// 28 bits, as wide as the MAC hardware keeps with the line's ECC bits.
    pub(super) fn mac(&self, line_pa: u64, ciphertext: &[u8; 64]) -> u32 {
        let mut h = SipHasher24::new_with_keys(self.mac[0], self.mac[1]);
        h.write(&line_pa.to_le_bytes());
        h.write(ciphertext);
        h.finish() as u32 >> 4
    }
}

fn tweak(line_pa: u64) -> [u8; 16] {
    u128::from(line_pa).to_le_bytes()
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
        let mut secret = Zeroizing::new([0u8; 48]);
        let mut hash = Sha384::new();
        hash.update(b"memory key");
        hash.update(*self.seed);
        hash.update(generation.to_le_bytes());
        secret.copy_from_slice(&hash.finalize());
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

    /// Content of a zero line under a key. Once the key is dead, its ciphertext cannot be told from noise, so the
    /// line holds noise.
    pub(super) fn encrypted_zeros(&self, generation: u32, line_pa: u64) -> [u8; 64] {
        let mut line = [0; 64];
        if let Some(key) = self.of_generation(generation) {
            key.encrypt(line_pa, &mut line);
            return line;
        }
        let mut hash = sha2::Sha512::new();
        hash.update(b"dead key");
        hash.update(*self.seed);
        hash.update(generation.to_le_bytes());
        hash.update(line_pa.to_le_bytes());
        line.copy_from_slice(&hash.finalize());
        line
    }
}
