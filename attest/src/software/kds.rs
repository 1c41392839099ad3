//! A key distribution service: ARK, ASK, ASVK, VCEK, VLEK and CRL of the software platform.

use p384::pkcs8::EncodePublicKey;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use rsa::RsaPrivateKey;
use rsa::pkcs8::DecodePrivateKey;
use rsa::pss::{Signature, SigningKey};
use rsa::signature::{RandomizedSigner, SignatureEncoding};
use rsa::traits::PublicKeyParts;
use sha2::{Digest, Sha256, Sha384};
use x509_cert::TbsCertificate;
use x509_cert::crl::{CertificateList, RevokedCert, TbsCertList};
use x509_cert::der::asn1::{BitString, Ia5StringRef};
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, KeyUsages};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{DynSignatureAlgorithmIdentifier, SubjectPublicKeyInfoOwned};

use super::parts::{ALWAYS, IssueError, Result, critical, name, plain, validity};
use crate::snp::endorsement::arc;
use crate::snp::{KeyKind, Product, Tcb};
use crate::x509::{Certificate, Crl};

const ARK: &[u8] = include_bytes!("../../roots/software-ark.pk8");
const ASK: &[u8] = include_bytes!("../../roots/software-ask.pk8");
const ASVK: &[u8] = include_bytes!("../../roots/software-asvk.pk8");

/// The owner of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A chip: the key is a VCEK.
    Chip([u8; 64]),
    /// A provider of that name: the key is a VLEK.
    Provider(String),
}

/// A key that is to be certified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VekRequest {
    /// The public key as an uncompressed point (SEC 1, 2.3.3).
    pub key: Vec<u8>,
    /// The TCB that it was derived from.
    pub tcb: Tcb,
    /// The owner of the key.
    pub subject: Subject,
    /// First and last second of validity, in Unix time.
    pub validity: (u64, u64),
}

impl VekRequest {
    /// A request for a certificate that is valid from 2020 to 2049.
    pub fn new(key: &[u8], tcb: Tcb, subject: Subject) -> Self {
        Self {
            key: key.to_vec(),
            tcb,
            subject,
            validity: ALWAYS,
        }
    }
}

/// The contents of a revocation list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// The certificates that are revoked.
    pub revoked: Vec<Certificate>,
    /// When the list is issued and when the next is due, in seconds of Unix time.
    pub validity: (u64, u64),
}

impl Default for Revocation {
    /// Nothing is revoked, from 2020 to 2049.
    fn default() -> Self {
        Self {
            revoked: Vec::new(),
            validity: ALWAYS,
        }
    }
}

/// The key distribution service of the software platform, for one product.
///
/// The same request always gives the same bytes.
#[derive(Clone, Copy, Debug)]
pub struct Kds {
    product: Product,
}

impl Kds {
    /// The service for a product.
    pub const fn new(product: Product) -> Self {
        Self { product }
    }

    /// The root.
    pub fn ark(&self) -> Result<Certificate> {
        let name = self.ark_name()?;
        self.authority(&signer(ARK)?, (0, name.clone()), name, ALWAYS)
    }

    /// The authority that certifies VCEKs.
    pub fn ask(&self) -> Result<Certificate> {
        self.ask_valid(ALWAYS)
    }

    /// ASK and ARK that somebody else made: with the names of the real ones, and other keys.
    pub fn forged(&self) -> Result<[Certificate; 2]> {
        let (ark, ask) = (self.ark_name()?, self.signer_name(KeyKind::Vcek)?);
        let forger = signer(ASVK)?;
        Ok([
            self.signed((&signer(ASK)?, &forger), (1, ask), ark.clone(), ALWAYS)?,
            self.signed((&forger, &forger), (0, ark.clone()), ark, ALWAYS)?,
        ])
    }

    /// The same, valid in another time.
    pub fn ask_valid(&self, validity: (u64, u64)) -> Result<Certificate> {
        let name = self.signer_name(KeyKind::Vcek)?;
        self.authority(&signer(ASK)?, (1, name), self.ark_name()?, validity)
    }

    /// The authority that certifies VLEKs.
    pub fn asvk(&self) -> Result<Certificate> {
        let name = self.signer_name(KeyKind::Vlek)?;
        self.authority(&signer(ASVK)?, (2, name), self.ark_name()?, ALWAYS)
    }

    /// Certifies a key that signs reports.
    pub fn certify(&self, request: &VekRequest) -> Result<Certificate> {
        let key = p384::PublicKey::from_sec1_bytes(&request.key).map_err(|_| IssueError::Key)?;
        let spki = key.to_public_key_der().map_err(|_| IssueError::Key)?;
        let kind = match request.subject {
            Subject::Chip(_) => KeyKind::Vcek,
            Subject::Provider(_) => KeyKind::Vlek,
        };
        let key = match kind {
            KeyKind::Vcek => signer(ASK)?,
            KeyKind::Vlek => signer(ASVK)?,
        };
        let tbs = TbsCertificate {
            subject: name(kind.subject())?,
            issuer: self.signer_name(kind)?,
            subject_public_key_info: SubjectPublicKeyInfoOwned::from_der(spki.as_bytes())?,
            validity: validity(request.validity)?,
            serial_number: SerialNumber::new(&[0])?,
            signature: algorithm(&key)?,
            version: x509_cert::Version::V3,
            issuer_unique_id: None,
            subject_unique_id: None,
            extensions: Some(self.extensions(request)?),
        };
        finish(tbs, &key)
    }

    /// The root's revocation list.
    pub fn crl(&self, revocation: &Revocation) -> Result<Crl> {
        let key = signer(ARK)?;
        let validity = validity(revocation.validity)?;
        let entry = |certificate: &Certificate| RevokedCert {
            serial_number: certificate.parsed().tbs_certificate.serial_number.clone(),
            revocation_date: validity.not_before,
            crl_entry_extensions: None,
        };
        let revoked: Vec<_> = revocation.revoked.iter().map(entry).collect();
        let tbs_cert_list = TbsCertList {
            version: x509_cert::Version::V2,
            signature: algorithm(&key)?,
            issuer: self.ark_name()?,
            this_update: validity.not_before,
            next_update: Some(validity.not_after),
            revoked_certificates: (!revoked.is_empty()).then_some(revoked),
            crl_extensions: None,
        };
        let signature = sign(&key, &tbs_cert_list.to_der()?)?;
        let list = CertificateList {
            signature_algorithm: tbs_cert_list.signature.clone(),
            tbs_cert_list,
            signature,
        };
        Ok(Crl::from_der(&list.to_der()?)?)
    }

    fn ark_name(&self) -> Result<Name> {
        name(&format!("ARK-{}", self.product.name()))
    }

    fn signer_name(&self, kind: KeyKind) -> Result<Name> {
        let product = self.product.name();
        match kind {
            KeyKind::Vcek => name(&format!("SEV-{product}")),
            KeyKind::Vlek => name(&format!("SEV-VLEK-{product}")),
        }
    }

    /// A certificate for an authority's own key, signed by the ARK.
    fn authority(
        &self,
        own: &SigningKey<Sha384>,
        subject: (u8, Name),
        issuer: Name,
        valid: (u64, u64),
    ) -> Result<Certificate> {
        self.signed((own, &signer(ARK)?), subject, issuer, valid)
    }

    fn signed(
        &self,
        (own, above): (&SigningKey<Sha384>, &SigningKey<Sha384>),
        (number, subject): (u8, Name),
        issuer: Name,
        valid: (u64, u64),
    ) -> Result<Certificate> {
        let product = Product::ALL.iter().position(|p| *p == self.product);
        let tbs = TbsCertificate {
            subject,
            issuer,
            subject_public_key_info: rsa_key(own)?,
            validity: validity(valid)?,
            serial_number: SerialNumber::new(&[product.unwrap_or_default() as u8 + 1, 0, number])?,
            signature: algorithm(above)?,
            version: x509_cert::Version::V3,
            issuer_unique_id: None,
            subject_unique_id: None,
            extensions: Some(vec![
                critical(&BasicConstraints {
                    ca: true,
                    path_len_constraint: None,
                })?,
                critical(&KeyUsage(KeyUsages::KeyCertSign | KeyUsages::CRLSign))?,
            ]),
        };
        finish(tbs, above)
    }

    /// AMD's extensions (publication 57230), in the order of certificates in use.
    fn extensions(&self, request: &VekRequest) -> Result<Vec<Extension>> {
        let product = match (self.product, &request.subject) {
            (product, Subject::Provider(_)) => product.name().to_owned(),
            (Product::Milan, _) => "Milan-B0".to_owned(),
            (Product::Genoa, _) => "Genoa-B1".to_owned(),
            (Product::Turin, _) => "Turin-B0".to_owned(),
        };
        let tcb = request.tcb;
        let mut numbers = vec![
            (arc::BOOT_LOADER, tcb.boot_loader),
            (arc::TEE, tcb.tee),
            (arc::SNP, tcb.snp),
            (arc::SPL_5, 0),
            (arc::SPL_6, 0),
            (arc::SPL_7, 0),
            (arc::MICROCODE, tcb.microcode),
        ];
        match self.product {
            Product::Turin => numbers.push((arc::FMC, tcb.fmc)),
            _ => numbers.push((arc::SPL_4, 0)),
        }
        let text = |arc, text: &str| Ok(plain(arc, Ia5StringRef::new(text)?.to_der()?));
        let mut all = vec![Ok(plain(arc::STRUCTURE_VERSION, 0_u8.to_der()?))];
        all.push(text(arc::PRODUCT_NAME, &product));
        for (arc, number) in numbers {
            all.push(Ok(plain(arc, number.to_der()?)));
        }
        all.push(match &request.subject {
            Subject::Chip(id) => {
                let id = &id[..self.product.chip_id_len()];
                Ok(plain(arc::HWID, id.to_vec()))
            }
            Subject::Provider(provider) => text(arc::CSP_ID, provider),
        });
        all.into_iter()
            .map(|made: Result<_>| made.and_then(|make| Ok(make?)))
            .collect()
    }
}

fn signer(pkcs8: &[u8]) -> Result<SigningKey<Sha384>> {
    let key = RsaPrivateKey::from_pkcs8_der(pkcs8);
    key.map(SigningKey::new)
        .map_err(|error| IssueError::Sign(error.to_string()))
}

fn rsa_key(key: &SigningKey<Sha384>) -> Result<SubjectPublicKeyInfoOwned> {
    let key: &RsaPrivateKey = key.as_ref();
    debug_assert_eq!(key.size(), 512);
    SubjectPublicKeyInfoOwned::from_key(key.to_public_key())
        .map_err(|error| IssueError::Sign(error.to_string()))
}

fn algorithm(key: &SigningKey<Sha384>) -> Result<x509_cert::spki::AlgorithmIdentifierOwned> {
    key.signature_algorithm_identifier()
        .map_err(|error| IssueError::Sign(error.to_string()))
}

/// Signs; the salt follows from the message, so that the same message has one signature.
fn sign(key: &SigningKey<Sha384>, message: &[u8]) -> Result<BitString> {
    let mut rng = ChaCha20Rng::from_seed(Sha256::digest(message).into());
    let signature: Signature = key
        .try_sign_with_rng(&mut rng, message)
        .map_err(|error| IssueError::Sign(error.to_string()))?;
    Ok(BitString::from_bytes(&signature.to_bytes())?)
}

fn finish(tbs: TbsCertificate, key: &SigningKey<Sha384>) -> Result<Certificate> {
    let signature = sign(key, &tbs.to_der()?)?;
    let certificate = x509_cert::Certificate {
        signature_algorithm: tbs.signature.clone(),
        tbs_certificate: tbs,
        signature,
    };
    Ok(Certificate::from_der(&certificate.to_der()?)?)
}
