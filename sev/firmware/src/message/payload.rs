//! Payloads of messages, with the names of Linux `include/uapi/linux/sev-guest.h` and
//! `arch/x86/include/asm/sev.h`.

use super::MessageType;
use crate::command::{FieldError, Reserved, U32, U64, bits, layout, word};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The payload of a request, and the type of its message.
pub trait Request: IntoBytes + Immutable {
    /// The type.
    const TYPE: MessageType;
    /// The payload of the response. That of a report response is followed by the report.
    type Response: FromBytes;
}

word! {
    /// KEY_SEL of a report request: the key that shall sign, in bits 1:0.
    KeySel(U32), u32, number
}

impl KeySel {
    /// The VLEK if one is loaded, else the VCEK.
    pub const ANY: Self = Self::from_raw(0);
    /// The VCEK.
    pub const VCEK: Self = Self::from_raw(1);
    /// The VLEK.
    pub const VLEK: Self = Self::from_raw(2);

    /// The key of this number; 0 to 2 exist.
    pub const fn new(number: u32) -> Result<Self, FieldError> {
        match number {
            0..=2 => Ok(Self::from_raw(number)),
            _ => Err(FieldError::Unknown {
                field: "KeySel",
                value: number as u64,
            }),
        }
    }
}

layout! {
    /// MSG_REPORT_REQ.
    ReportRequest 0x60 {
        /// Data of the guest's choice, which the report repeats.
        0x00 in user_data: [u8; 64],
        /// Not above that of the message key.
        0x40 in vmpl: U32,
        0x44 in key_sel: KeySel,
        0x48 _ reserved: Reserved<24>,
    }
}

layout! {
    /// MSG_REPORT_RSP, before the report.
    ReportResponse 0x20 {
        /// Number of a [`Status`](crate::Status).
        0x00 out status: U32,
        0x04 out report_size: U32,
        0x08 _ reserved: Reserved<24>,
    }
}

bits! {
    /// ROOT_KEY_SELECT of a key request.
    RootKeySelect: u32, ones 0, subfields 0 {
        /// The key that migrates with the guest, instead of the chip's.
        VMRK = 0,
    }
}

bits! {
    /// GUEST_FIELD_SELECT of a key request: what is mixed into the key.
    GuestFieldSelect: u64, ones 0, subfields 0 {
        /// The guest's policy.
        GUEST_POLICY = 0,
        /// IMAGE_ID of the ID block.
        IMAGE_ID = 1,
        /// FAMILY_ID of the ID block.
        FAMILY_ID = 2,
        /// The launch digest.
        MEASUREMENT = 3,
        /// The GUEST_SVN of the request.
        GUEST_SVN = 4,
        /// The TCB version of the request.
        TCB_VERSION = 5,
    }
}

layout! {
    /// MSG_KEY_REQ.
    KeyRequest 0x20 {
        0x00 in root_key_select: RootKeySelect,
        0x04 _ reserved: Reserved<4>,
        0x08 in guest_field_select: GuestFieldSelect,
        /// Not above that of the message key.
        0x10 in vmpl: U32,
        /// At most the GUEST_SVN of the ID block.
        0x14 in guest_svn: U32,
        /// At most the committed version.
        0x18 in tcb_version: U64,
    }
}

layout! {
    /// MSG_KEY_RSP.
    KeyResponse 0x40 {
        /// Number of a [`Status`](crate::Status).
        0x00 out status: U32,
        0x04 _ reserved: Reserved<28>,
        0x20 out derived_key: [u8; 32],
    }
}

layout! {
    /// MSG_TSC_INFO_REQ.
    TscInfoRequest 0x80 { 0 _ reserved: Reserved<128>, }
}

layout! {
    /// MSG_TSC_INFO_RSP.
    TscInfoResponse 0x80 {
        /// Number of a [`Status`](crate::Status).
        0x00 out status: U32,
        0x04 _ reserved0: Reserved<4>,
        /// Ratio of the guest's frequency to the processor's, with 32 bits of fraction.
        0x08 out tsc_scale: U64,
        0x10 out tsc_offset: U64,
        0x18 out tsc_factor: U32,
        0x1c _ reserved1: Reserved<100>,
    }
}

/// Length of a guest's context in a message, in bytes.
pub const EXPORTED_CONTEXT: usize = 0x2e0;

layout! {
    /// MSG_EXPORT_REQ, of a migration agent. The guest is its own, and swapped out with its records.
    ExportRequest 0x10 {
        0x00 in gctx_paddr: U64,
        0x08 _ reserved: Reserved<8>,
    }
}

layout! {
    /// MSG_EXPORT_RSP.
    ExportResponse 0x300 {
        /// Number of a [`Status`](crate::Status).
        0x000 out status: U32,
        0x004 out gctx_size: U32,
        0x008 out gctx_version: U32,
        0x00c _ reserved: Reserved<20>,
        /// The guest's secrets are in it, in the clear.
        0x020 out gctx: [u8; EXPORTED_CONTEXT],
    }
}

layout! {
    /// MSG_IMPORT_REQ, of a migration agent.
    ImportRequest 0x300 {
        /// A context that SNP_GCTX_CREATE made, and nothing else used.
        0x000 in gctx_paddr: U64,
        0x008 in in_gctx_size: U32,
        0x00c in in_gctx_version: U32,
        0x010 _ reserved: Reserved<16>,
        0x020 in incoming_gctx: [u8; EXPORTED_CONTEXT],
    }
}

layout! {
    /// MSG_VMRK_REQ, of a migration agent, for a guest that is being launched.
    VmrkRequest 0x40 {
        0x00 in gctx_paddr: U64,
        0x08 _ reserved: Reserved<24>,
        /// The root of the derived keys that go with the guest.
        0x20 in vmrk: [u8; 32],
    }
}

layout! {
    /// MSG_IMPORT_RSP and MSG_VMRK_RSP.
    StatusResponse 0x10 {
        /// Number of a [`Status`](crate::Status).
        0x00 out status: U32,
        0x04 _ reserved: Reserved<12>,
    }
}

impl Request for ExportRequest {
    const TYPE: MessageType = MessageType::ExportRequest;
    type Response = ExportResponse;
}

impl Request for ImportRequest {
    const TYPE: MessageType = MessageType::ImportRequest;
    type Response = StatusResponse;
}

impl Request for VmrkRequest {
    const TYPE: MessageType = MessageType::VmrkRequest;
    type Response = StatusResponse;
}

impl Request for ReportRequest {
    const TYPE: MessageType = MessageType::ReportRequest;
    type Response = ReportResponse;
}

impl Request for KeyRequest {
    const TYPE: MessageType = MessageType::KeyRequest;
    type Response = KeyResponse;
}

impl Request for TscInfoRequest {
    const TYPE: MessageType = MessageType::TscInfoRequest;
    type Response = TscInfoResponse;
}
