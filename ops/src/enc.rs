//! Memory encryption: commands, regions, initial pages and measurements.

use core::fmt;

use crate::Gpa;

/// A technology's own command to a VM or vCPU: the payload of `KVM_MEMORY_ENCRYPT_OP`.
///
/// The numbers are those of the technology (`KVM_TDX_*`, `KVM_SEV_*`).
#[derive(Debug)]
pub struct EncCmd<'a> {
    /// The command.
    pub id: u32,
    /// Its flags.
    pub flags: u32,
    /// Its structure, in the layout of the kernel's header; read and written.
    pub data: &'a mut [u8],
    /// What firmware answered: 0, or its status word. Written also when the command fails.
    pub firmware_status: u64,
}

/// A range of guest memory that will hold encrypted data and must not move
/// (`struct kvm_enc_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EncRegion {
    /// The first byte in the address space of the host.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A page that is part of the VM's measured start.
#[derive(Clone, Copy, Debug)]
pub struct InitialPage<'a> {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Its contents.
    pub contents: &'a [u8; 4096],
    /// What it holds and whether it is measured.
    pub kind: InitialPageKind,
}

/// What an initial page holds.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InitialPageKind {
    /// Contents are measured (TDH.MEM.PAGE.ADD with TDH.MR.EXTEND; SNP page type NORMAL).
    Measured,
    /// The page's address is measured, its contents are not.
    Unmeasured,
    /// Zeroed by firmware (SNP page type ZERO).
    Zero,
    /// The SNP secrets page.
    Secrets,
    /// The SNP CPUID page.
    Cpuid,
}

/// The launch measurement of a confidential VM: MRTD (SHA-384, 48 bytes), the digest of an SNP guest
/// (SHA-384, 48 bytes), or that of an SEV or SEV-ES guest (SHA-256, 32 bytes).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Measurement {
    bytes: [u8; 48],
    len: u8,
}

impl Measurement {
    /// A SHA-384 hash.
    pub const fn sha384(bytes: [u8; 48]) -> Self {
        Self { bytes, len: 48 }
    }

    /// A SHA-256 hash.
    pub fn sha256(hash: [u8; 32]) -> Self {
        let mut bytes = [0; 48];
        bytes[..32].copy_from_slice(&hash);
        Self { bytes, len: 32 }
    }

    /// The hash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }
}

/// Lower-case hexadecimal digits.
impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Measurement({self})")
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn a_measurement_prints_as_many_digits_as_its_hash_has() {
        assert_eq!(Measurement::sha384([0xab; 48]).to_string(), "ab".repeat(48));
        assert_eq!(Measurement::sha256([0x0c; 32]).to_string(), "0c".repeat(32));
    }
}
