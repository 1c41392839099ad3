//! A provisioning certification service: the PCK chain, TCB info, QE identity and revocation lists
//! of the software platform.
//!
//! Source of the formats: Intel's *Provisioning Certification Service* (version 4) and *SGX PCK
//! Certificate and CRL Profile Specification*.

mod collateral;
mod extension;

use p256::ecdsa::signature::Signer;
use p256::ecdsa::{DerSignature, Signature, SigningKey};
use p256::pkcs8::EncodePublicKey;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use x509_cert::TbsCertificate;
use x509_cert::crl::{CertificateList, RevokedCert, TbsCertList};
use x509_cert::der::asn1::{BitString, ObjectIdentifier, OctetString, UintRef};
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, KeyUsages};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};

pub use self::collateral::{Collateral, Level};
use self::collateral::{qe_identity, tcb_info};
pub(super) use self::collateral::{qe_signer, qe_svn};
use self::extension::{SGX, sgx_extension};
use super::parts::{ALWAYS, IssueError, Result, critical, name, plain, validity};
use crate::x509::Certificate;

const ECDSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
const CRL_NUMBER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.20");

/// The authorities, by the text that their private keys are the SHA-256 of.
const ROOT: &str = "kvm-ops software platform: SGX Root CA";
const PCK_CA: &str = "kvm-ops software platform: PCK Platform CA";
const TCB_SIGNING: &str = "kvm-ops software platform: TCB Signing";

const ROOT_NAME: &str = "Intel SGX Root CA";
const PCK_CA_NAME: &str = "Intel SGX PCK Platform CA";
const TCB_SIGNING_NAME: &str = "Intel SGX TCB Signing";

/// The values of a platform in its PCK certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Family, model, stepping, platform type and custom SKU.
    pub fmspc: [u8; 6],
    /// Provisioning id.
    pub ppid: [u8; 16],
    /// Instance of a platform with several packages.
    pub instance_id: [u8; 16],
    /// Security versions of the processor's parts.
    pub cpu_svn: [u8; 16],
    /// Security version of the provisioning certification enclave.
    pub pce_svn: u16,
}

impl Default for Platform {
    fn default() -> Self {
        let id = |text: &str| {
            let digest: [u8; 32] = Sha256::digest(text).into();
            *digest.first_chunk().unwrap_or(&[0; 16])
        };
        Self {
            fmspc: *b"SOFTWR",
            ppid: id("kvm-ops software platform: PPID"),
            instance_id: id("kvm-ops software platform: instance"),
            cpu_svn: [3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0],
            pce_svn: 11,
        }
    }
}

/// The service. The same request always gives the same bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pcs;

impl Pcs {
    /// The root's certificate.
    pub fn root(&self) -> Result<Certificate> {
        let usage = KeyUsages::KeyCertSign | KeyUsages::CRLSign;
        self.authority((1, ROOT_NAME, ROOT), usage.into(), Some(1))
    }

    /// Certificate of the authority for PCKs.
    pub fn pck_ca(&self) -> Result<Certificate> {
        let usage = KeyUsages::KeyCertSign | KeyUsages::CRLSign;
        self.authority((2, PCK_CA_NAME, PCK_CA), usage.into(), Some(0))
    }

    /// Certificate of the key that signs TCB info and QE identity.
    pub fn tcb_signing(&self) -> Result<Certificate> {
        let usage = KeyUsages::DigitalSignature | KeyUsages::NonRepudiation;
        self.authority((3, TCB_SIGNING_NAME, TCB_SIGNING), usage.into(), None)
    }

    /// Certifies a platform's key, with Intel's extension, for a time in seconds of Unix time.
    pub fn certify(
        &self,
        key: &p256::PublicKey,
        platform: &Platform,
        valid: Option<(u64, u64)>,
    ) -> Result<Certificate> {
        let spki = spki(key)?;
        let usage = KeyUsages::DigitalSignature | KeyUsages::NonRepudiation;
        let mut extensions = self.extensions(PCK_CA, usage.into(), None)?;
        extensions.push(plain(SGX, sgx_extension(platform)?)?);
        let tbs = TbsCertificate {
            subject: name("Intel SGX PCK Certificate")?,
            issuer: name(PCK_CA_NAME)?,
            subject_public_key_info: spki,
            validity: validity(valid.unwrap_or(ALWAYS))?,
            serial_number: pck_serial()?,
            signature: ecdsa(),
            version: x509_cert::Version::V3,
            issuer_unique_id: None,
            subject_unique_id: None,
            extensions: Some(extensions),
        };
        finish(tbs, PCK_CA)
    }

    /// The collateral as JSON, in the form that the crate `dcap-qvl` reads and writes.
    pub fn collateral(&self, platform: &Platform, says: &Collateral) -> Result<Value> {
        let pem = |chain: [Certificate; 2]| chain.map(|c| c.to_pem()).concat();
        let pck_chain = pem([self.pck_ca()?, self.root()?]);
        let tcb_chain = pem([self.tcb_signing()?, self.root()?]);
        let tcb_info = tcb_info(platform, says)?.to_string();
        let identity = qe_identity(says)?.to_string();
        let revoked = |is: bool, serial: SerialNumber| is.then_some(serial);
        let ca_serial = SerialNumber::new(&[2])?;
        let root_crl = crl(ROOT_NAME, ROOT, revoked(says.revoked_ca, ca_serial), says)?;
        let pck_crl = crl(
            PCK_CA_NAME,
            PCK_CA,
            revoked(says.revoked_pck, pck_serial()?),
            says,
        )?;
        let sign = |text: &str| -> Result<String> {
            let signature: Signature = key(TCB_SIGNING)?.sign(text.as_bytes());
            Ok(hex::encode(signature.to_bytes()))
        };
        Ok(json!({
            "pck_crl_issuer_chain": pck_chain,
            "root_ca_crl": hex::encode(root_crl),
            "pck_crl": hex::encode(pck_crl),
            "tcb_info_issuer_chain": tcb_chain,
            "tcb_info_signature": sign(&tcb_info)?,
            "tcb_info": tcb_info,
            "qe_identity_issuer_chain": tcb_chain,
            "qe_identity_signature": sign(&identity)?,
            "qe_identity": identity,
        }))
    }

    fn authority(
        &self,
        (serial, common, secret): (u8, &str, &str),
        usage: KeyUsage,
        path_len: Option<u8>,
    ) -> Result<Certificate> {
        let own = key(secret)?;
        let public = p256::PublicKey::from(*own.verifying_key());
        let tbs = TbsCertificate {
            subject: name(common)?,
            issuer: name(ROOT_NAME)?,
            subject_public_key_info: spki(&public)?,
            validity: validity(ALWAYS)?,
            serial_number: SerialNumber::new(&[serial])?,
            signature: ecdsa(),
            version: x509_cert::Version::V3,
            issuer_unique_id: None,
            subject_unique_id: None,
            extensions: Some(self.extensions(ROOT, usage, path_len)?),
        };
        finish(tbs, ROOT)
    }

    fn extensions(
        &self,
        issuer: &str,
        usage: KeyUsage,
        path_len: Option<u8>,
    ) -> Result<Vec<Extension>> {
        let identifier = AuthorityKeyIdentifier {
            key_identifier: Some(OctetString::new(key_id(issuer)?)?),
            ..AuthorityKeyIdentifier::default()
        };
        let constraints = BasicConstraints {
            ca: path_len.is_some(),
            path_len_constraint: path_len,
        };
        let identifier = plain(
            ObjectIdentifier::new_unwrap("2.5.29.35"),
            identifier.to_der()?,
        )?;
        Ok(vec![identifier, critical(&usage)?, critical(&constraints)?])
    }
}

/// A published private key: the SHA-256 of its name.
fn key(name: &str) -> Result<SigningKey> {
    let scalar = Sha256::digest(name);
    SigningKey::from_bytes(&scalar).map_err(|_| IssueError::Key)
}

fn key_id(name: &str) -> Result<Vec<u8>> {
    let point = key(name)?.verifying_key().to_encoded_point(false);
    Ok(Sha256::digest(point.as_bytes())[..20].to_vec())
}

fn pck_serial() -> Result<SerialNumber> {
    Ok(SerialNumber::new(b"\x01software PCK")?)
}

fn spki(key: &p256::PublicKey) -> Result<SubjectPublicKeyInfoOwned> {
    let der = key.to_public_key_der().map_err(|_| IssueError::Key)?;
    Ok(SubjectPublicKeyInfoOwned::from_der(der.as_bytes())?)
}

const fn ecdsa() -> AlgorithmIdentifierOwned {
    AlgorithmIdentifierOwned {
        oid: ECDSA_SHA256,
        parameters: None,
    }
}

fn sign(message: &[u8], signer: &str) -> Result<BitString> {
    let signature: DerSignature = key(signer)?.sign(message);
    Ok(BitString::from_bytes(signature.as_bytes())?)
}

fn finish(tbs: TbsCertificate, signer: &str) -> Result<Certificate> {
    let signature = sign(&tbs.to_der()?, signer)?;
    let certificate = x509_cert::Certificate {
        signature_algorithm: tbs.signature.clone(),
        tbs_certificate: tbs,
        signature,
    };
    Ok(Certificate::from_der(&certificate.to_der()?)?)
}

fn crl(
    issuer: &str,
    signer: &str,
    revoked: Option<SerialNumber>,
    says: &Collateral,
) -> Result<Vec<u8>> {
    let validity = validity(says.validity)?;
    let issuer: Name = name(issuer)?;
    let revoked = revoked.map(|serial_number| {
        vec![RevokedCert {
            serial_number,
            revocation_date: validity.not_before,
            crl_entry_extensions: None,
        }]
    });
    let identifier = AuthorityKeyIdentifier {
        key_identifier: Some(OctetString::new(key_id(signer)?)?),
        ..AuthorityKeyIdentifier::default()
    };
    let tbs_cert_list = TbsCertList {
        version: x509_cert::Version::V2,
        signature: ecdsa(),
        issuer,
        this_update: validity.not_before,
        next_update: Some(validity.not_after),
        revoked_certificates: revoked,
        crl_extensions: Some(vec![
            plain(CRL_NUMBER, UintRef::new(&[1])?.to_der()?)?,
            plain(
                ObjectIdentifier::new_unwrap("2.5.29.35"),
                identifier.to_der()?,
            )?,
        ]),
    };
    let signature = sign(&tbs_cert_list.to_der()?, signer)?;
    let list = CertificateList {
        signature_algorithm: ecdsa(),
        tbs_cert_list,
        signature,
    };
    Ok(list.to_der()?)
}
