//! Buffers of SEND and RECEIVE, and of packets in general.

use super::{Reserved, SevPolicy, U32, U64, layout};

layout! {
    /// SEND_START.
    SendStart 0x44 {
        0x00 in handle: U32,
        0x04 out policy: SevPolicy,
        /// Certificate of the other platform's Diffie-Hellman key.
        0x08 in pdh_cert_paddr: U64,
        0x10 in pdh_cert_len: U32,
        0x14 _ reserved0: Reserved<4>,
        /// PEK, OCA and CEK certificate of the other platform.
        0x18 in plat_cert_paddr: U64,
        0x20 in plat_cert_len: U32,
        0x24 _ reserved1: Reserved<4>,
        /// ASK and ARK certificate.
        0x28 in amd_cert_paddr: U64,
        0x30 in amd_cert_len: U32,
        0x34 _ reserved2: Reserved<4>,
        0x38 in session_paddr: U64,
        /// Length of the memory, then of the session.
        0x40 inout session_len: U32,
    }
}

layout! {
    /// RECEIVE_START.
    ReceiveStart 0x24 {
        /// 0, or a guest to share the key with; then the handle of the new guest.
        0x00 inout handle: U32,
        0x04 in policy: SevPolicy,
        /// Certificate of the sender's Diffie-Hellman key.
        0x08 in pdh_cert_paddr: U64,
        0x10 in pdh_cert_len: U32,
        0x14 _ reserved: Reserved<4>,
        0x18 in session_paddr: U64,
        0x20 in session_len: U32,
    }
}

/// Commands that make or take a packet: the same fields, of which only sending writes.
macro_rules! packets {
    ($($(#[$doc:meta])* $Name:ident $direction:ident;)+) => { $(
        layout! {
            $(#[$doc])*
            $Name 0x34 {
                0x00 in handle: U32,
                0x04 _ reserved0: Reserved<4>,
                0x08 in hdr_paddr: U64,
                /// 52.
                0x10 $direction hdr_len: U32,
                0x14 _ reserved1: Reserved<4>,
                /// A multiple of 16.
                0x18 in guest_paddr: U64,
                /// A multiple of 16, at most 16 KiB.
                0x20 in guest_len: U32,
                0x24 _ reserved2: Reserved<4>,
                0x28 in trans_paddr: U64,
                /// Length of the packet's data, that of the guest's.
                0x30 $direction trans_len: U32,
            }
        }
    )+ };
}

packets! {
    /// LAUNCH_SECRET, which Linux calls LAUNCH_UPDATE_SECRET.
    LaunchSecret in;
    /// SEND_UPDATE_DATA.
    SendUpdateData inout;
    /// SEND_UPDATE_VMSA.
    SendUpdateVmsa inout;
    /// RECEIVE_UPDATE_DATA.
    ReceiveUpdateData in;
    /// RECEIVE_UPDATE_VMSA.
    ReceiveUpdateVmsa in;
}

layout! {
    /// SEND_FINISH.
    SendFinish 4 { 0 in handle: U32, }
}

layout! {
    /// SEND_CANCEL.
    SendCancel 4 { 0 in handle: U32, }
}

layout! {
    /// RECEIVE_FINISH.
    ReceiveFinish 4 { 0 in handle: U32, }
}
