//! ID block and ID authentication information of SNP_LAUNCH_FINISH.

use super::sha384;
use crate::crypto::{KEY_LEN, PrivateKey, SIGNATURE_LEN};

/// The guest owner's expectations of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdBlock {
    /// Expected launch digest.
    pub launch_digest: [u8; 48],
    /// Family of the guest, free to choose.
    pub family_id: [u8; 16],
    /// Image of the guest, free to choose.
    pub image_id: [u8; 16],
    /// Version of this structure; 1.
    pub version: u32,
    /// Security version of the guest.
    pub guest_svn: u32,
    /// Expected policy.
    pub policy: u64,
}

impl IdBlock {
    /// Length in bytes.
    pub const LEN: usize = 96;

    /// A block without identifiers, security version 0.
    pub fn new(launch_digest: [u8; 48], policy: u64) -> Self {
        Self {
            launch_digest,
            family_id: [0; 16],
            image_id: [0; 16],
            version: 1,
            guest_svn: 0,
            policy,
        }
    }

    /// The bytes that are signed.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..0x30].copy_from_slice(&self.launch_digest);
        out[0x30..0x40].copy_from_slice(&self.family_id);
        out[0x40..0x50].copy_from_slice(&self.image_id);
        out[0x50..0x54].copy_from_slice(&self.version.to_le_bytes());
        out[0x54..0x58].copy_from_slice(&self.guest_svn.to_le_bytes());
        out[0x58..].copy_from_slice(&self.policy.to_le_bytes());
        out
    }

    /// Reads the bytes back.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut out = Self::new([0; 48], 0);
        out.launch_digest.copy_from_slice(&bytes[..0x30]);
        out.family_id.copy_from_slice(&bytes[0x30..0x40]);
        out.image_id.copy_from_slice(&bytes[0x40..0x50]);
        out.version = crate::wire::u32_at(bytes, 0x50);
        out.guest_svn = crate::wire::u32_at(bytes, 0x54);
        out.policy = crate::wire::u64_at(bytes, 0x58);
        out
    }
}

/// ID authentication information: the ID key, its signature over the ID block, and optionally
/// an author key that signs the ID key.
#[derive(Clone, PartialEq, Eq)]
pub struct IdAuth(Box<[u8; Self::LEN]>);

impl std::fmt::Debug for IdAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdAuth")
            .field("has_author", &self.has_author())
            .finish_non_exhaustive()
    }
}

impl IdAuth {
    /// Length in bytes.
    pub const LEN: usize = 4096;
    /// Number of ECDSA on P-384 with SHA-384, the only algorithm.
    pub const ECDSA_P384_SHA384: u32 = 1;

    const BLOCK_SIG: usize = 0x40;
    const ID_KEY: usize = 0x240;
    const KEY_SIG: usize = 0x680;
    const AUTHOR_KEY: usize = 0x880;

    /// Signs `block` with the ID key, and the ID key with the author key if there is one.
    /// Signatures are deterministic (RFC 6979).
    pub fn sign(block: &IdBlock, id_key: &PrivateKey, author_key: Option<&PrivateKey>) -> Self {
        let mut out = Box::new([0; Self::LEN]);
        let key = id_key.public().to_bytes();
        out[0] = Self::ECDSA_P384_SHA384 as u8;
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(Self::BLOCK_SIG, &id_key.sign(&block.to_bytes()));
        put(Self::ID_KEY, &key);
        if let Some(author) = author_key {
            put(4, &Self::ECDSA_P384_SHA384.to_le_bytes());
            put(Self::KEY_SIG, &author.sign(&key));
            put(Self::AUTHOR_KEY, &author.public().to_bytes());
        }
        Self(out)
    }

    /// Takes bytes as they are; nothing is checked.
    pub fn from_bytes(bytes: Box<[u8; Self::LEN]>) -> Self {
        Self(bytes)
    }

    /// The bytes SNP_LAUNCH_FINISH reads.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// ID_KEY_ALGO and AUTH_KEY_ALGO.
    pub fn algorithms(&self) -> (u32, u32) {
        (
            crate::wire::u32_at(&self.0[..], 0),
            crate::wire::u32_at(&self.0[..], 4),
        )
    }

    /// Returns true if an author key is present.
    pub fn has_author(&self) -> bool {
        self.algorithms().1 != 0
    }

    /// The signature over the ID block.
    pub fn block_signature(&self) -> &[u8; SIGNATURE_LEN] {
        crate::wire::array_at(&self.0[..], Self::BLOCK_SIG)
    }

    /// The ID key in the firmware's key format.
    pub fn id_key(&self) -> &[u8; KEY_LEN] {
        crate::wire::array_at(&self.0[..], Self::ID_KEY)
    }

    /// The author's signature over the ID key.
    pub fn key_signature(&self) -> &[u8; SIGNATURE_LEN] {
        crate::wire::array_at(&self.0[..], Self::KEY_SIG)
    }

    /// The author key in the firmware's key format.
    pub fn author_key(&self) -> &[u8; KEY_LEN] {
        crate::wire::array_at(&self.0[..], Self::AUTHOR_KEY)
    }

    /// SHA-384 of the ID key, as reports carry it.
    pub fn id_key_digest(&self) -> [u8; 48] {
        sha384(self.id_key())
    }

    /// SHA-384 of the author key, as reports carry it; zeros without an author.
    pub fn author_key_digest(&self) -> [u8; 48] {
        if self.has_author() {
            sha384(self.author_key())
        } else {
            [0; 48]
        }
    }
}
