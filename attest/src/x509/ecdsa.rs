//! Signatures as Intel makes them: ECDSA on P-256 with SHA-256.

use p256::ecdsa::signature::Verifier;
use p256::ecdsa::{DerSignature, VerifyingKey};
use x509_cert::der::Decode;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::spki::{AlgorithmIdentifierRef, SubjectPublicKeyInfoOwned};

use super::X509Error;
use super::signed::Signed;

const ECDSA_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");

impl Signed<'_> {
    /// Checks the signature. `inner` is the algorithm that the signed part names, in DER.
    pub(super) fn verify_p256(
        &self,
        inner: &[u8],
        signer: &SubjectPublicKeyInfoOwned,
    ) -> Result<(), X509Error> {
        if inner != self.algorithm {
            return Err(X509Error::AlgorithmsDiffer);
        }
        if AlgorithmIdentifierRef::from_der(self.algorithm)?.oid != ECDSA_SHA256 {
            return Err(X509Error::NotP256);
        }
        let key = VerifyingKey::from_sec1_bytes(signer.subject_public_key.raw_bytes())
            .map_err(|_| X509Error::NotP256)?;
        let signature = DerSignature::try_from(self.signature).map_err(|_| X509Error::Signature)?;
        key.verify(self.body, &signature)
            .map_err(|_| X509Error::Signature)
    }
}
