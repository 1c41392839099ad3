//! The cryptography that guest owners and firmware share: transport keys, sessions, packets,
//! keys and certificates.
//!
//! The primitives come from the RustCrypto crates. What is here is the arrangement: which bytes
//! are hashed under which key, and how keys and signatures are laid out.

mod cert;
mod key;
mod owner;
mod packet;
mod session;

pub use cert::{CERT_LEN, CertAlgorithm, CertUsage, Certificate};
pub use key::{KEY_LEN, PrivateKey, PublicKey, SIGNATURE_LEN};
pub use owner::GuestOwner;
pub use packet::{PACKET_HEADER_LEN, PacketContext, PacketError, PacketHeader};
/// The traits of random number generators that keys are drawn with.
pub use rand_core;
pub use session::{SESSION_LEN, Session, SessionError, TransportKeys, WrapKeys};

use aes::Aes128;
use ctr::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// HMAC-SHA256 over the concatenation of `parts`.
pub fn hmac_sha256(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    // HMAC takes keys of any length, so this cannot fail.
    let mut mac = match <Hmac<Sha256> as Mac>::new_from_slice(key) {
        Ok(mac) => mac,
        Err(_) => unreachable!("HMAC accepts every key length"),
    };
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// Compares without a data-dependent branch.
pub(crate) fn same_mac(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Key derivation in counter mode (NIST SP 800-108) with HMAC-SHA256, for 16-byte keys. Counter
/// and length in bits are 32-bit little-endian, label and context are separated by a zero byte.
pub fn derive_key(key: &[u8], label: &str, context: &[u8]) -> [u8; 16] {
    const BITS: u32 = 128;
    // One block of HMAC-SHA256 is longer than the key, so the counter never passes 1.
    let block = hmac_sha256(
        key,
        &[
            &1_u32.to_le_bytes(),
            label.as_bytes(),
            &[0],
            context,
            &BITS.to_le_bytes(),
        ],
    );
    let mut out = [0; 16];
    out.copy_from_slice(&block[..16]);
    out
}

/// AES-128 in counter mode, in place; the whole 128-bit IV counts, big-endian.
pub fn aes128_ctr(key: &[u8; 16], iv: &[u8; 16], data: &mut [u8]) {
    ctr::Ctr128BE::<Aes128>::new(key.into(), iv.into()).apply_keystream(data);
}
