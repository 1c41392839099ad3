//! Roots of trust.

use x509_cert::der::{Decode, Encode};
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use crate::x509::{Certificate, X509Error};

/// Key of the software platform's root. Its private half is published with this crate.
pub(crate) const SOFTWARE_ROOT: &[u8] = include_bytes!("../../roots/software-ark.spki");

const AMD: [(&str, &[u8]); 3] = [
    (
        "AMD's ARK-Milan",
        include_bytes!("../../roots/amd-milan.der"),
    ),
    (
        "AMD's ARK-Genoa",
        include_bytes!("../../roots/amd-genoa.der"),
    ),
    (
        "AMD's ARK-Turin",
        include_bytes!("../../roots/amd-turin.der"),
    ),
];

const SOFTWARE: &str = "the root of the software platform: its private key is public, \
                        and the evidence proves nothing about hardware";

/// A root key.
#[derive(Clone, Debug)]
pub struct Root {
    name: String,
    key: SubjectPublicKeyInfoOwned,
}

impl Root {
    /// The name of the root in a verdict.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key.
    pub fn key(&self) -> &SubjectPublicKeyInfoOwned {
        &self.key
    }

    /// Returns true for the software platform's root, which proves nothing about hardware.
    pub fn is_software(&self) -> bool {
        is_software(&self.key)
    }
}

pub(crate) fn is_software(key: &SubjectPublicKeyInfoOwned) -> bool {
    key.to_der().is_ok_and(|der| der == SOFTWARE_ROOT)
}

/// The roots that a caller trusts.
#[derive(Clone, Debug, Default)]
pub struct Roots(Vec<Root>);

impl Roots {
    /// Trusts nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Trusts AMD's roots for Milan, Genoa and Turin.
    pub fn amd() -> Self {
        let read = |(name, der): (&str, &[u8])| {
            let key = Certificate::from_der(der).ok()?.key().clone();
            let name = name.to_owned();
            Some(Root { name, key })
        };
        Self(AMD.into_iter().filter_map(read).collect())
    }

    /// Trusts the software platform's root, whose private key is public.
    pub fn software() -> Self {
        let key = SubjectPublicKeyInfoOwned::from_der(SOFTWARE_ROOT);
        let root = |key| Root {
            name: SOFTWARE.to_owned(),
            key,
        };
        Self(key.into_iter().map(root).collect())
    }

    /// Trusts the key of a certificate, which must be signed by itself.
    ///
    /// The software platform's root is called so even then.
    pub fn given(certificate: &Certificate) -> Result<Self, X509Error> {
        let key = certificate.key().clone();
        certificate.verify(&key)?;
        let name = match is_software(&key) {
            true => SOFTWARE.to_owned(),
            false => format!("{}, as given", certificate.subject()),
        };
        Ok(Self(vec![Root { name, key }]))
    }

    /// The roots.
    pub fn all(&self) -> &[Root] {
        &self.0
    }
}
