//! The attestation report of an SNP guest (SNP firmware ABI, ATTESTATION_REPORT).

use std::ops::Range;

use thiserror::Error;

use crate::bytes::at;

/// Length in bytes.
pub const REPORT_LEN: usize = 0x4a0;
/// Length of what is signed; the signature follows.
pub const SIGNED_LEN: usize = 0x2a0;
/// Length of R and of S, little-endian, in the signature.
pub(super) const SCALAR: usize = 72;

/// Which key signed a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SigningKey {
    Vcek,
    Vlek,
    None,
    Other(u8),
}

impl SigningKey {
    const fn from_number(n: u32) -> Self {
        match n & 7 {
            0 => Self::Vcek,
            1 => Self::Vlek,
            7 => Self::None,
            n => Self::Other(n as u8),
        }
    }
}

/// The bytes are no report that this program knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum ReportError {
    #[error("a report has {REPORT_LEN:#x} bytes, not {0:#x}")]
    Length(usize),
    #[error("the report is of version {0}; known are 2 to 5")]
    Version(u32),
}

/// The fields of a report; packed TCB versions are taken apart by [`super::Tcb::from_bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Version of the layout: 2 to 5; 3 and 4 do not differ.
    pub version: u32,
    /// Security version of the guest, from its ID block.
    pub guest_svn: u32,
    /// Policy that the guest was launched with.
    pub policy: u64,
    /// Family, from the ID block.
    pub family_id: [u8; 16],
    /// Image, from the ID block.
    pub image_id: [u8; 16],
    /// VMPL that asked.
    pub vmpl: u32,
    /// SIG_ALGO: 1 is ECDSA on P-384 with SHA-384.
    pub algorithm: u32,
    /// TCB of the running firmware.
    pub current_tcb: [u8; 8],
    /// PLATFORM_INFO.
    pub platform_info: u64,
    /// True if an author key signed the ID key (AUTHOR_KEY_EN).
    pub author_key_enabled: bool,
    /// True if the host asked the firmware not to sign (MASK_CHIP_KEY).
    pub mask_chip_key: bool,
    /// Which key signed.
    pub signing_key: SigningKey,
    /// Data of the guest's choice.
    pub report_data: [u8; 64],
    /// Launch digest.
    pub measurement: [u8; 48],
    /// Data of the host's choice.
    pub host_data: [u8; 32],
    /// SHA-384 of the ID key.
    pub id_key_digest: [u8; 48],
    /// SHA-384 of the author key.
    pub author_key_digest: [u8; 48],
    /// Identity of this guest instance.
    pub report_id: [u8; 32],
    /// Identity of its migration agent; all ones without one.
    pub report_id_ma: [u8; 32],
    /// TCB that the signing key was derived from.
    pub reported_tcb: [u8; 8],
    /// CPUID family, model and stepping; from version 3 on.
    pub cpuid_fms: Option<(u8, u8, u8)>,
    /// Identity of the chip; zeros if masked.
    pub chip_id: [u8; 64],
    /// TCB that the firmware cannot be taken below.
    pub committed_tcb: [u8; 8],
    /// Firmware version: major, minor, build.
    pub current_version: (u8, u8, u8),
    /// Committed firmware version.
    pub committed_version: (u8, u8, u8),
    /// TCB at launch.
    pub launch_tcb: [u8; 8],
    /// Mitigations at launch and now; version 5.
    pub mitigations: Option<(u64, u64)>,
}

impl Report {
    /// Reads a report. Nothing but length and version is checked.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ReportError> {
        let bytes: &[u8; REPORT_LEN] = bytes
            .try_into()
            .map_err(|_| ReportError::Length(bytes.len()))?;
        let version = u32::from_le_bytes(at(bytes, 0));
        if !matches!(version, 2..=5) {
            return Err(ReportError::Version(version));
        }
        let u32_at = |offset| u32::from_le_bytes(at(bytes, offset));
        let u64_at = |offset| u64::from_le_bytes(at(bytes, offset));
        let firmware = |offset: usize| {
            let [build, minor, major] = at(bytes, offset);
            (major, minor, build)
        };
        let flags = u32_at(0x48);
        Ok(Self {
            version,
            guest_svn: u32_at(4),
            policy: u64_at(8),
            family_id: at(bytes, 0x10),
            image_id: at(bytes, 0x20),
            vmpl: u32_at(0x30),
            algorithm: u32_at(0x34),
            current_tcb: at(bytes, 0x38),
            platform_info: u64_at(0x40),
            author_key_enabled: flags & 1 != 0,
            mask_chip_key: flags & 2 != 0,
            signing_key: SigningKey::from_number(flags >> 2),
            report_data: at(bytes, 0x50),
            measurement: at(bytes, 0x90),
            host_data: at(bytes, 0xc0),
            id_key_digest: at(bytes, 0xe0),
            author_key_digest: at(bytes, 0x110),
            report_id: at(bytes, 0x140),
            report_id_ma: at(bytes, 0x160),
            reported_tcb: at(bytes, 0x180),
            cpuid_fms: (version >= 3).then_some((bytes[0x188], bytes[0x189], bytes[0x18a])),
            chip_id: at(bytes, 0x1a0),
            committed_tcb: at(bytes, 0x1e0),
            current_version: firmware(0x1e8),
            committed_version: firmware(0x1ec),
            launch_tcb: at(bytes, 0x1f0),
            mitigations: (version >= 5).then_some((u64_at(0x1f8), u64_at(0x200))),
        })
    }

    /// Returns true if the policy lets the host debug the guest (bit 19).
    pub const fn allows_debugging(&self) -> bool {
        self.policy & 1 << 19 != 0
    }

    /// Ranges that must be zero in a report of this version, the signature's included.
    pub fn reserved(&self) -> Vec<Range<usize>> {
        let processor = if self.version >= 3 { 0x18b } else { 0x188 };
        let tail = if self.version >= 5 { 0x208 } else { 0x1f8 };
        let r = SIGNED_LEN;
        let s = r + SCALAR;
        vec![
            0x4c..0x50,
            processor..0x1a0,
            0x1eb..0x1ec,
            0x1ef..0x1f0,
            tail..SIGNED_LEN,
            r + 48..s,
            s + 48..s + SCALAR,
            s + SCALAR..REPORT_LEN,
        ]
    }
}
