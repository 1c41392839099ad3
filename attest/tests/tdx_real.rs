//! Quotes of TDX hardware, as they ship with the crate `dcap-qvl`, under Intel's root.
#![cfg(feature = "tdx")]

use kvm_ops_attest::tdx::{CHECKS, Evidence, Expected, Root, Verified, verify};
use kvm_ops_attest::{Outcome, Waivers};

struct Sample {
    quote: &'static [u8],
    collateral: &'static [u8],
    /// A time at which all of the collateral is valid, in seconds of Unix time.
    now: u64,
    status: &'static str,
    version: u16,
}

macro_rules! sample {
    ($name:literal, $now:expr, $status:literal, $version:literal) => {
        Sample {
            quote: include_bytes!(concat!("data/", $name, ".bin")),
            collateral: include_bytes!(concat!("data/", $name, "_collateral.json")),
            now: $now,
            status: $status,
            version: $version,
        }
    };
}

/// At 2025-06-20 and 2026-10-09.
fn samples() -> [Sample; 2] {
    [
        sample!("tdx_quote", 1_750_377_600, "UpToDate", 4),
        sample!("tdx_quote_td15ex", 1_791_504_000, "UpToDate", 5),
    ]
}

fn none() -> Waivers {
    Waivers::none()
}

fn with(quote: &[u8], collateral: &[u8], now: u64) -> Verified {
    let evidence = Evidence {
        quote,
        collateral,
        event_log: None,
    };
    let root = Root::intel().unwrap();
    verify(&evidence, &root, &Expected::default(), &none(), now)
}

#[test]
fn the_samples_are_authentic_under_intels_root_and_have_their_status() {
    for sample in samples() {
        let verified = with(sample.quote, sample.collateral, sample.now);
        let rows: Vec<_> = verified
            .verdict
            .rows()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(verified.verdict.is_authentic(), "{}", rows.join("\n"));
        let row = |name| verified.verdict.row(name).unwrap();
        assert_eq!(row("tcb-status").note, sample.status);
        assert_eq!(row("root").note, "Intel's SGX Root CA");
        assert_eq!(row("tcb-status").outcome, Outcome::Passed);
        assert_eq!(verified.quote.unwrap().version, sample.version);
        assert!(!verified.verdict.is_accepted());
    }
}

#[test]
fn a_quote_whose_values_are_all_expected_is_accepted() {
    let [sample, ..] = samples();
    let report = with(sample.quote, sample.collateral, sample.now)
        .quote
        .unwrap()
        .report;
    let expected = Expected {
        mrtd: Some(report.mrtd),
        rtmr: report.rtmr.map(Some),
        mr_config_id: Some(report.mr_config_id),
        mr_owner: Some(report.mr_owner),
        mr_owner_config: Some(report.mr_owner_config),
        mr_seam: Some(report.mr_seam),
        attributes: Some(report.attributes),
        xfam: Some(report.xfam),
        report_data: Some(report.report_data),
        fmspc: Some([0xb0, 0xc0, 0x6f, 0, 0, 0]),
        ..Expected::default()
    };
    let evidence = Evidence {
        quote: sample.quote,
        collateral: sample.collateral,
        event_log: None,
    };
    let root = Root::intel().unwrap();
    let verified = verify(&evidence, &root, &expected, &none(), sample.now);
    let rows: Vec<_> = verified
        .verdict
        .rows()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(verified.verdict.is_accepted(), "{}", rows.join("\n"));
    // Every value wrong once: its own row fails, and no other.
    let mut wrong = [1; 48];
    wrong[0] = 7;
    let cases: [(&str, Expected); 14] = [
        (
            "mrtd",
            Expected {
                mrtd: Some(wrong),
                ..expected.clone()
            },
        ),
        ("rtmr0", rtmr(&expected, 0, wrong)),
        ("rtmr1", rtmr(&expected, 1, wrong)),
        ("rtmr2", rtmr(&expected, 2, wrong)),
        ("rtmr3", rtmr(&expected, 3, wrong)),
        (
            "mrconfigid",
            Expected {
                mr_config_id: Some(wrong),
                ..expected.clone()
            },
        ),
        (
            "mrowner",
            Expected {
                mr_owner: Some(wrong),
                ..expected.clone()
            },
        ),
        (
            "mrownerconfig",
            Expected {
                mr_owner_config: Some(wrong),
                ..expected.clone()
            },
        ),
        (
            "mrseam",
            Expected {
                mr_seam: Some(wrong),
                ..expected.clone()
            },
        ),
        (
            "attributes",
            Expected {
                attributes: Some(1),
                ..expected.clone()
            },
        ),
        (
            "xfam",
            Expected {
                xfam: Some(1),
                ..expected.clone()
            },
        ),
        (
            "report-data",
            Expected {
                report_data: Some([9; 64]),
                ..expected.clone()
            },
        ),
        (
            "fmspc",
            Expected {
                fmspc: Some([1; 6]),
                ..expected.clone()
            },
        ),
        (
            "mrtd",
            Expected {
                mrtd: Some([0; 48]),
                ..expected.clone()
            },
        ),
    ];
    for (name, expected) in cases {
        let verified = verify(&evidence, &root, &expected, &none(), sample.now);
        let failed: Vec<_> = verified
            .verdict
            .rows()
            .iter()
            .filter(|row| row.outcome != Outcome::Passed && row.check.name != "event-log")
            .map(|row| row.check.name)
            .collect();
        assert_eq!(failed, [name]);
    }
}

fn rtmr(expected: &Expected, index: usize, value: [u8; 48]) -> Expected {
    let mut changed = expected.clone();
    changed.rtmr[index] = Some(value);
    changed
}

/// Every byte of the quote up to the chain of certificates; the chain is verified as X.509.
#[test]
fn a_quote_with_any_byte_changed_is_refused() {
    let [sample, ..] = samples();
    let chain = sample.quote.windows(5).position(|w| w == b"-----").unwrap();
    let step = if cfg!(debug_assertions) { 7 } else { 1 };
    for at in (0..chain).step_by(step) {
        let mut quote = sample.quote.to_vec();
        quote[at] ^= 1 << (at % 8);
        let verified = with(&quote, sample.collateral, sample.now);
        assert!(!verified.verdict.is_authentic(), "{at:#x}");
    }
    let mut padded = sample.quote.to_vec();
    padded.push(0);
    assert!(
        with(&padded, sample.collateral, sample.now)
            .verdict
            .is_authentic()
    );
    padded.push(1);
    let verified = with(&padded, sample.collateral, sample.now);
    assert_eq!(verified.verdict.first_failure().unwrap().0.name, "form");
}

/// Zeros behind the quote are no part of the signature data, whatever its length says.
#[test]
fn signature_data_that_is_longer_than_its_parts_is_refused() {
    const LENGTH: usize = 48 + 584;
    let [sample, ..] = samples();
    let mut quote = sample.quote.to_vec();
    quote[LENGTH] += 1;
    let verified = with(&quote, sample.collateral, sample.now);
    let (check, why) = verified.verdict.first_failure().unwrap();
    assert_eq!(check.name, "form");
    assert!(why.contains("signature data of 0x10cd bytes"), "{why}");
}

/// Collateral may have a chain, too. The quote's own is verified, as it is the one that is shown.
#[test]
fn a_chain_in_the_collateral_does_not_stand_in_for_the_quotes_own() {
    let [_, sample] = samples();
    assert!(
        sample
            .collateral
            .windows(21)
            .any(|w| w == b"pck_certificate_chain")
    );
    let authority = {
        let mut pem = sample.quote.windows(16).enumerate();
        let mut begins = pem
            .by_ref()
            .filter(|(_, w)| w.starts_with(b"-----BEGIN CERT"));
        begins.nth(1).unwrap().0
    };
    let mut quote = sample.quote.to_vec();
    // In the signature of the PCK's authority: another character of base64.
    let at = authority + 800;
    quote[at] = if quote[at] == b'A' { b'B' } else { b'A' };
    let verified = with(&quote, sample.collateral, sample.now);
    assert_eq!(
        verified.verdict.first_failure().unwrap().0.name,
        "authentic"
    );
}

#[test]
fn a_platform_below_every_tcb_level_is_refused() {
    // 2026-02-19
    let old = sample!("tdx_quote_outdated", 1_771_459_200, "", 4);
    let verified = with(old.quote, old.collateral, old.now);
    let (check, why) = verified.verdict.first_failure().unwrap();
    assert_eq!(
        (check.name, why),
        ("authentic", "No matching TCB level found")
    );
}

#[test]
fn collateral_that_is_changed_expired_or_of_another_platform_is_refused() {
    let [sample, ..] = samples();
    let failed = |collateral: &[u8], now| {
        let verified = with(sample.quote, collateral, now);
        verified
            .verdict
            .first_failure()
            .map(|(check, _)| check.name)
    };
    assert_eq!(failed(sample.collateral, sample.now), None);
    assert_eq!(
        failed(sample.collateral, sample.now + 90 * 86400),
        Some("authentic")
    );
    assert_eq!(failed(b"{}", sample.now), Some("collateral"));
    assert_eq!(failed(&vec![b' '; 3 << 20], sample.now), Some("collateral"));
    assert_eq!(
        failed(&b"[".repeat(100_000), sample.now),
        Some("collateral")
    );
    let text = std::str::from_utf8(sample.collateral).unwrap();
    for (from, to) in [
        ("\\\"svn\\\":2", "\\\"svn\\\":0"),
        ("UpToDate", "upToDate"),
        (
            "\"qe_identity_signature\": \"d6d7",
            "\"qe_identity_signature\": \"d6d8",
        ),
        (
            "\"tcb_info_signature\": \"027e",
            "\"tcb_info_signature\": \"037e",
        ),
    ] {
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        assert_eq!(
            failed(changed.as_bytes(), sample.now),
            Some("authentic"),
            "{from}"
        );
    }
}

#[test]
fn without_intels_root_nothing_of_intel_is_believed() {
    let [sample, ..] = samples();
    let evidence = Evidence {
        quote: sample.quote,
        collateral: sample.collateral,
        event_log: None,
    };
    let root = Root::software().unwrap();
    let verified = verify(&evidence, &root, &Expected::default(), &none(), sample.now);
    assert_eq!(verified.verdict.first_failure().unwrap().0.name, "root");
    assert!(!verified.verdict.is_authentic());
}

/// The root here is the one that `dcap-qvl` has from Intel.
#[test]
fn the_built_in_root_is_that_of_dcap_qvl() {
    use dcap_qvl::verify::QuoteVerifier;
    let [sample, ..] = samples();
    let collateral: dcap_qvl::QuoteCollateralV3 =
        serde_json::from_slice(sample.collateral).unwrap();
    let ours = Root::intel().unwrap().certificate().as_der().to_vec();
    for verifier in [QuoteVerifier::new_prod(), QuoteVerifier::new(ours)] {
        let theirs = verifier
            .verify(sample.quote, &collateral, sample.now)
            .unwrap();
        assert_eq!(theirs.status, "UpToDate");
    }
}

#[test]
fn what_is_no_quote_has_a_row() {
    let [sample, ..] = samples();
    let mut sgx = sample.quote.to_vec();
    sgx[4] = 0;
    let mut huge = sample.quote.to_vec();
    huge[48 + 584..48 + 588].copy_from_slice(&[0xff; 4]);
    for bad in [
        Vec::new(),
        vec![0; 48],
        sample.quote[..700].to_vec(),
        vec![4; 70_000],
        sgx,
        huge,
    ] {
        let verified = with(&bad, sample.collateral, sample.now);
        assert_eq!(verified.verdict.first_failure().unwrap().0.name, "form");
        let last = verified.verdict.rows().last().unwrap();
        assert_eq!(
            (CHECKS[21].name, &last.outcome),
            ("fmspc", &Outcome::NotMade)
        );
    }
}
