//! The side of a guest owner in the launch of an SEV or SEV-ES guest.

use super::{Certificate, PacketContext, PacketHeader, PrivateKey, Session, TransportKeys};
use crate::measure::{ApiVersion, LaunchMeasure};
use rand_core::{CryptoRng, RngCore};

/// Keys and parameters of an owner for one launch on one platform.
///
/// The certificate and the session go to LAUNCH_START. Once LAUNCH_MEASURE has answered, the owner
/// [checks](Self::expects) the answer against the digest it computed from the image, and only then
/// [seals](Self::seal_secret) a secret.
#[derive(Clone, Debug)]
pub struct GuestOwner {
    policy: u32,
    keys: TransportKeys,
    certificate: Certificate,
    session: Session,
}

impl GuestOwner {
    /// Draws keys and wraps them for the platform with this Diffie-Hellman certificate. The chain
    /// of the certificate is for the caller to check. `None` if the certificate has no usable key.
    pub fn new(
        pdh: &Certificate,
        policy: u32,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Option<Self> {
        let mut random = || {
            let mut out = [0; 16];
            rng.fill_bytes(&mut out);
            out
        };
        let keys = TransportKeys {
            tek: random(),
            tik: random(),
        };
        let (nonce, iv) = (random(), random());
        let private = PrivateKey::random(rng);
        let z = private.ecdh(&pdh.key()?);
        Some(Self {
            policy,
            keys,
            certificate: Certificate::for_owner(&private.public()),
            session: Session::seal(&z, nonce, iv, &keys, policy),
        })
    }

    /// For the field `dh_cert` of LAUNCH_START.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// For the field `session` of LAUNCH_START.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The keys inside the session.
    pub fn keys(&self) -> &TransportKeys {
        &self.keys
    }

    /// Returns true if a measurement is that of a launch with this digest under the owner's policy.
    pub fn expects(
        &self,
        version: ApiVersion,
        launch_digest: &[u8; 32],
        got: &LaunchMeasure,
    ) -> bool {
        let tik = &self.keys.tik;
        let expected = LaunchMeasure::compute(tik, version, self.policy, launch_digest, got.mnonce);
        super::same_mac(&expected.measure, &got.measure)
    }

    /// Encrypts a secret in place for LAUNCH_UPDATE_SECRET and makes its header. `iv` must not be
    /// used twice.
    pub fn seal_secret(
        &self,
        secret: &mut [u8],
        iv: [u8; 16],
        measure: &LaunchMeasure,
    ) -> PacketHeader {
        let context = PacketContext::LaunchSecret;
        PacketHeader::seal(context, &self.keys, 0, iv, secret, &measure.measure)
    }
}
