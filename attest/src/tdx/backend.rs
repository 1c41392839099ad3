//! The back end of `dcap-qvl`: its own parsers, and the hashes and curve of this workspace.

use std::cell::RefCell;
use std::collections::HashSet;
use std::marker::PhantomData;

use dcap_qvl::config::{Config, CryptoProvider};
use dcap_qvl::signature::DerSigEncoder;
use dcap_qvl::x509::X509CertBackend;
use p256::ecdsa::signature::Verifier;
use p256::ecdsa::{DerSignature, VerifyingKey};
use rustls_pki_types::{
    AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm, alg_id,
};
use sha2::{Digest, Sha256, Sha384};

/// The back end with a way to verify signatures.
pub(crate) struct Using<A>(PhantomData<A>);

/// Verifies each signature.
pub(super) type Backend = Using<EcdsaP256>;

/// The same for many verifications of evidence that differs in one place: a signature that has verified
/// on this thread is not computed again.
pub(crate) type Remembering = Using<Remembered>;

/// A way to verify signatures, without state.
pub(crate) trait Algorithm: SignatureVerificationAlgorithm + Sized + 'static {
    const ALGORITHM: &'static Self;
}

impl<A: Algorithm> Config for Using<A> {
    type X509 = X509CertBackend;
    type SigEncoder = DerSigEncoder;
    type Crypto = Self;
}

impl<A: Algorithm> CryptoProvider for Using<A> {
    fn sig_algo() -> &'static dyn SignatureVerificationAlgorithm {
        A::ALGORITHM
    }

    fn sha256(data: &[u8]) -> [u8; 32] {
        Sha256::digest(data).into()
    }

    fn sha384(data: &[u8]) -> [u8; 48] {
        Sha384::digest(data).into()
    }
}

thread_local! {
    /// Hashes of key, message and signature that belong together.
    static VERIFIED: RefCell<HashSet<[u8; 32]>> = RefCell::default();
}

#[derive(Debug)]
pub(crate) struct Remembered;

impl Algorithm for Remembered {
    const ALGORITHM: &'static Self = &Self;
}

impl SignatureVerificationAlgorithm for Remembered {
    fn verify_signature(
        &self,
        public_key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        let parts = [public_key, message, signature].map(Sha256::digest);
        let all: [u8; 32] = Sha256::digest(parts.concat()).into();
        if VERIFIED.with_borrow(|verified| verified.contains(&all)) {
            return Ok(());
        }
        EcdsaP256.verify_signature(public_key, message, signature)?;
        VERIFIED.with_borrow_mut(|verified| verified.insert(all));
        Ok(())
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        EcdsaP256.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        EcdsaP256.signature_alg_id()
    }
}

#[derive(Debug)]
pub(crate) struct EcdsaP256;

impl Algorithm for EcdsaP256 {
    const ALGORITHM: &'static Self = &Self;
}

impl SignatureVerificationAlgorithm for EcdsaP256 {
    fn verify_signature(
        &self,
        public_key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        let key = VerifyingKey::from_sec1_bytes(public_key).map_err(|_| InvalidSignature)?;
        let signature = DerSignature::try_from(signature).map_err(|_| InvalidSignature)?;
        key.verify(message, &signature)
            .map_err(|_| InvalidSignature)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        alg_id::ECDSA_P256
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        alg_id::ECDSA_SHA256
    }
}
