//! Finding the chain among the certificates that came with a report, in whatever order.

use super::table::{self, EntryKind};
use super::{KeyKind, Report, Root, Roots, SigningKey, is_software};
use crate::x509::{Certificate, MAX_BUNDLE, bundle};

/// Most files of certificates that are read.
const MAX_FILES: usize = 8;

/// The certificates from a report's key up, and what else a table holds.
pub(super) struct Chain {
    pub(super) leaf: Certificate,
    /// ASK of a VCEK, ASVK of a VLEK.
    pub(super) ask: Certificate,
    /// The root's certificate, if it came along.
    pub(super) ark: Option<Certificate>,
}

/// Everything that the files hold: certificates, and a revocation list.
pub(super) fn read(files: &[&[u8]]) -> Result<(Vec<Certificate>, Option<Vec<u8>>), String> {
    let mut all = Vec::new();
    let mut crl = None;
    if files.len() > MAX_FILES {
        return Err(format!("more than {MAX_FILES} files of certificates"));
    }
    let read = |bytes: &[u8]| bundle(bytes).map_err(|error| error.to_string());
    for file in files {
        if !table::is_table(file) {
            all.extend(read(file)?);
            continue;
        }
        for (kind, data) in table::read(file)? {
            match kind {
                EntryKind::Crl => crl = Some(data.to_vec()),
                _ if data.len() > MAX_BUNDLE => return Err("a certificate is too long".into()),
                _ => all.extend(read(data)?),
            }
        }
    }
    Ok((all, crl))
}

/// The certificates of the chain of a report's key, from the key up.
pub(crate) fn chain_of(files: &[&[u8]], report: &[u8]) -> Result<Vec<Certificate>, String> {
    let report = Report::from_bytes(report).map_err(|error| error.to_string())?;
    let (all, _) = read(files)?;
    let Chain { leaf, ask, ark } = Chain::find(&all, report.signing_key)?;
    Ok([leaf, ask].into_iter().chain(ark).collect())
}

impl Chain {
    /// Finds the chain of the key that signed. Certificates that are not part of it are passed
    /// over; one that is there twice with other contents is refused.
    pub(super) fn find(all: &[Certificate], signing_key: SigningKey) -> Result<Self, String> {
        let kind = match signing_key {
            SigningKey::Vlek => KeyKind::Vlek,
            _ => KeyKind::Vcek,
        };
        let subject = kind.subject();
        let leaf = one(all, |c| c.subject() == subject)?
            .ok_or_else(|| format!("no certificate of a {subject}"))?;
        let above = |below: &Certificate| {
            one(all, |c| {
                c != below && below.names_issuer(c) && c.is_authority()
            })
        };
        let ask = above(&leaf)?.ok_or_else(|| {
            format!(
                "no certificate of the authority {} that signed it",
                leaf.issuer()
            )
        })?;
        let ark = above(&ask)?;
        Ok(Self { leaf, ask, ark })
    }

    /// The trusted root that the chain ends at: the one whose key signed the ASK.
    pub(super) fn root<'a>(&self, roots: &'a Roots) -> Result<&'a Root, String> {
        if let Some(ark) = &self.ark {
            ark.verify(ark.key())
                .map_err(|error| format!("the ARK is not signed by itself: {error}"))?;
        }
        let is_above = |root: &&Root| match &self.ark {
            Some(ark) => ark.key() == root.key(),
            None => self.ask.verify(root.key()).is_ok(),
        };
        roots.all().iter().find(is_above).ok_or_else(|| {
            let whose = match &self.ark {
                Some(ark) if is_software(ark.key()) => {
                    " of the software platform, whose private key is public,"
                }
                _ => "",
            };
            format!(
                "it ends at {}{whose} which is not trusted",
                self.ask.issuer()
            )
        })
    }
}

/// The certificate with a property. `None` without one; an error if two differ.
fn one(
    all: &[Certificate],
    has: impl Fn(&Certificate) -> bool,
) -> Result<Option<Certificate>, String> {
    let mut found = all.iter().filter(|c| has(c));
    let first = found.next();
    match first {
        Some(first) if found.any(|other| other != first) => {
            Err(format!("two different certificates of {}", first.subject()))
        }
        found => Ok(found.cloned()),
    }
}
