//! Transport packets: launch secrets and the pages of a migrating guest.

use super::{TransportKeys, aes128_ctr, hmac_sha256, same_mac};
use thiserror::Error;

/// Length of a packet header.
pub const PACKET_HEADER_LEN: usize = 52;

/// Purpose of a packet. The number is the first byte that its code covers, so that a packet made
/// for one purpose is not accepted for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PacketContext {
    /// LAUNCH_UPDATE_SECRET; the launch measurement is authenticated with it.
    LaunchSecret = 1,
    /// SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA.
    UpdateData = 2,
    /// SEND_UPDATE_VMSA and RECEIVE_UPDATE_VMSA.
    UpdateVmsa = 3,
}

/// Reasons for refusing a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PacketError {
    /// The authentication code is wrong.
    #[error("the packet is not authentic")]
    Mac,
}

/// Header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHeader {
    /// Bit 0: the data is compressed.
    pub flags: u32,
    /// IV of the data.
    pub iv: [u8; 16],
    /// Authentication code.
    pub mac: [u8; 32],
}

impl PacketHeader {
    /// Encrypts `data` in place and makes its header. `measure` follows the data in the code of a
    /// launch secret and is empty otherwise.
    pub fn seal(
        context: PacketContext,
        keys: &TransportKeys,
        flags: u32,
        iv: [u8; 16],
        data: &mut [u8],
        measure: &[u8],
    ) -> Self {
        aes128_ctr(&keys.tek, &iv, data);
        let mac = code(context, keys, flags, &iv, data, measure);
        Self { flags, iv, mac }
    }

    /// Checks the code and decrypts `data` in place. On error the data is untouched.
    pub fn open(
        &self,
        context: PacketContext,
        keys: &TransportKeys,
        data: &mut [u8],
        measure: &[u8],
    ) -> Result<(), PacketError> {
        let expected = code(context, keys, self.flags, &self.iv, data, measure);
        if !same_mac(&expected, &self.mac) {
            return Err(PacketError::Mac);
        }
        aes128_ctr(&keys.tek, &self.iv, data);
        Ok(())
    }

    /// The bytes that travel.
    pub fn to_bytes(&self) -> [u8; PACKET_HEADER_LEN] {
        let mut out = [0; PACKET_HEADER_LEN];
        out[..4].copy_from_slice(&self.flags.to_le_bytes());
        out[4..20].copy_from_slice(&self.iv);
        out[20..].copy_from_slice(&self.mac);
        out
    }

    /// Takes the bytes apart; nothing is checked yet.
    pub fn from_bytes(bytes: &[u8; PACKET_HEADER_LEN]) -> Self {
        Self {
            flags: crate::wire::u32_at(bytes, 0),
            iv: crate::wire::copy_at(bytes, 4),
            mac: crate::wire::copy_at(bytes, 20),
        }
    }
}

/// Without compression, guest length and transport length are both the length of the data.
fn code(
    context: PacketContext,
    keys: &TransportKeys,
    flags: u32,
    iv: &[u8; 16],
    cipher_text: &[u8],
    measure: &[u8],
) -> [u8; 32] {
    let length = (cipher_text.len() as u32).to_le_bytes();
    hmac_sha256(
        &keys.tik,
        &[
            &[context as u8],
            &flags.to_le_bytes(),
            iv,
            &length,
            &length,
            cipher_text,
            measure,
        ],
    )
}
