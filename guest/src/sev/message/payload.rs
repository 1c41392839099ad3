//! Requests and what answers them (SNP firmware ABI, "Guest Messages").

use super::MessageError;
use core::ops::BitOr;

/// The length of an attestation report in bytes.
pub const REPORT_LEN: usize = 0x4A0;
/// The longest payload of a request.
pub(super) const MAX_REQUEST: usize = 0x60;
/// The longest payload of a response: a report with 0x20 bytes before it.
pub(super) const MAX_RESPONSE: usize = 0x20 + REPORT_LEN;

/// The payload of a request, padded with zeros.
pub(super) type Bytes = [u8; MAX_REQUEST];

mod sealed {
    use super::{Bytes, MessageError};

    pub trait Layout {
        /// The type of the message; that of its response is the next number.
        const TYPE: u8;
        /// The length of the payload.
        const LEN: usize;
        type Answer;

        fn to_bytes(&self) -> Bytes;
        /// Reads the payload of the response behind its status, which is 0.
        fn answer(payload: &[u8]) -> Result<Self::Answer, MessageError>;
    }
}

pub(super) use sealed::Layout;

/// A request: [`ReportRequest`] or [`KeyRequest`].
pub trait Request: sealed::Layout<Answer = Self::Response> {
    /// The answer of the firmware.
    type Response;
}

/// The key that shall sign a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeySelect {
    /// The VLEK if the host has loaded one, else the VCEK.
    #[default]
    Any = 0,
    /// The key of the chip.
    Vcek = 1,
    /// The key of the provider, from the hashstick that the host has loaded (SNP_VLEK_LOAD).
    Vlek = 2,
}

/// MSG_REPORT_REQ: asks for an attestation report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportRequest {
    /// Data of the guest's choice, which the report repeats.
    pub data: [u8; 64],
    /// The VMPL that the report names: not below that of the message key.
    pub vmpl: u32,
    /// The key that shall sign.
    pub key: KeySelect,
}

impl ReportRequest {
    /// For VMPL0, signed by any key.
    pub const fn new(data: [u8; 64]) -> Self {
        Self {
            data,
            vmpl: 0,
            key: KeySelect::Any,
        }
    }
}

impl Layout for ReportRequest {
    const TYPE: u8 = 5;
    const LEN: usize = 0x60;
    type Answer = [u8; REPORT_LEN];

    fn to_bytes(&self) -> Bytes {
        let mut bytes = [0; MAX_REQUEST];
        bytes[..0x40].copy_from_slice(&self.data);
        bytes[0x40..0x44].copy_from_slice(&self.vmpl.to_le_bytes());
        bytes[0x44..0x48].copy_from_slice(&(self.key as u32).to_le_bytes());
        bytes
    }

    fn answer(payload: &[u8]) -> Result<Self::Answer, MessageError> {
        let wrong = MessageError::Length(payload.len());
        let size = payload[4..].first_chunk().ok_or(wrong)?;
        if u32::from_le_bytes(*size) as usize != REPORT_LEN {
            return Err(wrong);
        }
        payload[0x20..].try_into().map_err(|_| wrong)
    }
}

impl Request for ReportRequest {
    type Response = [u8; REPORT_LEN];
}

/// The root that a key is derived from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootKey {
    /// The chip's: the VCEK, or the VLEK if one is loaded.
    #[default]
    Chip = 0,
    /// That of the guest, which migrates with it: the VMRK.
    Vmrk = 1,
}

/// GUEST_FIELD_SELECT: what is mixed into a derived key, so that another guest gets another key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyFields(u64);

impl KeyFields {
    /// Nothing but the VMPL.
    pub const NONE: Self = Self(0);
    /// The guest's policy.
    pub const POLICY: Self = Self(1);
    /// IMAGE_ID of the ID block.
    pub const IMAGE_ID: Self = Self(1 << 1);
    /// FAMILY_ID of the ID block.
    pub const FAMILY_ID: Self = Self(1 << 2);
    /// The launch digest.
    pub const MEASUREMENT: Self = Self(1 << 3);
    /// [`KeyRequest::guest_svn`].
    pub const GUEST_SVN: Self = Self(1 << 4);
    /// [`KeyRequest::tcb_version`].
    pub const TCB_VERSION: Self = Self(1 << 5);

    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl BitOr for KeyFields {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// MSG_KEY_REQ: asks for a key that only this guest, as selected by [`KeyFields`], can get again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyRequest {
    /// The root.
    pub root: RootKey,
    /// What is mixed in.
    pub fields: KeyFields,
    /// The VMPL that is mixed in: not below that of the message key.
    pub vmpl: u32,
    /// Not above the guest's SVN, in its ID block.
    pub guest_svn: u32,
    /// Not above the committed TCB version.
    pub tcb_version: u64,
}

/// A derived key. It is the guest's secret, and is not shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DerivedKey(pub [u8; 32]);

impl core::fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DerivedKey").finish_non_exhaustive()
    }
}

impl Layout for KeyRequest {
    const TYPE: u8 = 3;
    const LEN: usize = 0x20;
    type Answer = DerivedKey;

    fn to_bytes(&self) -> Bytes {
        let mut bytes = [0; MAX_REQUEST];
        bytes[..4].copy_from_slice(&(self.root as u32).to_le_bytes());
        bytes[0x08..0x10].copy_from_slice(&self.fields.0.to_le_bytes());
        bytes[0x10..0x14].copy_from_slice(&self.vmpl.to_le_bytes());
        bytes[0x14..0x18].copy_from_slice(&self.guest_svn.to_le_bytes());
        bytes[0x18..0x20].copy_from_slice(&self.tcb_version.to_le_bytes());
        bytes
    }

    fn answer(payload: &[u8]) -> Result<Self::Answer, MessageError> {
        let wrong = MessageError::Length(payload.len());
        let key = payload[0x20..].try_into().map_err(|_| wrong)?;
        Ok(DerivedKey(key))
    }
}

impl Request for KeyRequest {
    type Response = DerivedKey;
}
