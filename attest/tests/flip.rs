//! Flipped bits of evidence, real and of the software platform. The program flips every bit (`kvm-ops
//! attest flip`); here it is the first bit of each field and every so many from there.
#![cfg(all(feature = "snp", feature = "tdx", feature = "software"))]

use std::num::NonZeroUsize;

use kvm_ops_attest::flip::{self, FlipError, Line};
use kvm_ops_attest::software::samples::{Sample, TIME, quotes, reports};
use kvm_ops_attest::{snp, tdx};

fn every(bits: usize) -> NonZeroUsize {
    NonZeroUsize::new(bits).unwrap()
}

/// No bit is believed but where it is outside of what is signed, and where that may be.
fn assert_holds(lines: &[Line], may_be_outside: impl Fn(&Line) -> bool) {
    let believed: Vec<_> = lines
        .iter()
        .filter(|line| !line.believed.is_empty())
        .collect();
    assert!(believed.is_empty(), "{believed:#?}");
    for line in lines {
        assert!(line.flipped > 0, "{line:?}");
        let counted = line.refused.values().chain(line.outside.values());
        assert_eq!(counted.sum::<usize>(), line.flipped, "{line:?}");
        assert!(line.outside.is_empty() || may_be_outside(line), "{line:?}");
    }
}

/// The fields of each piece cover it without a gap.
fn assert_covers(lines: &[Line], piece: &str, len: usize) {
    let mut end = 0;
    for line in lines.iter().filter(|line| line.piece == piece) {
        assert_eq!(line.at.start, end, "{line:?}");
        end = line.at.end;
    }
    assert_eq!(end, len, "{piece}");
}

fn sample(all: Vec<Sample>, name: &str) -> Sample {
    all.into_iter().find(|sample| sample.name == name).unwrap()
}

/// The root's certificate, whose key is trusted whatever else it says.
fn is_ark(line: &Line) -> bool {
    line.piece.starts_with("ARK-")
}

#[test]
fn no_bit_of_a_report_of_hardware_and_of_its_chain_can_be_flipped() {
    let report = include_bytes!("data/report_milan.bin");
    let evidence = snp::Evidence {
        report,
        certificates: &[
            include_bytes!("data/vcek_milan.der"),
            include_bytes!("data/cert_chain_milan.pem"),
        ],
        crl: None,
    };
    let lines = flip::report(&evidence, &snp::Roots::amd(), TIME, every(401)).unwrap();
    assert_holds(&lines, is_ark);
    assert_covers(&lines, "report", report.len());
    assert_covers(&lines, "SEV-VCEK", 1360);
    let pieces = ["report", "SEV-VCEK", "SEV-Milan", "ARK-Milan"];
    for piece in pieces {
        assert!(lines.iter().any(|line| line.piece == piece), "{piece}");
    }
}

#[test]
fn no_bit_of_a_report_of_the_software_platform_can_be_flipped() {
    let sample = sample(reports().unwrap(), "good-genoa");
    let evidence = snp::Evidence {
        report: sample.file("report.bin"),
        certificates: &[sample.file("cert_chain.pem")],
        crl: None,
    };
    let lines = flip::report(&evidence, &snp::Roots::software(), TIME, every(701)).unwrap();
    assert_holds(&lines, is_ark);
    assert_covers(&lines, "report", sample.file("report.bin").len());
}

/// Text around certificates; the root's certificates of the collateral, in whose place the trusted one
/// is used; and the chain of the PCKs' list, for which dcap-qvl takes the authority in the quote.
fn is_text_or_needless(line: &Line) -> bool {
    let is_root = !line.piece.starts_with("PCK chain: ") && line.piece.ends_with("Root CA");
    line.field == "PCK chain, PEM" || is_root || line.piece.starts_with("PCK list: ")
}

#[test]
fn no_bit_of_quotes_of_hardware_and_of_their_chains_can_be_flipped() {
    let samples: [(&[u8], &[u8], u64); 2] = [
        (
            include_bytes!("data/tdx_quote.bin"),
            include_bytes!("data/tdx_quote_collateral.json"),
            1_750_377_600,
        ),
        (
            include_bytes!("data/tdx_quote_td15ex.bin"),
            include_bytes!("data/tdx_quote_td15ex_collateral.json"),
            1_791_504_000,
        ),
    ];
    for (quote, collateral, now) in samples {
        let evidence = tdx::Evidence {
            quote,
            collateral,
            event_log: None,
        };
        let root = tdx::Root::intel().unwrap();
        let lines = flip::quote(&evidence, &root, now, every(701)).unwrap();
        assert_holds(&lines, is_text_or_needless);
        assert_covers(&lines, "quote", quote.len());
        for piece in ["PCK chain: ", "TCB info: ", "QE identity: ", "PCK list: "] {
            let found = lines.iter().filter(|line| line.piece.starts_with(piece));
            assert!(found.count() > 10, "{piece}");
        }
    }
}

#[test]
fn no_bit_of_a_quote_of_the_software_platform_can_be_flipped() {
    let sample = sample(quotes().unwrap(), "good-v5");
    let evidence = tdx::Evidence {
        quote: sample.file("quote.bin"),
        collateral: sample.file("collateral.json"),
        event_log: None,
    };
    let root = tdx::Root::software().unwrap();
    let lines = flip::quote(&evidence, &root, TIME, every(701)).unwrap();
    assert_holds(&lines, is_text_or_needless);
    assert_covers(&lines, "quote", sample.file("quote.bin").len());
}

#[test]
fn evidence_that_is_refused_as_it_is_is_not_flipped() {
    let sample = sample(reports().unwrap(), "changed");
    let evidence = snp::Evidence {
        report: sample.file("report.bin"),
        certificates: &[sample.file("cert_chain.pem")],
        crl: None,
    };
    let refused = flip::report(&evidence, &snp::Roots::software(), TIME, every(1)).unwrap_err();
    let FlipError::Refused { check, .. } = &refused else {
        unreachable!("{refused}")
    };
    assert_eq!(*check, "signature");
    assert!(refused.to_string().contains("before a bit is flipped"));
}
