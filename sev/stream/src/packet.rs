//! Blobs and packets of the AMD SP, as they travel.

use alloc::vec::Vec;

/// Length of the header of an SP packet (SEV API, SEND_UPDATE_DATA).
pub const PACKET_HEADER: usize = 52;
/// Length of the data of a packet: one page.
pub const PAGE: usize = 4096;

/// Certificates of a platform that a guest is to go to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatformCerts {
    /// Its Diffie-Hellman certificate.
    pub pdh: Vec<u8>,
    /// PEK, OCA and CEK certificates, one after the other.
    pub chain: Vec<u8>,
    /// ASK and ARK, one after the other, from the vendor.
    pub vendor: Vec<u8>,
}

/// The operands of RECEIVE_START, from the sender.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionStart {
    /// The guest's policy.
    pub policy: u32,
    /// The sender's Diffie-Hellman certificate.
    pub pdh: Vec<u8>,
    /// The transport keys, wrapped for the receiver's firmware.
    pub session: Vec<u8>,
}

/// A page under the transport key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Flags, IV and authentication code.
    pub header: [u8; PACKET_HEADER],
    /// The page; plain text where the record that it travels in says so.
    pub data: [u8; PAGE],
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            header: [0; PACKET_HEADER],
            data: [0; PAGE],
        }
    }
}
