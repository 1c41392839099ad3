//! The SNP launch digest, as the host can compute it: firmware tells it to the guest alone.

use sha2::{Digest, Sha384};

use crate::launch::PageType;

/// A chain of SHA-384: each page's PAGE_INFO, 70h bytes that begin with the digest so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SnpDigest([u8; 48]);

impl SnpDigest {
    pub(crate) const fn new() -> Self {
        Self([0; 48])
    }

    /// One page without permissions for lower VMPLs, as KVM adds them.
    pub(crate) fn add(&mut self, kind: PageType, gpa: u64, contents: &[u8; 4096]) {
        let mut info = [0; 0x70];
        info[..0x30].copy_from_slice(&self.0);
        if matches!(kind, PageType::Normal | PageType::Vmsa) {
            info[0x30..0x60].copy_from_slice(&Sha384::digest(contents));
        }
        info[0x60..0x62].copy_from_slice(&0x70_u16.to_le_bytes());
        info[0x62] = kind as u8;
        info[0x68..].copy_from_slice(&gpa.to_le_bytes());
        self.0 = Sha384::digest(info).into();
    }

    pub(crate) const fn value(&self) -> [u8; 48] {
        self.0
    }
}
