//! The session blob: how a guest owner or a sending platform hands transport keys to a firmware.

use super::{aes128_ctr, derive_key, hmac_sha256, same_mac};
use thiserror::Error;

/// Length of a session blob.
pub const SESSION_LEN: usize = 128;

/// Transport encryption key and transport integrity key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TransportKeys {
    /// Encrypts packets.
    pub tek: [u8; 16],
    /// Authenticates packets, the policy and the launch.
    pub tik: [u8; 16],
}

impl std::fmt::Debug for TransportKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TransportKeys(..)")
    }
}

/// Keys that wrap the transport keys, derived from the shared secret Z and the session's nonce.
#[derive(Clone, Copy)]
pub struct WrapKeys {
    /// Master secret.
    pub master: [u8; 16],
    /// Key encryption key.
    pub kek: [u8; 16],
    /// Key integrity key.
    pub kik: [u8; 16],
}

impl std::fmt::Debug for WrapKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WrapKeys(..)")
    }
}

impl WrapKeys {
    /// Derives the keys. `z` is the x coordinate of the ECDH point, 48 bytes big-endian; any
    /// length is accepted.
    pub fn derive(z: &[u8], nonce: &[u8; 16]) -> Self {
        let master = derive_key(z, "sev-master-secret", nonce);
        Self {
            master,
            kek: derive_key(&master, "sev-kek", &[]),
            kik: derive_key(&master, "sev-kik", &[]),
        }
    }
}

/// Reasons for refusing a session blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The wrapped keys do not match their authentication code: wrong peer, or damage.
    #[error("the wrapped transport keys are not authentic")]
    Wrap,
    /// The policy is not the one the sender meant.
    #[error("the session was made for another policy")]
    Policy,
}

/// A session blob, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Context of the key derivation.
    pub nonce: [u8; 16],
    /// TEK and TIK, encrypted.
    pub wrap_tk: [u8; 32],
    /// IV of that encryption.
    pub wrap_iv: [u8; 16],
    /// Authentication code of the wrapped keys.
    pub wrap_mac: [u8; 32],
    /// Authentication code of the policy.
    pub policy_mac: [u8; 32],
}

impl Session {
    /// Wraps `keys` for whoever knows `z`.
    pub fn seal(
        z: &[u8],
        nonce: [u8; 16],
        wrap_iv: [u8; 16],
        keys: &TransportKeys,
        policy: u32,
    ) -> Self {
        let wrap = WrapKeys::derive(z, &nonce);
        let mut wrap_tk = [0; 32];
        wrap_tk[..16].copy_from_slice(&keys.tek);
        wrap_tk[16..].copy_from_slice(&keys.tik);
        aes128_ctr(&wrap.kek, &wrap_iv, &mut wrap_tk);
        Self {
            nonce,
            wrap_tk,
            wrap_iv,
            wrap_mac: hmac_sha256(&wrap.kik, &[&wrap_tk]),
            policy_mac: hmac_sha256(&keys.tik, &[&policy.to_le_bytes()]),
        }
    }

    /// Checks both authentication codes and unwraps the keys.
    pub fn open(&self, z: &[u8], policy: u32) -> Result<TransportKeys, SessionError> {
        let wrap = WrapKeys::derive(z, &self.nonce);
        if !same_mac(&self.wrap_mac, &hmac_sha256(&wrap.kik, &[&self.wrap_tk])) {
            return Err(SessionError::Wrap);
        }
        let mut keys = self.wrap_tk;
        aes128_ctr(&wrap.kek, &self.wrap_iv, &mut keys);
        let keys = TransportKeys {
            tek: crate::wire::copy_at(&keys, 0),
            tik: crate::wire::copy_at(&keys, 16),
        };
        if !same_mac(
            &self.policy_mac,
            &hmac_sha256(&keys.tik, &[&policy.to_le_bytes()]),
        ) {
            return Err(SessionError::Policy);
        }
        Ok(keys)
    }

    /// The bytes LAUNCH_START and RECEIVE_START read.
    pub fn to_bytes(&self) -> [u8; SESSION_LEN] {
        let mut out = [0; SESSION_LEN];
        out[..0x10].copy_from_slice(&self.nonce);
        out[0x10..0x30].copy_from_slice(&self.wrap_tk);
        out[0x30..0x40].copy_from_slice(&self.wrap_iv);
        out[0x40..0x60].copy_from_slice(&self.wrap_mac);
        out[0x60..].copy_from_slice(&self.policy_mac);
        out
    }

    /// Takes the bytes apart; nothing is checked yet.
    pub fn from_bytes(bytes: &[u8; SESSION_LEN]) -> Self {
        use crate::wire::copy_at;
        Self {
            nonce: copy_at(bytes, 0),
            wrap_tk: copy_at(bytes, 0x10),
            wrap_iv: copy_at(bytes, 0x30),
            wrap_mac: copy_at(bytes, 0x40),
            policy_mac: copy_at(bytes, 0x60),
        }
    }
}
