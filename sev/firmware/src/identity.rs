//! Keys and certificates of a platform.
//!
//! ```text
//! ARK -> ASK -> CEK  -+-> PEK -> PDH       (SEV, SEV-ES; PEK is signed by CEK and OCA)
//!          |     OCA -+
//!          +-> VCEK                        (SNP; one per chip and security version)
//!          +-> VLEK                        (SNP; one per provider and security version)
//! ```
//!
//! Private keys are drawn when the platform is built; certificates are made when first asked for.

use crate::builder::TcbVersion;
use crate::crypto::{CertUsage, Certificate, PrivateKey, hmac_sha256};
use crate::vlek::VlekSeed;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};

/// The vendor: root and signing key. Two platforms are genuine to each other if they were built
/// with the same root.
#[derive(Clone, Debug)]
pub struct RootOfTrust {
    ark: PrivateKey,
    ask: PrivateKey,
}

impl Default for RootOfTrust {
    /// The root that platforms have unless they are given another.
    fn default() -> Self {
        Self::from_seed(0)
    }
}

impl RootOfTrust {
    /// A root whose keys follow from a seed.
    pub fn from_seed(seed: u64) -> Self {
        // Any fixed stream that is not one of a platform's.
        let mut rng = ChaCha20Rng::seed_from_u64(seed ^ 0x616d_645f_726f_6f74);
        Self {
            ark: PrivateKey::random(&mut rng),
            ask: PrivateKey::random(&mut rng),
        }
    }

    /// The root certificate, signed by itself.
    pub fn ark(&self) -> Certificate {
        Certificate::new(CertUsage::Ark, &self.ark.public(), 0, 0)
            .signed_by(CertUsage::Ark, &self.ark)
    }

    /// The signing key's certificate.
    pub fn ask(&self) -> Certificate {
        Certificate::new(CertUsage::Ask, &self.ask.public(), 0, 0)
            .signed_by(CertUsage::Ark, &self.ark)
    }
}

/// Certificates from an external owner: the PEK certificate it signed and its own.
#[derive(Clone)]
pub(crate) struct ExternalOwner {
    pub(crate) pek: Certificate,
    pub(crate) oca: Certificate,
}

/// The keys that an owner can replace.
#[derive(Clone)]
pub(crate) struct OwnedKeys {
    pub(crate) oca: PrivateKey,
    pub(crate) pek: PrivateKey,
    pub(crate) pdh: PrivateKey,
    pub(crate) owner: Option<ExternalOwner>,
}

impl OwnedKeys {
    pub(crate) fn random(rng: &mut ChaCha20Rng) -> Self {
        Self {
            oca: PrivateKey::random(rng),
            pek: PrivateKey::random(rng),
            pdh: PrivateKey::random(rng),
            owner: None,
        }
    }
}

/// Certificates made so far.
#[derive(Default)]
struct Made {
    root: Option<[Certificate; 2]>,
    cek: Option<Certificate>,
    pek: Option<Certificate>,
    oca: Option<Certificate>,
    pdh: Option<Certificate>,
    vcek: Option<(TcbVersion, Certificate)>,
}

pub(crate) struct Identity {
    root: RootOfTrust,
    api: (u8, u8),
    pub(crate) chip_id: [u8; 64],
    /// Fused into the chip: never changes and never leaves it.
    chip_secret: [u8; 32],
    cek: PrivateKey,
    keys: OwnedKeys,
    made: Made,
}

impl Identity {
    /// `chip_id_len`: how many of the chip id's 64 bytes are used; the others are zero.
    pub(crate) fn new(
        root: RootOfTrust,
        api: (u8, u8),
        chip_id_len: usize,
        rng: &mut ChaCha20Rng,
    ) -> Self {
        let (mut chip_id, mut chip_secret) = ([0; 64], [0; 32]);
        rng.fill_bytes(&mut chip_id);
        rng.fill_bytes(&mut chip_secret);
        chip_id.iter_mut().skip(chip_id_len).for_each(|b| *b = 0);
        Self {
            root,
            api,
            chip_id,
            chip_secret,
            cek: PrivateKey::random(rng),
            keys: OwnedKeys::random(rng),
            made: Made::default(),
        }
    }

    pub(crate) fn keys(&self) -> &OwnedKeys {
        &self.keys
    }

    /// Replaces the keys and forgets the certificates that depend on them.
    pub(crate) fn set_keys(&mut self, keys: OwnedKeys) {
        self.keys = keys;
        (self.made.pek, self.made.oca, self.made.pdh) = (None, None, None);
    }

    /// A secret of the chip for one purpose.
    pub(crate) fn chip_key(&self, label: &[u8], context: &[u8]) -> [u8; 32] {
        hmac_sha256(&self.chip_secret, &[label, &[0], context])
    }

    fn certificate(&self, usage: CertUsage, key: &PrivateKey) -> Certificate {
        Certificate::new(usage, &key.public(), self.api.0, self.api.1)
    }

    /// ASK and ARK.
    pub(crate) fn root_certs(&mut self) -> [Certificate; 2] {
        let root = &self.root;
        self.made
            .root
            .get_or_insert_with(|| [root.ask(), root.ark()])
            .clone()
    }

    pub(crate) fn cek_cert(&mut self) -> Certificate {
        let cert = match self.made.cek.take() {
            Some(cert) => cert,
            None => self
                .certificate(CertUsage::Cek, &self.cek)
                .signed_by(CertUsage::Ask, &self.root.ask),
        };
        self.made.cek.insert(cert).clone()
    }

    pub(crate) fn oca_cert(&mut self) -> Certificate {
        if let Some(owner) = &self.keys.owner {
            return owner.oca.clone();
        }
        let cert = match self.made.oca.take() {
            Some(cert) => cert,
            None => self
                .certificate(CertUsage::Oca, &self.keys.oca)
                .signed_by(CertUsage::Oca, &self.keys.oca),
        };
        self.made.oca.insert(cert).clone()
    }

    /// The PEK without signatures: what an owner is asked to sign.
    pub(crate) fn pek_request(&self) -> Certificate {
        self.certificate(CertUsage::Pek, &self.keys.pek)
    }

    pub(crate) fn pek_cert(&mut self) -> Certificate {
        let cert = match (self.made.pek.take(), &self.keys.owner) {
            (Some(cert), _) => cert,
            (None, Some(owner)) => owner.pek.clone().signed_by(CertUsage::Cek, &self.cek),
            (None, None) => self
                .pek_request()
                .signed_by(CertUsage::Oca, &self.keys.oca)
                .signed_by(CertUsage::Cek, &self.cek),
        };
        self.made.pek.insert(cert).clone()
    }

    pub(crate) fn pdh_cert(&mut self) -> Certificate {
        let cert = match self.made.pdh.take() {
            Some(cert) => cert,
            None => self
                .certificate(CertUsage::Pdh, &self.keys.pdh)
                .signed_by(CertUsage::Pek, &self.keys.pek),
        };
        self.made.pdh.insert(cert).clone()
    }

    /// The VCEK of a security version. It follows from the chip's secret, so the same version
    /// always gives the same key.
    pub(crate) fn vcek(&self, tcb: TcbVersion) -> PrivateKey {
        let seed = self.chip_key(b"vcek", &tcb.0.to_le_bytes());
        PrivateKey::random(&mut ChaCha20Rng::from_seed(seed))
    }

    /// The key that VLEKs are wrapped with for this chip.
    pub(crate) fn vlek_wrapping_key(&self) -> [u8; 32] {
        self.chip_key(b"vlek wrapping", &[])
    }

    pub(crate) fn vlek_cert(&self, seed: &VlekSeed, tcb: TcbVersion) -> Certificate {
        // The provider's key, not this platform's: it says nothing about its firmware.
        Certificate::new(CertUsage::Vlek, &seed.key(tcb).public(), 0, 0)
            .signed_by(CertUsage::Ask, &self.root.ask)
    }

    pub(crate) fn vcek_cert(&mut self, tcb: TcbVersion) -> Certificate {
        let cert = match self.made.vcek.take() {
            Some((made_for, cert)) if made_for == tcb => cert,
            _ => self
                .certificate(CertUsage::Vcek, &self.vcek(tcb))
                .signed_by(CertUsage::Ask, &self.root.ask),
        };
        self.made.vcek.insert((tcb, cert)).1.clone()
    }
}
