//! P-384 keys and signatures in the firmware's layout.
//!
//! A key is 0x404 bytes: the curve number 2, then both coordinates as 72-byte little-endian
//! numbers. A signature is 512 bytes: R and S in the same form. The rest is zero.

use p384::ecdsa::signature::hazmat::PrehashVerifier;
use p384::ecdsa::signature::{Signer, Verifier};
use p384::ecdsa::{Signature, SigningKey, VerifyingKey};
use p384::elliptic_curve::sec1::{FromEncodedPoint, ToEncodedPoint};
use p384::{EncodedPoint, FieldBytes, SecretKey};
use rand_core::{CryptoRng, RngCore};
use sha2::{Digest, Sha256};

/// Length of a public key.
pub const KEY_LEN: usize = 0x404;
/// Length of a signature.
pub const SIGNATURE_LEN: usize = 512;

const CURVE_P384: u32 = 2;
const NUMBER: usize = 72;
const COORDINATE: usize = 48;

fn put_number(out: &mut [u8], big_endian: &[u8]) {
    for (place, byte) in out.iter_mut().zip(big_endian.iter().rev()) {
        *place = *byte;
    }
}

/// The 48 big-endian bytes of a number, or `None` if it needs more.
fn number(bytes: &[u8]) -> Option<FieldBytes> {
    let mut out = FieldBytes::default();
    for (i, byte) in bytes.iter().enumerate() {
        match out.len().checked_sub(i + 1) {
            Some(place) => out[place] = *byte,
            None if *byte != 0 => return None,
            None => {}
        }
    }
    Some(out)
}

/// A public key on P-384.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(p384::PublicKey);

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PublicKey(x = 0x")?;
        for byte in self.x() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}

impl PublicKey {
    /// Reads a key; `None` if the curve is another one or the point is not on it.
    pub fn from_bytes(bytes: &[u8; KEY_LEN]) -> Option<Self> {
        if crate::wire::u32_at(bytes, 0) != CURVE_P384 {
            return None;
        }
        let x = number(&bytes[4..4 + NUMBER])?;
        let y = number(&bytes[4 + NUMBER..4 + 2 * NUMBER])?;
        let point = EncodedPoint::from_affine_coordinates(&x, &y, false);
        Option::from(p384::PublicKey::from_encoded_point(&point)).map(Self)
    }

    /// The key in the firmware's layout.
    pub fn to_bytes(&self) -> [u8; KEY_LEN] {
        let point = self.0.to_encoded_point(false);
        let mut out = [0; KEY_LEN];
        out[..4].copy_from_slice(&CURVE_P384.to_le_bytes());
        // An uncompressed point is a tag byte and both coordinates.
        let bytes = point.as_bytes();
        put_number(&mut out[4..4 + NUMBER], &bytes[1..1 + COORDINATE]);
        put_number(&mut out[4 + NUMBER..], &bytes[1 + COORDINATE..]);
        out
    }

    /// The x coordinate, big-endian.
    pub fn x(&self) -> [u8; COORDINATE] {
        let point = self.0.to_encoded_point(false);
        crate::wire::copy_at(point.as_bytes(), 1)
    }

    /// The key as an uncompressed point (SEC 1, 2.3.3): what X.509 certificates hold.
    pub fn to_sec1(&self) -> [u8; 1 + 2 * COORDINATE] {
        crate::wire::copy_at(self.0.to_encoded_point(false).as_bytes(), 0)
    }

    /// Checks an ECDSA signature made with SHA-384.
    pub fn verify(&self, message: &[u8], signature: &[u8; SIGNATURE_LEN]) -> bool {
        read_signature(signature)
            .is_some_and(|s| VerifyingKey::from(self.0).verify(message, &s).is_ok())
    }

    /// Checks an ECDSA signature made with SHA-256, as older certificates use it.
    pub fn verify_sha256(&self, message: &[u8], signature: &[u8; SIGNATURE_LEN]) -> bool {
        let hash = Sha256::digest(message);
        read_signature(signature)
            .is_some_and(|s| VerifyingKey::from(self.0).verify_prehash(&hash, &s).is_ok())
    }
}

fn read_signature(bytes: &[u8; SIGNATURE_LEN]) -> Option<Signature> {
    let r = number(&bytes[..NUMBER])?;
    let s = number(&bytes[NUMBER..2 * NUMBER])?;
    Signature::from_scalars(r, s).ok()
}

/// A private key on P-384.
#[derive(Clone)]
pub struct PrivateKey(SecretKey);

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl PrivateKey {
    /// Draws a key.
    pub fn random(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self(SecretKey::random(rng))
    }

    /// Takes a scalar of at most 48 big-endian bytes; `None` if it is zero, too long or not below
    /// the order of the curve.
    pub fn from_scalar(big_endian: &[u8]) -> Option<Self> {
        let mut bytes = FieldBytes::default();
        let start = bytes.len().checked_sub(big_endian.len())?;
        bytes[start..].copy_from_slice(big_endian);
        SecretKey::from_bytes(&bytes).ok().map(Self)
    }

    /// The scalar, big-endian.
    pub(crate) fn scalar(&self) -> [u8; COORDINATE] {
        self.0.to_bytes().into()
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.public_key())
    }

    /// ECDSA with SHA-384 and the deterministic nonce of RFC 6979.
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        let signature: Signature = SigningKey::from(&self.0).sign(message);
        let (r, s) = signature.split_bytes();
        let mut out = [0; SIGNATURE_LEN];
        put_number(&mut out[..NUMBER], &r);
        put_number(&mut out[NUMBER..2 * NUMBER], &s);
        out
    }

    /// The x coordinate of the shared point, 48 bytes big-endian: the secret Z of a session.
    pub fn ecdh(&self, peer: &PublicKey) -> [u8; COORDINATE] {
        let shared = p384::ecdh::diffie_hellman(self.0.to_nonzero_scalar(), peer.0.as_affine());
        (*shared.raw_secret_bytes()).into()
    }
}
