//! Certificates of keys that sign reports, with AMD's extensions.
//!
//! Source: AMD publication 57230, *Versioned Chip Endorsement Key Certificate and KDS Interface*.

use x509_cert::der::Decode;
use x509_cert::der::asn1::{Ia5StringRef, ObjectIdentifier, OctetStringRef};

use super::{Product, Tcb};
use crate::x509::Certificate;

const fn oid(text: &str) -> ObjectIdentifier {
    ObjectIdentifier::new_unwrap(text)
}

/// Arcs of AMD's extensions.
pub(crate) mod arc {
    use super::{ObjectIdentifier, oid};

    pub(crate) const STRUCTURE_VERSION: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.1");
    pub(crate) const PRODUCT_NAME: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.2");
    pub(crate) const BOOT_LOADER: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.1");
    pub(crate) const TEE: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.2");
    pub(crate) const SNP: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.3");
    pub(crate) const SPL_4: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.4");
    pub(crate) const SPL_5: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.5");
    pub(crate) const SPL_6: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.6");
    pub(crate) const SPL_7: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.7");
    pub(crate) const MICROCODE: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.8");
    pub(crate) const FMC: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.3.9");
    pub(crate) const HWID: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.4");
    pub(crate) const CSP_ID: ObjectIdentifier = oid("1.3.6.1.4.1.3704.1.5");
}

/// Which kind of key a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// Versioned chip endorsement key: of one chip.
    Vcek,
    /// Versioned loaded endorsement key: of one provider.
    Vlek,
}

impl KeyKind {
    /// Common name of its certificates.
    pub const fn subject(self) -> &'static str {
        match self {
            Self::Vcek => "SEV-VCEK",
            Self::Vlek => "SEV-VLEK",
        }
    }
}

/// The contents of a VCEK or VLEK certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endorsement {
    /// The kind of key.
    pub kind: KeyKind,
    /// The product, without its stepping.
    pub product: Product,
    /// The TCB that the key was derived from.
    pub tcb: Tcb,
    /// The chip; of a VCEK only.
    pub hwid: Option<Vec<u8>>,
    /// The provider; of a VLEK only.
    pub csp_id: Option<String>,
}

impl Endorsement {
    /// Reads the extensions, or says what is wrong with them.
    pub fn of(certificate: &Certificate) -> Result<Self, String> {
        let subject = certificate.subject();
        let kind = [KeyKind::Vcek, KeyKind::Vlek]
            .into_iter()
            .find(|kind| kind.subject() == subject)
            .ok_or_else(|| format!("`{subject}` is neither SEV-VCEK nor SEV-VLEK"))?;
        let fields = Fields(certificate);
        if !matches!(fields.number(arc::STRUCTURE_VERSION)?, 0 | 1) {
            return Err("the extensions are of an unknown version".into());
        }
        let name = fields.text(arc::PRODUCT_NAME)?;
        let product = Product::from_name(&name)
            .ok_or_else(|| format!("the product `{name}` is not known"))?;
        for arc in [arc::SPL_4, arc::SPL_5, arc::SPL_6, arc::SPL_7] {
            if fields.optional(arc)?.is_some() && fields.number(arc)? != 0 {
                return Err(format!("the reserved version {arc} is not 0"));
            }
        }
        let fmc = match product {
            Product::Turin => fields.number(arc::FMC)?,
            _ => 0,
        };
        let tcb = Tcb {
            fmc,
            boot_loader: fields.number(arc::BOOT_LOADER)?,
            tee: fields.number(arc::TEE)?,
            snp: fields.number(arc::SNP)?,
            microcode: fields.number(arc::MICROCODE)?,
        };
        let (hwid, csp_id) = match kind {
            KeyKind::Vcek => (Some(fields.hwid(product)?), None),
            KeyKind::Vlek => (None, Some(fields.text(arc::CSP_ID)?)),
        };
        Ok(Self {
            kind,
            product,
            tcb,
            hwid,
            csp_id,
        })
    }
}

/// Extensions by their arcs.
struct Fields<'a>(&'a Certificate);

impl Fields<'_> {
    /// The value of an extension, which may be there once.
    fn optional(&self, arc: ObjectIdentifier) -> Result<Option<&[u8]>, String> {
        let all = &self.0.parsed().tbs_certificate.extensions;
        let mut found = all.iter().flatten().filter(|e| e.extn_id == arc);
        let first = found.next().map(|e| e.extn_value.as_bytes());
        match found.next() {
            Some(_) => Err(format!("the extension {arc} is there twice")),
            None => Ok(first),
        }
    }

    fn value(&self, arc: ObjectIdentifier) -> Result<&[u8], String> {
        self.optional(arc)?
            .ok_or_else(|| format!("the extension {arc} is missing"))
    }

    fn number(&self, arc: ObjectIdentifier) -> Result<u8, String> {
        u8::from_der(self.value(arc)?).map_err(|error| format!("the extension {arc}: {error}"))
    }

    fn text(&self, arc: ObjectIdentifier) -> Result<String, String> {
        let text = Ia5StringRef::from_der(self.value(arc)?);
        text.map(|text| text.as_str().to_owned())
            .map_err(|error| format!("the extension {arc}: {error}"))
    }

    /// Certificates in use have the chip id either bare or as an OCTET STRING.
    fn hwid(&self, product: Product) -> Result<Vec<u8>, String> {
        let value = self.value(arc::HWID)?;
        let bare = match OctetStringRef::from_der(value) {
            Ok(inner) if inner.as_bytes().len() == product.chip_id_len() => inner.as_bytes(),
            _ => value,
        };
        if bare.len() != product.chip_id_len() {
            return Err(format!("a chip id of {:#x} bytes", bare.len()));
        }
        Ok(bare.to_vec())
    }
}
