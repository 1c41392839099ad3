//! Buffers of the commands that carry SEV and SEV-ES guests from platform to platform.

use zerocopy::little_endian::{U32, U64};

use super::buffer;

buffer! {
    /// Certificates of this platform.
    PdhCertExport [PdhCertExport] 0x1c {
        0x00 pdh: U64,
        0x08 pdh_len: U32,
        0x0c reserved: [u8; 4],
        0x10 chain: U64,
        0x18 chain_len: U32,
    }
}

buffer! {
    /// SEND_START: certificates of the target in, the session out.
    SendStart [SendStart] 0x44 {
        0x00 handle: U32,
        0x04 policy: U32,
        0x08 pdh: U64,
        0x10 pdh_len: U32,
        0x14 reserved0: [u8; 4],
        0x18 plat_certs: U64,
        0x20 plat_certs_len: U32,
        0x24 reserved1: [u8; 4],
        0x28 amd_certs: U64,
        0x30 amd_certs_len: U32,
        0x34 reserved2: [u8; 4],
        0x38 session: U64,
        0x40 session_len: U32,
    }
}

buffer! {
    /// A packet out of or into a page of the guest.
    TransportPacket [SendUpdateData, SendUpdateVmsa, ReceiveUpdateData, ReceiveUpdateVmsa] 0x34 {
        0x00 handle: U32,
        0x04 reserved0: [u8; 4],
        0x08 hdr: U64,
        0x10 hdr_len: U32,
        0x14 reserved1: [u8; 4],
        0x18 guest: U64,
        0x20 guest_len: U32,
        0x24 reserved2: [u8; 4],
        0x28 trans: U64,
        0x30 trans_len: U32,
    }
}

buffer! {
    /// A guest that comes, with the sender's certificate and session.
    ReceiveStart [ReceiveStart] 0x24 {
        0x00 handle: U32,
        0x04 policy: U32,
        0x08 pdh: U64,
        0x10 pdh_len: U32,
        0x14 reserved: [u8; 4],
        0x18 session: U64,
        0x20 session_len: U32,
    }
}
