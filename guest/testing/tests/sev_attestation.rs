//! From a guest's extended request to a verifier that trusts the software root.

use kvm_ops_attest::Waivers;
use kvm_ops_attest::snp::table::{self, EntryKind};
use kvm_ops_attest::snp::{Evidence, Expected, Product, Report, Roots, Tcb, verify};
use kvm_ops_attest::software::{Kds, Revocation, Subject, VekRequest};
use kvm_ops_guest::GpaRange;
use kvm_ops_guest::sev::message::{KeySelect, ReportRequest};
use kvm_ops_guest::sev::{RequestError, SevGuest};
use kvm_ops_guest_test::sev::TestSev;

const SECRETS: u64 = 0x5000;
const GHCB: u64 = 0x6000;
const BUFFER: u64 = 0x1_0000;
const PAGES: u64 = 6;
const JANUARY_2026: u64 = 1_767_225_600;
const VLEK: u64 = 1;

/// A guest on a platform with or without a provider's key, whose host gives it these certificates.
fn guest(key: KeySelect, certificates: &[u8]) -> TestSev {
    let builder = TestSev::snp()
        .measured(0x8000, b"kernel")
        .secrets(SECRETS)
        .shared(GHCB..GHCB + 0x1000)
        .shared(BUFFER..BUFFER + PAGES * 0x1000)
        .certificates(certificates);
    let guest = match key {
        KeySelect::Vlek => builder.vlek(VLEK).build(),
        _ => builder.build(),
    };
    guest.expect("a guest")
}

/// The guest's report, and the certificates that its host gave it.
fn ask(guest: &TestSev, key: KeySelect) -> Result<(Vec<u8>, Vec<u8>), RequestError> {
    let mut channel = guest.vcpu().channel(SECRETS, 0).expect("validated");
    let channel = channel.as_mut().expect("a key");
    let mut kernel = SevGuest::new(guest.vcpu().ghcb(GHCB), true);
    let mut memory = guest.vcpu().mapping(BUFFER);
    let buffer = GpaRange::pages(BUFFER, PAGES).expect("a range");
    let request = ReportRequest {
        key,
        ..ReportRequest::new([0xda; 64])
    };
    let mut certificates = vec![0; 0x4000];
    let (report, len) = kernel.extended_report(
        channel,
        buffer,
        &mut memory,
        &request,
        &mut certificates,
        || false,
    )?;
    certificates.truncate(len);
    Ok((report.to_vec(), certificates))
}

/// What the vendor's service gives a host for its chip, or for a provider's key.
fn certificates(key: KeySelect) -> Vec<u8> {
    let guest = guest(key, &[]);
    let (report, _) = ask(&guest, key).expect("a report");
    let report = Report::from_bytes(&report).expect("a report");
    let platform = guest.hypervisor();
    let platform = platform.platform();
    let product = product(&report);
    let tcb = Tcb::from_bytes(product, report.reported_tcb).expect("a TCB");
    let kds = Kds::new(product);
    let (chain, subject, kind, authority) = match key {
        KeySelect::Vlek => (
            platform.vlek_chain().expect("loaded"),
            Subject::Provider("a provider".into()),
            EntryKind::Vlek,
            kds.asvk(),
        ),
        _ => (
            platform.cert_chain(),
            Subject::Chip(report.chip_id),
            EntryKind::Vcek,
            kds.ask(),
        ),
    };
    let point = chain.vcek.key().expect("a key").to_sec1();
    let leaf = kds.certify(&VekRequest::new(&point, tcb, subject));
    let (leaf, authority) = (leaf.expect("certified"), authority.expect("an authority"));
    let ark = kds.ark().expect("a root");
    let list = kds.crl(&Revocation::default()).expect("a list");
    table::write(&[
        (kind, leaf.as_der()),
        (EntryKind::Ask, authority.as_der()),
        (EntryKind::Ark, ark.as_der()),
        (EntryKind::Crl, list.as_der()),
    ])
}

fn product(report: &Report) -> Product {
    let known = report.cpuid_fms;
    known
        .and_then(|(family, model, _)| Product::from_cpuid(family, model))
        .unwrap_or(Product::Milan)
}

#[test]
fn a_report_and_the_certificates_that_came_with_it_are_accepted_whichever_key_signed() {
    for key in [KeySelect::Vcek, KeySelect::Vlek] {
        let guest = guest(key, &certificates(key));
        let (report, table) = ask(&guest, key).expect("a report");
        let says = Report::from_bytes(&report).expect("a report");
        let evidence = Evidence {
            report: &report,
            certificates: &[&table],
            crl: None,
        };
        let expected = Expected {
            report_data: Some([0xda; 64]),
            vmpl: Some(0),
            host_data: Some([0; 32]),
            policy: Some(says.policy),
            measurement: Some(says.measurement),
            chip_id: Some(guest.hypervisor().platform().chip_id()),
            tcb: Some(Tcb::default()),
            ..Expected::default()
        };
        let roots = Roots::software();
        let verified = verify(&evidence, &roots, &expected, &Waivers::none(), JANUARY_2026);
        assert!(
            verified.verdict.is_accepted(),
            "{key:?}: {:#?}",
            verified.verdict
        );
        // AMD's roots say nothing about it.
        let verified = verify(
            &evidence,
            &Roots::amd(),
            &expected,
            &Waivers::none(),
            JANUARY_2026,
        );
        assert!(!verified.verdict.is_authentic());
    }
}
