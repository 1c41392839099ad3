//! Reports of SNP guests and their chains.

use std::num::NonZeroUsize;

use super::fields::{Field, of_certificate, starts};
use super::{Fate, FlipError, Line, Piece, authentic, flip};
use crate::row::Waivers;
use crate::snp::{self, Evidence, Expected, REPORT_LEN, Roots, SIGNED_LEN};

/// The reason for bits of the root's certificate that change nothing.
const ROOT: &str = "not used: the chain holds without the root's certificate, by the trusted key";

/// Flips bits of a report and of the certificates of its chain: of each field the first, and every
/// `every`th from there. With 1, every bit.
///
/// # Errors
///
/// [`FlipError::Refused`] if the evidence is not authentic as it is.
pub fn report(
    evidence: &Evidence<'_>,
    roots: &Roots,
    now: u64,
    every: NonZeroUsize,
) -> Result<Vec<Line>, FlipError> {
    let expected = Expected::default();
    let waivers = Waivers::none();
    let verify = |report: &[u8], certificates: &[&[u8]]| {
        let evidence = Evidence {
            report,
            certificates,
            crl: None,
        };
        snp::verify(&evidence, roots, &expected, &waivers, now)
    };
    let verified = verify(evidence.report, evidence.certificates);
    authentic(&verified.verdict)?;
    let refused = |why| FlipError::Refused {
        check: "certificates",
        why,
    };
    // The chain alone, each certificate in DER: the others have no part in the verdict.
    let chain = snp::chain_of(evidence.certificates, evidence.report).map_err(refused)?;
    let ders: Vec<&[u8]> = chain.iter().map(|c| c.as_der()).collect();
    let version = verified.report.map_or(0, |report| report.version);
    let mut pieces = vec![Piece {
        name: "report".into(),
        bytes: evidence.report.to_vec(),
        fields: of_report(version),
        judge: Box::new(|changed| Fate::of(&verify(changed, &ders).verdict)),
    }];
    for (place, certificate) in chain.iter().enumerate() {
        let (ders, verify) = (&ders, &verify);
        pieces.push(Piece {
            name: certificate.subject(),
            bytes: certificate.as_der().to_vec(),
            fields: of_certificate(certificate.as_der()),
            judge: Box::new(move |changed| {
                let mut files = ders.clone();
                files[place] = changed;
                let fate = Fate::of(&verify(evidence.report, &files).verdict);
                fate.or_outside(ROOT, || {
                    files.remove(place);
                    verify(evidence.report, &files).verdict.is_authentic()
                })
            }),
        });
    }
    Ok(flip(&pieces, every))
}

/// The fields of a report of this version (SNP firmware ABI, ATTESTATION_REPORT).
fn of_report(version: u32) -> Vec<Field> {
    let since = |first: u32, name: &'static str| match version >= first {
        true => name,
        false => "reserved",
    };
    starts(
        &[
            (0x000, "VERSION"),
            (0x004, "GUEST_SVN"),
            (0x008, "POLICY"),
            (0x010, "FAMILY_ID"),
            (0x020, "IMAGE_ID"),
            (0x030, "VMPL"),
            (0x034, "SIGNATURE_ALGO"),
            (0x038, "CURRENT_TCB"),
            (0x040, "PLATFORM_INFO"),
            (0x048, "SIGNING_KEY, MASK_CHIP_KEY, AUTHOR_KEY_EN"),
            (0x04c, "reserved"),
            (0x050, "REPORT_DATA"),
            (0x090, "MEASUREMENT"),
            (0x0c0, "HOST_DATA"),
            (0x0e0, "ID_KEY_DIGEST"),
            (0x110, "AUTHOR_KEY_DIGEST"),
            (0x140, "REPORT_ID"),
            (0x160, "REPORT_ID_MA"),
            (0x180, "REPORTED_TCB"),
            (0x188, since(3, "CPUID_FAM_ID, CPUID_MOD_ID, CPUID_STEP")),
            (0x18b, "reserved"),
            (0x1a0, "CHIP_ID"),
            (0x1e0, "COMMITTED_TCB"),
            (0x1e8, "CURRENT_BUILD, CURRENT_MINOR, CURRENT_MAJOR"),
            (0x1eb, "reserved"),
            (0x1ec, "COMMITTED_BUILD, COMMITTED_MINOR, COMMITTED_MAJOR"),
            (0x1ef, "reserved"),
            (0x1f0, "LAUNCH_TCB"),
            (0x1f8, since(5, "LAUNCH_MIT_VECTOR")),
            (0x200, since(5, "CURRENT_MIT_VECTOR")),
            (0x208, "reserved"),
            (SIGNED_LEN, "SIGNATURE: R"),
            (SIGNED_LEN + 72, "SIGNATURE: S"),
            (SIGNED_LEN + 144, "SIGNATURE: reserved"),
        ],
        REPORT_LEN,
    )
}
