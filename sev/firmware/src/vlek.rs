//! The versioned loaded endorsement key (VLEK): a seed that the vendor's key service gives to a
//! provider for all of its chips, wrapped for one of them.
//!
//! The seed's length and that of the wrapped form are the real ones. What is inside of them is in
//! a format of this model, as the real one is between the vendor's key service and the firmware.

use crate::builder::TcbVersion;
use crate::command::{Reserved, layout};
use crate::crypto::{PrivateKey, hmac_sha256};
use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};

/// Length of a seed.
const LEN: usize = 384;

/// A provider's seed of VLEKs: one key for each security version, the same on every chip.
#[derive(Clone, PartialEq, Eq)]
pub struct VlekSeed([u8; LEN]);

impl std::fmt::Debug for VlekSeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VlekSeed").finish_non_exhaustive()
    }
}

layout! {
    /// A [`VlekSeed`] as SNP_VLEK_LOAD takes it, readable by one chip only.
    WrappedVlek 0x1b0 {
        0x000 in iv: [u8; 12],
        0x00c _ reserved0: Reserved<4>,
        0x010 in wrapped: [u8; 384],
        0x190 in tag: [u8; 16],
        0x1a0 _ reserved1: Reserved<16>,
    }
}

impl WrappedVlek {
    /// The structure as it lies in memory.
    pub fn to_bytes(&self) -> [u8; 0x1b0] {
        zerocopy::transmute!(*self)
    }
}

impl VlekSeed {
    /// A seed that follows from a number.
    pub fn from_seed(seed: u64) -> Self {
        let mut bytes = [0; LEN];
        // Any fixed stream that is neither a platform's nor a root's.
        let mut rng = ChaCha20Rng::seed_from_u64(seed ^ 0x766c_656b_5f73_6565);
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The key of a security version.
    pub(crate) fn key(&self, tcb: TcbVersion) -> PrivateKey {
        let seed = hmac_sha256(&self.0, &[b"vlek", &tcb.0.to_le_bytes()]);
        PrivateKey::random(&mut ChaCha20Rng::from_seed(seed))
    }

    pub(crate) fn wrap(&self, key: &[u8; 32], iv: [u8; 12]) -> WrappedVlek {
        let mut wrapped = self.0;
        let tag = Aes256Gcm::new(key.into())
            .encrypt_in_place_detached(&iv.into(), &[], &mut wrapped)
            // Only a text beyond 64 GiB is refused; a tag of zeros will not be accepted.
            .map_or([0; 16], Into::into);
        WrappedVlek {
            iv,
            wrapped,
            tag,
            ..Default::default()
        }
    }

    /// `None` if it was wrapped for another chip, or is damaged.
    pub(crate) fn unwrap(key: &[u8; 32], from: &WrappedVlek) -> Option<Self> {
        let mut seed = from.wrapped;
        let opened = Aes256Gcm::new(key.into()).decrypt_in_place_detached(
            &from.iv.into(),
            &[],
            &mut seed,
            &from.tag.into(),
        );
        let intact = opened.is_ok()
            && from.reserved0 == Default::default()
            && from.reserved1 == Default::default();
        intact.then_some(Self(seed))
    }
}
