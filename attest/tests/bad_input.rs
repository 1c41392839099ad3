//! Evidence that is made to cost time or memory: each has a row, soon, and in little memory. One test, so
//! that what it measures is its own.
#![cfg(all(feature = "snp", feature = "tdx", feature = "software"))]

use std::time::{Duration, Instant};

use kvm_ops_attest::snp::Product;
use kvm_ops_attest::snp::table::{self, EntryKind};
use kvm_ops_attest::software::Kds;
use kvm_ops_attest::software::samples::{
    Sample, TIME, expected_of_quotes, expected_of_report, quotes, reports,
};
use kvm_ops_attest::{Verdict, Waivers, snp, tdx};
use serde_json::Value;

/// Many times what a case takes without optimisation, on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);
/// The most memory that all cases together may add, in KiB. The largest input has 16 MiB.
const MOST_MEMORY: u64 = 96 << 10;
const MANY: usize = 10_000;

/// The most memory that this process has had, in KiB; `None` where the system does not tell.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn sample(all: &[Sample], name: &str) -> Sample {
    let found = all.iter().find(|sample| sample.name == name);
    found.expect("a sample").clone()
}

/// The first check that fails, with its reason.
fn refused(name: &str, verify: impl FnOnce() -> Verdict) -> (&'static str, String) {
    let start = Instant::now();
    let verdict = verify();
    assert!(start.elapsed() < LONGEST, "{name}: {:?}", start.elapsed());
    assert!(!verdict.is_accepted(), "{name}");
    let (check, why) = verdict.first_failure().expect("a failure");
    (check.name, why.to_owned())
}

fn report(sample: &Sample, chain: &[u8], crl: &[u8], now: u64) -> Verdict {
    let evidence = snp::Evidence {
        report: sample.file("report.bin"),
        certificates: &[chain],
        crl: Some(crl),
    };
    let expected = expected_of_report(sample);
    let roots = snp::Roots::software();
    snp::verify(&evidence, &roots, &expected, &Waivers::none(), now).verdict
}

fn quote(quote: &[u8], collateral: &[u8], now: u64) -> Verdict {
    let evidence = tdx::Evidence {
        quote,
        collateral,
        event_log: None,
    };
    let root = tdx::Root::software().unwrap();
    tdx::verify(
        &evidence,
        &root,
        &expected_of_quotes(),
        &Waivers::none(),
        now,
    )
    .verdict
}

/// An element of DER that claims a length.
fn claims(length: u32) -> Vec<u8> {
    [&[0x30, 0x84][..], &length.to_be_bytes(), &[0x30; 64]].concat()
}

#[test]
fn input_that_is_made_to_cost_time_or_memory_is_refused_soon() {
    let (reports, quotes) = (reports().unwrap(), quotes().unwrap());
    let before = peak();
    chains(&sample(&reports, "good-genoa"));
    lists_and_dates(&sample(&reports, "good-genoa"));
    quotes_of_any_length(&sample(&quotes, "good-v4"));
    collateral(&sample(&quotes, "good-v4"));
    if let (Some(before), Some(after)) = (before, peak()) {
        assert!(after - before < MOST_MEMORY, "{before} KiB, {after} KiB");
    }
}

fn chains(good: &Sample) {
    let chain = good.file("cert_chain.pem");
    let text = std::str::from_utf8(chain).unwrap();
    let (leaf, _) = text.split_at(text.find("-----END").unwrap() + 26);
    let kds = Kds::new(Product::Genoa);
    let (ask, ark) = (kds.ask().unwrap(), kds.ark().unwrap());
    let [_, forged_ark] = kds.forged().unwrap();
    // The ASK names itself as its issuer; the ASK and the root name each other.
    let issued_by_ask = |der: &[u8]| {
        let at = der.windows(9).position(|w| w == b"ARK-Genoa").unwrap();
        [&der[..at], b"SEV-Genoa", &der[at + 9..]].concat()
    };
    let key = kvm_ops_attest::x509::bundle(leaf.as_bytes())
        .unwrap()
        .remove(0);
    let of_one = [key.as_der(), &issued_by_ask(ask.as_der())].concat();
    let of_two = [key.as_der(), ask.as_der(), &issued_by_ask(ark.as_der())].concat();
    let two_roots = [text, &forged_ark.to_pem()].concat();
    let headers: Vec<_> = (0..MANY).map(|_| (EntryKind::Ark, ark.as_der())).collect();
    let short: Vec<_> = (0..100)
        .map(|_| (EntryKind::Ark, &[0x30_u8, 0][..]))
        .collect();
    let in_table = [(EntryKind::Vcek, &claims(u32::MAX)[..])];
    let cases: [(&str, Vec<u8>, &str); 13] = [
        (
            "10,000 certificates in DER",
            ask.as_der().repeat(MANY),
            "more than the 0x10000",
        ),
        (
            "10,000 certificates in PEM",
            ask.to_pem().repeat(MANY).into_bytes(),
            "more than the 0x10000",
        ),
        (
            "9 certificates",
            ask.to_pem().repeat(9).into_bytes(),
            "more than 8 certificates",
        ),
        ("10,000 empty elements", [0x30, 0].repeat(MANY), "not DER"),
        ("a loop of one", of_one, ""),
        ("a loop of two", of_two, "not signed by itself"),
        (
            "two roots of one name",
            two_roots.into_bytes(),
            "two different certificates",
        ),
        (
            "a table with 10,000 entries",
            table::write(&headers),
            "a table of",
        ),
        ("a table without an end", table::write(&short), "has no end"),
        ("a length of 4 GiB", claims(u32::MAX), "not DER"),
        (
            "a length of 4 GiB in a table",
            table::write(&in_table),
            "not DER",
        ),
        (
            "an indefinite length",
            [&[0x30, 0x80][..], &[0; 64]].concat(),
            "not DER",
        ),
        ("nothing", Vec::new(), "no certificate"),
    ];
    for (name, chain, reason) in cases {
        let verify = || report(good, &chain, good.file("crl.der"), TIME);
        let (check, why) = refused(name, verify);
        // Without a root's certificate the chain ends at the trusted key, and here at none.
        let checks = ["certificates", "root", "ask"];
        assert!(
            checks.contains(&check) && why.contains(reason),
            "{name}: {check}: {why}"
        );
    }
}

fn lists_and_dates(good: &Sample) {
    let chain = good.file("cert_chain.pem");
    for (name, list) in [
        ("a list of 16 MiB", vec![0x30; 16 << 20]),
        ("a list that claims 4 GiB", claims(u32::MAX)),
        (
            "a list that is a certificate",
            Kds::new(Product::Genoa).ark().unwrap().as_der().to_vec(),
        ),
        ("an empty list", Vec::new()),
    ] {
        let (check, why) = refused(name, || report(good, chain, &list, TIME));
        assert_eq!(check, "revocation", "{name}: {why}");
    }
    for now in [0, 1, u64::from(u32::MAX), i64::MAX as u64, u64::MAX] {
        let (check, why) = refused("a time", || report(good, chain, good.file("crl.der"), now));
        assert_eq!(check, "validity");
        assert!(why.contains(&format!("not at {now} (Unix time)")), "{why}");
    }
    // Dates that no calendar has, in the place of those of the first certificate.
    let text = std::str::from_utf8(chain).unwrap();
    let first = kvm_ops_attest::x509::bundle(chain).unwrap().remove(0);
    let rest = &text[text.find("-----END").unwrap() + 26..];
    for date in [
        "999999999999Z",
        "001301000000Z",
        "200230000000Z",
        "20010100000AZ",
        "            Z",
    ] {
        let mut der = first.as_der().to_vec();
        let at = der.windows(2).position(|w| w == [0x17, 13]).unwrap() + 2;
        der[at..at + 13].copy_from_slice(date.as_bytes());
        let files = [&der[..], rest.as_bytes()];
        let evidence = snp::Evidence {
            report: good.file("report.bin"),
            certificates: &files,
            crl: None,
        };
        let (roots, expected) = (snp::Roots::software(), expected_of_report(good));
        let verify = || snp::verify(&evidence, &roots, &expected, &Waivers::none(), TIME).verdict;
        let (check, why) = refused(date, verify);
        assert_eq!(check, "certificates", "{date}: {why}");
    }
}

/// Where the length of the signature data lies in a quote of version 4, and those within it.
const SIGNATURE_LEN: usize = 48 + 584;

fn quotes_of_any_length(good: &Sample) {
    let bytes = good.file("quote.bin");
    let collateral = good.file("collateral.json");
    let chain = bytes.windows(5).position(|w| w == b"-----").unwrap();
    let authentication = SIGNATURE_LEN + 4 + 64 + 64 + 6 + 384 + 64;
    let with = |at: usize, value: &[u8]| {
        let mut changed = bytes.to_vec();
        changed[at..at + value.len()].copy_from_slice(value);
        changed
    };
    let huge = u32::MAX.to_le_bytes();
    let long_chain = {
        let pem = std::str::from_utf8(&bytes[chain..])
            .unwrap()
            .trim_end_matches('\0');
        let count = (60_000 - chain) / pem.len();
        rechained(bytes, chain, &pem.repeat(count))
    };
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("16 MiB", vec![4; 16 << 20], "form"),
        (
            "signature data of 4 GiB",
            with(SIGNATURE_LEN, &huge),
            "form",
        ),
        (
            "certification data of 4 GiB",
            with(SIGNATURE_LEN + 4 + 130, &huge),
            "form",
        ),
        ("a chain of 4 GiB", with(chain - 4, &huge), "form"),
        (
            "authentication data of 64 KiB",
            with(authentication, &[0xff; 2]),
            "form",
        ),
        ("a chain that repeats itself", long_chain, "authentic"),
        (
            "a chain of its root alone",
            rechained(bytes, chain, &last_of(&bytes[chain..])),
            "authentic",
        ),
        (
            "a chain of no certificates",
            rechained(bytes, chain, &"\n".repeat(10)),
            "root",
        ),
    ];
    for (name, quoted, expected) in cases {
        let (check, why) = refused(name, || quote(&quoted, collateral, TIME));
        assert_eq!(check, expected, "{name}: {why}");
    }
}

fn last_of(pem: &[u8]) -> String {
    let text = std::str::from_utf8(pem).unwrap().trim_end_matches('\0');
    text[text.rfind("-----BEGIN").unwrap()..].to_owned()
}

/// The quote with another text of certificates, its lengths put right.
fn rechained(quote: &[u8], chain: usize, pem: &str) -> Vec<u8> {
    let mut changed = [&quote[..chain], pem.as_bytes()].concat();
    let data = SIGNATURE_LEN + 4;
    for (at, from) in [
        (SIGNATURE_LEN, data),
        (data + 130, data + 134),
        (chain - 4, chain),
    ] {
        let len = (changed.len() - from) as u32;
        changed[at..at + 4].copy_from_slice(&len.to_le_bytes());
    }
    changed
}

fn collateral(good: &Sample) {
    let bytes = good.file("quote.bin");
    let json: Value = serde_json::from_slice(good.file("collateral.json")).unwrap();
    let with = |field: &str, value: &str| {
        let mut changed = json.clone();
        changed[field] = value.into();
        changed.to_string().into_bytes()
    };
    let chain = json["tcb_info_issuer_chain"].as_str().unwrap();
    let info = json["tcb_info"].as_str().unwrap();
    let dated = |date: &str| {
        let at = info.find("\"nextUpdate\":\"").unwrap() + 14;
        [
            &info[..at],
            date,
            &info[at + info[at..].find('"').unwrap()..],
        ]
        .concat()
    };
    // The text is longer in JSON, where line ends are escaped.
    let many = (1 << 21) / chain.len() * 9 / 10;
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("16 MiB", vec![b' '; 16 << 20], "collateral"),
        ("100,000 brackets", b"[".repeat(100_000), "collateral"),
        (
            "as many certificates as fit",
            with("tcb_info_issuer_chain", &chain.repeat(many)),
            "authentic",
        ),
        (
            "TCB info of 100,000 brackets",
            with("tcb_info", &"[".repeat(100_000)),
            "authentic",
        ),
        (
            "TCB info that is a number",
            with("tcb_info", "1e999999"),
            "authentic",
        ),
        (
            "a list that claims 4 GiB",
            with("pck_crl", &hex::encode(claims(u32::MAX))),
            "authentic",
        ),
        (
            "a date beyond calendars",
            with("tcb_info", &dated("9999-99-99T99:99:99Z")),
            "authentic",
        ),
        (
            "a date of 100,000 digits",
            with("tcb_info", &dated(&"9".repeat(100_000))),
            "authentic",
        ),
        (
            "a date before all",
            with("tcb_info", &dated("-0001-01-01T00:00:00Z")),
            "authentic",
        ),
    ];
    for (name, collateral, expected) in cases {
        let (check, why) = refused(name, || quote(bytes, &collateral, TIME));
        assert_eq!(check, expected, "{name}: {why}");
        assert!(why.len() < 1000, "{name}: a reason of {} bytes", why.len());
    }
    for now in [0, u64::from(u32::MAX), i64::MAX as u64, u64::MAX] {
        let (check, why) = refused("a time", || quote(bytes, good.file("collateral.json"), now));
        assert_eq!(check, "authentic", "{now}: {why}");
    }
}
