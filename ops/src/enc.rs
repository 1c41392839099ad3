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
    /// The status of firmware, 0 for success. Written also when the command fails.
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
    /// The guest-physical address.
    pub gpa: Gpa,
    /// Its contents.
    pub contents: &'a [u8; 4096],
    /// The kind of contents.
    pub kind: InitialPageKind,
}

/// The contents of an initial page.
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

/// The launch measurement of a confidential VM, 48 bytes: MRTD of a TD or the launch digest of an SNP
/// guest (SHA-384), or the answer of LAUNCH_MEASURE for an SEV or SEV-ES guest (an HMAC-SHA-256 of 32
/// bytes and a nonce of 16 bytes).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Measurement([u8; 48]);

impl Measurement {
    /// The measurement with these bytes.
    pub const fn new(bytes: [u8; 48]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn bytes(&self) -> &[u8; 48] {
        &self.0
    }
}

/// Lower-case hexadecimal digits.
impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
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
    fn a_measurement_prints_two_digits_for_each_byte() {
        assert_eq!(Measurement::new([0x0c; 48]).to_string(), "0c".repeat(48));
    }
}
