//! The certificates of a software platform's chip, which its host has for SNP guests.

use kvm_ops_attest::snp::table::{self, EntryKind};
use kvm_ops_attest::snp::{Product, Tcb};
use kvm_ops_attest::software::{IssueError, Kds, Revocation, Subject, VekRequest};
use soft_amd_sp::Platform;

use crate::failure::{Failure, Outcome};

/// The certificate table with which reports of the platform's guests are verified: VCEK, ASK, ARK and revocation list, as
/// AMD's key distribution service would give them for the chip.
pub(crate) fn certificates(platform: &Platform) -> Outcome<Vec<u8>> {
    let unknown = || Failure::new("the software AMD SP is of no product with certificates");
    let (family, model, _) = platform.cpuid_fms();
    let product = Product::from_cpuid(family, model).ok_or_else(unknown)?;
    let tcb =
        Tcb::from_bytes(product, platform.reported_tcb().0.to_le_bytes()).ok_or_else(unknown)?;
    let key = platform.cert_chain().vcek.key().ok_or_else(unknown)?;
    let refuse = |error: IssueError| Failure::because("cannot certify the chip's key", error);
    let issue = || -> Result<_, IssueError> {
        let kds = Kds::new(product);
        let chip = Subject::Chip(platform.chip_id());
        let vcek = kds.certify(&VekRequest::new(&key.to_sec1(), tcb, chip))?;
        let crl = kds.crl(&Revocation::default())?;
        Ok((vcek, kds.ask()?, kds.ark()?, crl))
    };
    let (vcek, ask, ark, crl) = issue().map_err(refuse)?;
    Ok(table::write(&[
        (EntryKind::Vcek, vcek.as_der()),
        (EntryKind::Ask, ask.as_der()),
        (EntryKind::Ark, ark.as_der()),
        (EntryKind::Crl, crl.as_der()),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvm_ops_attest::x509::Certificate;

    #[test]
    fn a_table_has_the_chain_of_the_platforms_key() {
        let platform = Platform::builder().build().unwrap();
        let bytes = certificates(&platform).unwrap();
        let entries = table::read(&bytes).unwrap();
        let kinds: Vec<_> = entries.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(
            kinds,
            [
                EntryKind::Vcek,
                EntryKind::Ask,
                EntryKind::Ark,
                EntryKind::Crl
            ]
        );
        let certificate = |n: usize| Certificate::from_der(entries[n].1).unwrap();
        for (subject, issuer) in [(0, 1), (1, 2), (2, 2)] {
            let (subject, issuer) = (certificate(subject), certificate(issuer));
            subject.verify(issuer.key()).unwrap();
        }
    }
}
