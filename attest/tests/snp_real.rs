//! Evidence of AMD hardware, as it ships with the crate `sev`, under AMD's roots.
#![cfg(feature = "snp")]

mod common;

use common::*;
use kvm_ops_attest::Outcome;
use kvm_ops_attest::snp::{Evidence, Expected, Product, REPORT_LEN, Roots, SIGNED_LEN, Tcb};
use kvm_ops_attest::snp::{Verified, table, verify};
use kvm_ops_attest::x509::{Certificate, bundle};

const REPORT: &[u8] = include_bytes!("data/report_milan.bin");
const VCEK: &[u8] = include_bytes!("data/vcek_milan.der");
const CHAIN: &[u8] = include_bytes!("data/cert_chain_milan.pem");
/// 2026-01-01.
const NOW: u64 = 1_767_225_600;

fn with(report: &[u8], certificates: &[&[u8]], expected: &Expected, waived: &[&str]) -> Verified {
    let evidence = Evidence {
        report,
        certificates,
        crl: None,
    };
    verify(&evidence, &Roots::amd(), expected, &waive(waived), NOW)
}

#[test]
fn the_milan_report_is_accepted_when_everything_is_expected_and_revocation_waived() {
    let report = kvm_ops_attest::snp::Report::from_bytes(REPORT).unwrap();
    let expected = Expected {
        measurement: Some(report.measurement),
        report_data: Some(report.report_data),
        host_data: Some(report.host_data),
        vmpl: Some(0),
        policy: Some(0x30000),
        tcb: Some(Tcb::parse("boot-loader=3,snp=8,microcode=115").unwrap()),
        chip_id: Some(report.chip_id),
        ..Expected::default()
    };
    let verified = with(REPORT, &[VCEK, CHAIN], &expected, &["revocation"]);
    assert_accepted(&verified.verdict);
    assert_eq!(verified.product, Some(Product::Milan));
    assert_eq!(
        verified.verdict.row("root").unwrap().note,
        "AMD's ARK-Milan"
    );
    // Nothing waived and nothing expected: authentic, and still not accepted.
    let verified = with(REPORT, &[VCEK, CHAIN], &Expected::default(), &[]);
    assert!(verified.verdict.is_authentic() && !verified.verdict.is_accepted());
    let open: Vec<_> = verified.verdict.open().map(|check| check.name).collect();
    let needed = "revocation policy vmpl measurement host-data report-data tcb chip-id";
    assert_eq!(open.join(" "), needed);
}

#[test]
fn a_chain_verifies_from_der_from_pem_from_a_table_and_without_the_root() {
    let all = bundle(CHAIN).unwrap();
    let (ask, ark) = (all[0].as_der(), all[1].as_der());
    let vcek = Certificate::from_der(VCEK).unwrap().to_pem();
    let entries = [
        (table::EntryKind::Ark, ark),
        (table::EntryKind::Vcek, VCEK),
        (table::EntryKind::Ask, ask),
    ];
    let as_table = table::write(&entries);
    let joined = [VCEK, ask, ark].concat();
    let forms: [&[&[u8]]; 5] = [
        &[VCEK, ask],
        &[ark, ask, vcek.as_bytes()],
        &[CHAIN, VCEK],
        &[&as_table],
        &[&joined],
    ];
    for files in forms {
        let verified = with(REPORT, files, &Expected::default(), &[]);
        assert!(verified.verdict.is_authentic(), "{:?}", verified.verdict);
    }
}

/// Every byte of the report that is not R or S matters, and each of their bits does.
#[test]
fn a_report_with_any_byte_changed_is_refused() {
    let all = bundle(CHAIN).unwrap();
    for at in 0..REPORT_LEN {
        let mut report = REPORT.to_vec();
        report[at] ^= 1 << (at % 8);
        let verified = with(&report, &[VCEK, all[0].as_der()], &Expected::default(), &[]);
        assert!(!verified.verdict.is_authentic(), "{at:#x}");
    }
}

#[test]
fn the_other_signature_of_the_same_report_verifies_too() {
    let mut report = REPORT.to_vec();
    negate_s(&mut report);
    assert_ne!(report, REPORT);
    let verified = with(&report, &[VCEK, CHAIN], &Expected::default(), &[]);
    assert!(verified.verdict.is_authentic());
}

#[test]
fn reserved_bytes_of_the_signature_field_must_be_zero() {
    for at in [
        SIGNED_LEN + 48,
        SIGNED_LEN + 120,
        SIGNED_LEN + 144,
        REPORT_LEN - 1,
    ] {
        let mut report = REPORT.to_vec();
        report[at] = 1;
        let verified = with(&report, &[VCEK, CHAIN], &Expected::default(), &[]);
        let (check, why) = verified.verdict.first_failure().unwrap();
        assert_eq!(
            (check.name, why.contains(&format!("{at:#x}"))),
            ("reserved", true)
        );
        assert_eq!(
            verified.verdict.row("signature").unwrap().outcome,
            Outcome::Passed
        );
    }
}

#[test]
fn each_expectation_that_differs_fails_its_own_row() {
    let wrong = Expected {
        measurement: Some([1; 48]),
        report_data: Some([1; 64]),
        host_data: Some([1; 32]),
        vmpl: Some(1),
        policy: Some(0x30001),
        tcb: Some(Tcb::parse("microcode=116").unwrap()),
        chip_id: Some([1; 64]),
        id_key: Some([1; 48]),
        author_key: Some([1; 48]),
        guest_svn: Some(1),
    };
    let verified = with(REPORT, &[VCEK, CHAIN], &wrong, &[]);
    let failed: Vec<_> = verified
        .verdict
        .rows()
        .iter()
        .filter(|row| matches!(row.outcome, Outcome::Failed(_)))
        .map(|row| row.check.name)
        .collect();
    let all =
        "policy vmpl measurement host-data report-data tcb chip-id id-key author-key guest-svn";
    assert_eq!(failed.join(" "), all);
}

#[test]
fn a_key_of_another_product_or_time_is_told() {
    let turin: &[u8] = include_bytes!("data/vcek_turin.der");
    let turin_chain: &[u8] = include_bytes!("data/cert_chain_turin.pem");
    let verified = with(REPORT, &[turin, turin_chain], &Expected::default(), &[]);
    let outcome = |name| verified.verdict.row(name).unwrap().outcome.word();
    // The chain of Turin is good, and is not this report's.
    for name in ["root", "ask", "key", "product"] {
        assert_eq!(outcome(name), "passed", "{name}");
    }
    for name in ["signature", "key-tcb", "key-chip"] {
        assert_eq!(outcome(name), "failed", "{name}");
    }
    assert_eq!(
        verified.verdict.row("root").unwrap().note,
        "AMD's ARK-Turin"
    );
    let late = Evidence {
        report: REPORT,
        certificates: &[VCEK, CHAIN],
        crl: None,
    };
    let verified = verify(
        &late,
        &Roots::amd(),
        &Expected::default(),
        &waive(&[]),
        u64::MAX,
    );
    assert_eq!(verified.verdict.first_failure().unwrap().0.name, "validity");
}

#[test]
fn without_amds_roots_nothing_of_amd_is_believed() {
    let evidence = Evidence {
        report: REPORT,
        certificates: &[VCEK, CHAIN],
        crl: None,
    };
    for roots in [Roots::none(), Roots::software()] {
        let verified = verify(&evidence, &roots, &Expected::default(), &waive(&[]), NOW);
        assert_eq!(verified.verdict.first_failure().unwrap().0.name, "root");
        assert_eq!(
            verified.verdict.row("ask").unwrap().outcome,
            Outcome::NotMade
        );
    }
}

/// The roots here are those of the crate `sev`, which has them from AMD.
#[test]
fn the_built_in_roots_are_those_of_the_crate_sev() {
    use sev::certs::snp::builtin::{genoa, milan, turin};
    let theirs = [milan::ark(), genoa::ark(), turin::ark()];
    for (root, theirs) in Roots::amd().all().iter().zip(theirs) {
        let theirs = Certificate::from_der(&theirs.unwrap().to_der().unwrap()).unwrap();
        assert_eq!(root.key(), theirs.key());
    }
    assert_eq!(Roots::amd().all().len(), 3);
}
