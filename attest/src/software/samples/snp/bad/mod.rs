//! Reports of SNP guests that are wrong in one way each.

mod genoa;
mod turin;
mod vlek;

use super::super::super::parts::Result;
use super::super::super::{Kds, Revocation};
use super::making::Making;
use crate::snp::Product;
use crate::x509::Certificate;

pub(super) use genoa::GENOA;
pub(super) use turin::TURIN;
pub(super) use vlek::BY_VLEK;

/// A change to the report before it is signed, or after.
type Change = fn(&mut Making) -> Result<()>;

/// A kind of bad report.
pub(super) struct Bad {
    pub(super) name: &'static str,
    /// The check that fails first.
    pub(super) fails: &'static str,
    pub(super) about: &'static str,
    pub(super) before: Change,
    pub(super) after: Change,
}

/// A fault of what is signed.
const fn signed(
    name: &'static str,
    fails: &'static str,
    about: &'static str,
    before: Change,
) -> Bad {
    Bad {
        name,
        fails,
        about,
        before,
        after: nothing,
    }
}

/// A fault that came after signing.
const fn later(name: &'static str, fails: &'static str, about: &'static str, after: Change) -> Bad {
    Bad {
        name,
        fails,
        about,
        before: nothing,
        after,
    }
}

/// Bytes of the report.
fn put(m: &mut Making, at: usize, bytes: &[u8]) -> Result<()> {
    m.put(at, bytes);
    Ok(())
}

/// The revocation list of a product.
fn list(product: Product, revocation: Revocation) -> Result<Option<Vec<u8>>> {
    let list = Kds::new(product).crl(&revocation)?;
    Ok(Some(list.as_der().to_vec()))
}

fn revoked(certificate: Certificate) -> Revocation {
    Revocation {
        revoked: vec![certificate],
        ..Revocation::default()
    }
}

fn nothing(_: &mut Making) -> Result<()> {
    Ok(())
}
