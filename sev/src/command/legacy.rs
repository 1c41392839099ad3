//! Buffers of SEV and SEV-ES.

use zerocopy::little_endian::{U32, U64};

use super::buffer;

buffer! {
    /// A guest, and nothing else.
    Handle [Decommission, Deactivate, LaunchFinish, SendFinish, SendCancel, ReceiveFinish] 4 { 0 handle: U32, }
}

buffer! {
    /// ACTIVATE.
    Activate [Activate] 8 { 0 handle: U32, 4 asid: U32, }
}

buffer! {
    /// GUEST_STATUS. The firmware writes all but the handle.
    GuestStatus [GuestStatus] 0xd { 0 handle: U32, 4 policy: U32, 8 asid: U32, 0xc state: u8, }
}

buffer! {
    /// LAUNCH_START. The firmware writes the handle.
    LaunchStart [LaunchStart] 0x24 {
        0 handle: U32, 4 policy: U32,
        8 dh_cert: U64, 0x10 dh_cert_len: U32, 0x14 reserved: U32,
        0x18 session: U64, 0x20 session_len: U32,
    }
}

buffer! {
    /// A range of memory: what is measured, or where the measurement goes.
    Update [LaunchUpdateData, LaunchUpdateVmsa, LaunchMeasure] 0x14 {
        0 handle: U32, 4 reserved: U32, 8 address: U64, 0x10 len: U32,
    }
}

buffer! {
    /// LAUNCH_UPDATE_SECRET: packet header, guest memory, packet data.
    LaunchSecret [LaunchUpdateSecret] 0x34 {
        0 handle: U32, 4 reserved: U32,
        8 hdr: U64, 0x10 hdr_len: U32, 0x14 reserved1: U32,
        0x18 guest: U64, 0x20 guest_len: U32, 0x24 reserved2: U32,
        0x28 trans: U64, 0x30 trans_len: U32,
    }
}

buffer! {
    /// ATTESTATION.
    Attestation [Attestation] 0x24 {
        0 handle: U32, 4 reserved: U32, 8 address: U64, 0x10 mnonce: [u8; 16], 0x20 len: U32,
    }
}

buffer! {
    /// DBG_DECRYPT and DBG_ENCRYPT.
    Debug [DbgDecrypt, DbgEncrypt] 0x1c {
        0 handle: U32, 4 reserved: U32, 8 src: U64, 0x10 dst: U64, 0x18 len: U32,
    }
}
