//! Signatures as AMD makes them: RSASSA-PSS with SHA-384.

use rsa::RsaPublicKey;
use rsa::pkcs1::RsaPssParams;
use rsa::pss::{Signature, VerifyingKey};
use rsa::signature::Verifier;
use rsa::traits::PublicKeyParts;
use sha2::Sha384;
use x509_cert::der::Decode;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::referenced::OwnedToRef;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::X509Error;
use super::signed::Signed;

const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const MGF1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.8");
const SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2");
/// Length of AMD's keys, in bytes.
const KEY_LEN: usize = 512;

impl Signed<'_> {
    /// Checks the signature. `inner` is the algorithm that the signed part names, in DER.
    pub(super) fn verify(
        &self,
        inner: &[u8],
        signer: &SubjectPublicKeyInfoOwned,
    ) -> Result<(), X509Error> {
        if inner != self.algorithm {
            return Err(X509Error::AlgorithmsDiffer);
        }
        check_algorithm(self.algorithm)?;
        let key = RsaPublicKey::try_from(signer.owned_to_ref()).map_err(|_| X509Error::Key)?;
        if key.size() != KEY_LEN {
            return Err(X509Error::Key);
        }
        let signature = Signature::try_from(self.signature).map_err(|_| X509Error::Signature)?;
        VerifyingKey::<Sha384>::new(key)
            .verify(self.body, &signature)
            .map_err(|_| X509Error::Signature)
    }
}

/// Only what AMD uses: SHA-384 for the message and for the mask, and a salt of 48 bytes.
fn check_algorithm(der: &[u8]) -> Result<(), X509Error> {
    use x509_cert::spki::AlgorithmIdentifierRef;
    let algorithm = AlgorithmIdentifierRef::from_der(der)?;
    let parameters = algorithm
        .parameters
        .filter(|_| algorithm.oid == RSASSA_PSS)
        .ok_or(X509Error::Algorithm)?;
    let pss: RsaPssParams<'_> = parameters.decode_as().map_err(|_| X509Error::Algorithm)?;
    let mask = pss.mask_gen.parameters.map(|hash| hash.oid);
    let is_ours = pss.hash.oid == SHA384
        && pss.mask_gen.oid == MGF1
        && mask == Some(SHA384)
        && pss.salt_len == 48;
    is_ours.then_some(()).ok_or(X509Error::Algorithm)
}
