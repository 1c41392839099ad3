//! Roots of trust.

use crate::x509::{Certificate, X509Error};

const INTEL: &[u8] = include_bytes!("../../roots/intel-sgx-root-ca.der");
/// Certificate of the software platform's root. Its private key follows from a published text.
const SOFTWARE_ROOT: &[u8] = include_bytes!("../../roots/software-sgx-root-ca.der");

const SOFTWARE: &str = "the root of the software platform: its private key is public, \
                        and the evidence proves nothing about hardware";

/// A root that the caller trusts.
#[derive(Clone, Debug)]
pub struct Root {
    name: String,
    certificate: Certificate,
}

impl Root {
    /// Intel's root for SGX and TDX.
    pub fn intel() -> Result<Self, X509Error> {
        Ok(Self {
            name: "Intel's SGX Root CA".into(),
            certificate: Certificate::from_der(INTEL)?,
        })
    }

    /// The software platform's, whose private key is public.
    pub fn software() -> Result<Self, X509Error> {
        Ok(Self {
            name: SOFTWARE.into(),
            certificate: Certificate::from_der(SOFTWARE_ROOT)?,
        })
    }

    /// The key of a certificate. The software platform's root is called so even then.
    pub fn given(certificate: Certificate) -> Self {
        let name = match is_software(&certificate) {
            true => SOFTWARE.into(),
            false => format!("{}, as given", certificate.subject()),
        };
        Self { name, certificate }
    }

    /// The root's name in a verdict.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The certificate.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// Returns true for the software platform's root, which vouches for no hardware.
    pub fn is_software(&self) -> bool {
        is_software(&self.certificate)
    }
}

pub(super) fn is_software(certificate: &Certificate) -> bool {
    Certificate::from_der(SOFTWARE_ROOT).is_ok_and(|root| root.key() == certificate.key())
}
