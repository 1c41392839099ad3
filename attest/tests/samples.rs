//! Evidence for the tests of verifiers: each sample fails at the check that it names, here, and the
//! good ones nowhere.
#![cfg(all(feature = "snp", feature = "tdx", feature = "software"))]

use std::collections::BTreeSet;

use kvm_ops_attest::software::samples::Sample;
use kvm_ops_attest::software::samples::{
    TIME, expected_of_quotes, expected_of_report, quotes, reports,
};
use kvm_ops_attest::{Check, Verdict, Waivers, Weight, snp, tdx};

/// Checks of quotes that no sample fails first: collateral is never cut, the root is that of all, and
/// advisories come with a TCB status that fails before them.
const UNMET: [&str; 3] = ["collateral", "root", "advisories"];

fn failure(verdict: &Verdict) -> Option<&'static str> {
    let first = verdict.first_failure().map(|(check, _)| check.name);
    assert_eq!(first.is_none(), verdict.is_accepted(), "{verdict:?}");
    first
}

/// Every check but the optional ones has a sample that fails it first.
fn assert_covered(checks: &[Check], samples: &[Sample]) {
    let fails: BTreeSet<_> = samples.iter().filter_map(|sample| sample.fails).collect();
    let uncovered = |check: &&Check| !fails.contains(check.name);
    let left: Vec<_> = checks.iter().filter(uncovered).collect();
    assert!(
        left.iter().all(|check| check.weight == Weight::Optional),
        "{left:?}"
    );
}

#[test]
fn each_report_fails_where_it_says() {
    let roots = snp::Roots::software();
    let samples = reports().unwrap();
    for sample in &samples {
        let evidence = snp::Evidence {
            report: sample.file("report.bin"),
            certificates: &[sample.file("cert_chain.pem")],
            crl: Some(sample.file("crl.der")),
        };
        let expected = expected_of_report(sample);
        let verified = snp::verify(&evidence, &roots, &expected, &Waivers::none(), TIME);
        assert_eq!(failure(&verified.verdict), sample.fails, "{}", sample.name);
    }
    let bad = samples
        .iter()
        .filter(|sample| sample.fails.is_some())
        .count();
    assert!(bad >= 30, "{bad}");
    assert_covered(&snp::CHECKS, &samples);
}

#[test]
fn each_quote_fails_where_it_says() {
    let root = tdx::Root::software().unwrap();
    let expected = expected_of_quotes();
    let samples = quotes().unwrap();
    for sample in &samples {
        let evidence = tdx::Evidence {
            quote: sample.file("quote.bin"),
            collateral: sample.file("collateral.json"),
            event_log: Some(sample.file("event_log.bin")),
        };
        let verified = tdx::verify(&evidence, &root, &expected, &Waivers::none(), TIME);
        assert_eq!(failure(&verified.verdict), sample.fails, "{}", sample.name);
    }
    let others: Vec<Check> = tdx::CHECKS
        .into_iter()
        .filter(|check| !UNMET.contains(&check.name))
        .collect();
    assert_covered(&others, &samples);
}
