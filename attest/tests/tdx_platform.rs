//! Quotes of the software platform: accepted here and by the crate `dcap-qvl` unmodified, given its
//! root, and by nothing without it.
#![cfg(all(feature = "tdx", feature = "software"))]

use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::verify::QuoteVerifier;
use kvm_ops_attest::software::{
    Collateral, Pcs, Platform, QuoteFormat, QuotingError, QuotingService, TD_REPORT_LEN,
};
use kvm_ops_attest::tdx::{Evidence, Expected, Root, Verified, verify};
use kvm_ops_attest::{Outcome, Waivers};
use sha2::{Digest, Sha384};

/// 2026-01-01.
const NOW: u64 = 1_767_225_600;
/// Of the TDX module: version 1.5.
const TEE_TCB_SVN: [u8; 16] = [5, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// SEPT_VE_DISABLE.
const ATTRIBUTES: u64 = 1 << 28;

/// A report of a TD, with its hashes; the MAC is the number 7.
fn report() -> Box<[u8; TD_REPORT_LEN]> {
    let mut report = Box::new([0; TD_REPORT_LEN]);
    report[0] = 0x81;
    report[128..192].fill(0xda);
    report[256 + 8..256 + 24].copy_from_slice(&TEE_TCB_SVN);
    report[256 + 24..256 + 72].fill(0x5e);
    report[256 + 128..256 + 144].copy_from_slice(&TEE_TCB_SVN);
    report[512..520].copy_from_slice(&ATTRIBUTES.to_le_bytes());
    report[520..528].copy_from_slice(&0x3_u64.to_le_bytes());
    for (n, digest) in report[528..912].chunks_exact_mut(48).enumerate() {
        digest.fill(0x10 + n as u8);
    }
    hashed(report)
}

fn hashed(mut report: Box<[u8; TD_REPORT_LEN]>) -> Box<[u8; TD_REPORT_LEN]> {
    let (tcb, info) = (
        Sha384::digest(&report[256..495]),
        Sha384::digest(&report[512..]),
    );
    report[32..80].copy_from_slice(&tcb);
    report[80..128].copy_from_slice(&info);
    report[224..256].fill(7);
    report
}

fn mac(report: &[u8; TD_REPORT_LEN]) -> bool {
    report[224..256] == [7; 32]
}

fn service() -> QuotingService {
    QuotingService::new([1; 32]).unwrap()
}

fn collateral(says: &Collateral) -> String {
    Pcs.collateral(&Platform::default(), says)
        .unwrap()
        .to_string()
}

fn current() -> Collateral {
    Collateral::new(&Platform::default(), TEE_TCB_SVN)
}

fn ours(quote: &[u8], collateral: &str, root: &Root) -> Verified {
    let evidence = Evidence {
        quote,
        collateral: collateral.as_bytes(),
        event_log: None,
    };
    verify(&evidence, root, &Expected::default(), &Waivers::none(), NOW)
}

fn theirs(quote: &[u8], collateral: &str) -> Result<dcap_qvl::verify::VerifiedReport, String> {
    let collateral: QuoteCollateralV3 = serde_json::from_str(collateral).unwrap();
    let root = Root::software().unwrap().certificate().as_der().to_vec();
    QuoteVerifier::new(root)
        .verify(quote, &collateral, NOW)
        .map_err(|error| format!("{error:#}"))
}

#[test]
fn the_root_in_the_repository_is_the_services() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/roots/software-sgx-root-ca.der"
    );
    let root = Pcs.root().unwrap();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, root.as_der()).unwrap();
    }
    assert_eq!(std::fs::read(path).unwrap(), root.as_der());
    assert_eq!(Root::software().unwrap().certificate(), &root);
    assert!(Root::given(root).is_software());
}

#[test]
fn both_formats_are_accepted_here_and_by_dcap_qvl_under_the_software_root_alone() {
    let collateral = collateral(&current());
    for format in [QuoteFormat::V4, QuoteFormat::V5] {
        let quote = service().quote(&report()[..], &mac, format).unwrap();
        let verified = ours(&quote, &collateral, &Root::software().unwrap());
        let rows: Vec<_> = verified
            .verdict
            .rows()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(verified.verdict.is_authentic(), "{}", rows.join("\n"));
        assert_eq!(verified.verdict.first_failure(), None);
        let note = &verified.verdict.row("root").unwrap().note;
        assert!(note.contains("its private key is public"), "{note}");
        let says = verified.quote.unwrap().report;
        assert_eq!((says.attributes, says.xfam), (ATTRIBUTES, 3));
        assert_eq!((says.mrtd, says.rtmr[3]), ([0x10; 48], [0x17; 48]));
        assert_eq!((says.mr_seam, says.report_data), ([0x5e; 48], [0xda; 64]));
        assert_eq!(says.mr_service_td.is_some(), format == QuoteFormat::V5);

        let report = theirs(&quote, &collateral).unwrap();
        assert_eq!(
            (report.status.as_str(), report.advisory_ids.len()),
            ("UpToDate", 0)
        );
        let verified = ours(&quote, &collateral, &Root::intel().unwrap());
        let (check, why) = verified.verdict.first_failure().unwrap();
        assert_eq!(check.name, "root");
        assert!(
            why.contains("software platform, whose private key is public"),
            "{why}"
        );
        let json: QuoteCollateralV3 = serde_json::from_str(&collateral).unwrap();
        assert!(
            QuoteVerifier::new_prod()
                .verify(&quote, &json, NOW)
                .is_err()
        );
    }
}

#[test]
fn only_reports_of_the_platform_are_quoted() {
    let service = service();
    let quote = |report: &[u8]| service.quote(report, &mac, QuoteFormat::V4);
    assert!(quote(&report()[..]).is_ok());
    assert!(matches!(quote(&report()[1..]), Err(QuotingError::Form(_))));
    let mut sgx = report();
    sgx[0] = 0;
    assert!(matches!(quote(&sgx[..]), Err(QuotingError::Form(_))));
    // MAC, the part that it covers through the hashes, and the hashes.
    for at in [255, 256, 494, 512, 1023, 32, 127] {
        let mut changed = report();
        changed[at] ^= 1;
        assert!(
            matches!(quote(&changed[..]), Err(QuotingError::Mac)),
            "{at}"
        );
    }
}

#[test]
fn collateral_says_how_old_and_how_good_a_platform_is() {
    let quote = service()
        .quote(&report()[..], &mac, QuoteFormat::V5)
        .unwrap();
    let root = Root::software().unwrap();
    let mut older = current();
    older.levels[0].tee_tcb_svn[2] += 1;
    let json = collateral(&older);
    let verified = ours(&quote, &json, &root);
    assert!(verified.verdict.is_authentic());
    assert_eq!(
        verified.verdict.row("tcb-status").unwrap().note,
        "OutOfDate"
    );
    let row = verified.verdict.row("advisories").unwrap();
    assert_eq!(
        row.outcome,
        Outcome::Failed("not accepted are SOFTWARE-SA-00001".into())
    );
    assert_eq!(theirs(&quote, &json).unwrap().status, "OutOfDate");

    let mut revoked = current();
    revoked.levels[0].status = "Revoked".into();
    let mut ca = current();
    ca.revoked_ca = true;
    let mut pck = current();
    pck.revoked_pck = true;
    let mut expired = current();
    expired.validity = (NOW - 20, NOW - 10);
    let mut newer = current();
    newer.levels.truncate(1);
    newer.levels[0].cpu_svn[0] += 1;
    let mut early = current();
    early.validity = (NOW + 10, NOW + 20);
    for (case, says) in [revoked, ca, pck, expired, newer, early].iter().enumerate() {
        let json = collateral(says);
        let verified = ours(&quote, &json, &root);
        assert_eq!(
            verified.verdict.first_failure().unwrap().0.name,
            "authentic",
            "{case}"
        );
        assert!(theirs(&quote, &json).is_err(), "{case}");
    }
    let other = Platform {
        fmspc: [1; 6],
        ..Platform::default()
    };
    let json = Pcs.collateral(&other, &current()).unwrap().to_string();
    let verified = ours(&quote, &json, &root);
    assert_eq!(
        verified.verdict.first_failure().unwrap().0.name,
        "authentic"
    );
}

#[test]
fn an_old_tcb_and_its_advisories_are_accepted_only_by_name() {
    let quote = service()
        .quote(&report()[..], &mac, QuoteFormat::V4)
        .unwrap();
    let mut older = current();
    older.levels[0].tee_tcb_svn[2] += 1;
    older.levels[1].advisories = vec!["SA-1".into(), "SA-2".into()];
    let json = collateral(&older);
    let evidence = Evidence {
        quote: &quote,
        collateral: json.as_bytes(),
        event_log: None,
    };
    let root = Root::software().unwrap();
    let with = |statuses: &[&str], advisories: &[&str]| {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let expected = Expected {
            tcb_statuses: own(statuses),
            advisories: own(advisories),
            ..Expected::default()
        };
        let verified = verify(&evidence, &root, &expected, &Waivers::none(), NOW);
        ["tcb-status", "advisories"].map(|name| verified.verdict.row(name).unwrap().outcome.word())
    };
    assert_eq!(with(&[], &[]), ["failed", "failed"]);
    assert_eq!(with(&["OutOfDate"], &["SA-1"]), ["passed", "failed"]);
    assert_eq!(
        with(&["ConfigurationNeeded"], &["SA-1", "SA-2"]),
        ["failed", "passed"]
    );
    assert_eq!(
        with(&["OutOfDate"], &["SA-2", "SA-1"]),
        ["passed", "passed"]
    );
}

#[test]
fn a_td_under_debug_and_one_with_service_tds_have_their_rows() {
    let json = collateral(&current());
    let root = Root::software().unwrap();
    let mut debug = report();
    debug[512] |= 1;
    let mut bound = report();
    bound[512 + 400] = 1;
    for (report, name) in [(debug, "debugging"), (bound, "service-td")] {
        let report = hashed(report);
        let quote = service().quote(&report[..], &mac, QuoteFormat::V5).unwrap();
        let verified = ours(&quote, &json, &root);
        assert_eq!(verified.verdict.first_failure().unwrap().0.name, name);
        assert!(verified.verdict.is_authentic());
    }
}

/// Every bit of both formats: refused, or told why it may differ. What may differ is the text
/// around the certificates and what of them `dcap-qvl` does not use, the root's own.
#[test]
fn every_bit_before_the_chain_of_certificates_matters() {
    let json = collateral(&current());
    let root = Root::software().unwrap();
    for format in [QuoteFormat::V4, QuoteFormat::V5] {
        let quote = service().quote(&report()[..], &mac, format).unwrap();
        let chain = quote.windows(5).position(|w| w == b"-----").unwrap();
        let step = if cfg!(debug_assertions) { 37 } else { 1 };
        for bit in (0..chain * 8).step_by(step) {
            let mut changed = quote.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let verified = ours(&changed, &json, &root);
            assert!(!verified.verdict.is_authentic(), "{format:?} bit {bit:#x}");
        }
    }
}
