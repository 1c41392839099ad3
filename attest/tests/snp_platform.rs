//! Evidence of the software platform: accepted here and by the crate `sev` unmodified, given its
//! root, and by nothing without it.
#![cfg(all(feature = "snp", feature = "software"))]

mod common;

use common::*;
use kvm_ops_attest::Outcome;
use kvm_ops_attest::snp::{Evidence, Expected, Product, REPORT_LEN, Roots, SIGNED_LEN, Tcb};
use kvm_ops_attest::snp::{Verified, verify};
use kvm_ops_attest::software::{Kds, Revocation, Subject, VekRequest};
use kvm_ops_attest::x509::{Certificate, bundle};
use sev::certs::snp::Verifiable;
use soft_amd_sp::crypto::PrivateKey;

/// 2026-01-01.
const NOW: u64 = 1_767_225_600;
const TCB: Tcb = Tcb {
    fmc: 0,
    boot_loader: 4,
    tee: 0,
    snp: 22,
    microcode: 213,
};

/// A chip that signs whatever report it is given.
struct Chip {
    product: Product,
    key: PrivateKey,
    id: [u8; 64],
    tcb: Tcb,
}

impl Chip {
    fn new(product: Product) -> Self {
        let mut id = [0; 64];
        id[..product.chip_id_len()].fill(0xc7);
        Self {
            product,
            key: PrivateKey::from_scalar(&[1, 2, 3, 4]).unwrap(),
            id,
            tcb: TCB,
        }
    }

    fn certificate(&self) -> Certificate {
        self.certify(Subject::Chip(self.id))
    }

    fn certify(&self, subject: Subject) -> Certificate {
        let request = VekRequest::new(&self.key.public().to_sec1(), self.tcb, subject);
        Kds::new(self.product).certify(&request).unwrap()
    }

    /// A report in the version of the product.
    fn report(&self) -> Vec<u8> {
        let mut report = vec![0; REPORT_LEN];
        let (version, fms) = match self.product {
            Product::Milan => (2, [0, 0, 0]),
            Product::Genoa => (3, [0x19, 0x11, 1]),
            Product::Turin => (5, [0x1a, 2, 1]),
        };
        report[0] = version;
        report[0x0a] = 3;
        report[0x34] = 1;
        for at in [0x38, 0x180, 0x1e0, 0x1f0] {
            report[at..at + 8].copy_from_slice(&self.tcb.to_bytes(self.product));
        }
        report[0x188..0x18b].copy_from_slice(&fms);
        report[0x1a0..0x1e0].copy_from_slice(&self.id);
        self.sign(report)
    }

    fn sign(&self, mut report: Vec<u8>) -> Vec<u8> {
        let signature = self.key.sign(&report[..SIGNED_LEN]);
        report[SIGNED_LEN..].copy_from_slice(&signature);
        report
    }

    fn verify(&self, report: &[u8], leaf: &Certificate, roots: &Roots) -> Verified {
        let kds = Kds::new(self.product);
        let (ask, ark) = (kds.ask().unwrap(), kds.ark().unwrap());
        let crl = kds.crl(&Revocation::default()).unwrap();
        let evidence = Evidence {
            report,
            certificates: &[leaf.as_der(), ask.as_der(), ark.as_der()],
            crl: Some(crl.as_der()),
        };
        verify(&evidence, roots, &Expected::default(), &waive(&[]), NOW)
    }
}

fn failures(verified: &Verified) -> Vec<&'static str> {
    let rows = verified.verdict.rows().iter();
    rows.filter(|row| matches!(row.outcome, Outcome::Failed(_)))
        .map(|row| row.check.name)
        .collect()
}

#[test]
fn every_product_is_accepted_under_the_software_root_and_under_no_other() {
    for product in Product::ALL {
        let chip = Chip::new(product);
        let (report, leaf) = (chip.report(), chip.certificate());
        let verified = chip.verify(&report, &leaf, &Roots::software());
        assert!(verified.verdict.is_authentic(), "{:?}", verified.verdict);
        assert_eq!(failures(&verified), [""; 0]);
        assert_eq!(verified.product, Some(product));
        let note = &verified.verdict.row("root").unwrap().note;
        assert!(note.contains("its private key is public"), "{note}");
        let verified = chip.verify(&report, &leaf, &Roots::amd());
        assert_eq!(failures(&verified), ["root", "revocation"]);
    }
}

/// `Chain::verify` and the verification of a report are the crate's own.
#[test]
fn the_crate_sev_accepts_report_and_chain_of_every_product() {
    use sev::certs::snp::{Certificate as Theirs, Chain, ca};
    use sev::firmware::guest::AttestationReport;
    use sev::parser::ByteParser;
    for product in Product::ALL {
        let chip = Chip::new(product);
        let kds = Kds::new(product);
        let theirs = |certificate: &Certificate| Theirs::from_der(certificate.as_der()).unwrap();
        let chain = |vek: &Certificate, ask: &Certificate| Chain {
            ca: ca::Chain {
                ark: theirs(&kds.ark().unwrap()),
                ask: theirs(ask),
            },
            vek: theirs(vek),
        };
        let ask = kds.ask().unwrap();
        let good = chain(&chip.certificate(), &ask);
        let report = AttestationReport::from_bytes(&chip.report()).unwrap();
        (&good, &report).verify().unwrap();
        let provider = chip.certify(Subject::Provider("a provider".into()));
        let loaded = chain(&provider, &kds.asvk().unwrap());
        (&loaded, &report).verify().unwrap();
        assert!((&chain(&provider, &ask), &report).verify().is_err());
        let mut changed = chip.report();
        changed[0x90] ^= 1;
        let changed = AttestationReport::from_bytes(&changed).unwrap();
        assert!((&good, &changed).verify().is_err());
    }
}

#[test]
fn a_vleks_chain_is_found_by_the_reports_signing_key() {
    let chip = Chip::new(Product::Genoa);
    let mut report = chip.report();
    report[0x48] = 1 << 2;
    let report = chip.sign(report);
    let leaf = chip.certify(Subject::Provider("a provider".into()));
    let kds = Kds::new(chip.product);
    // Both kinds came along, as in a table of a host that has both.
    let all = [
        chip.certificate(),
        kds.ask().unwrap(),
        leaf,
        kds.asvk().unwrap(),
        kds.ark().unwrap(),
    ];
    let all: Vec<&[u8]> = all.iter().map(Certificate::as_der).collect();
    let evidence = Evidence {
        report: &report,
        certificates: &all,
        crl: None,
    };
    let verified = verify(
        &evidence,
        &Roots::software(),
        &Expected::default(),
        &waive(&[]),
        NOW,
    );
    assert!(verified.verdict.is_authentic(), "{:?}", verified.verdict);
    // A report that says VCEK is not believed from a VLEK.
    let only = [all[2], all[3], all[4]];
    let said_vcek = chip.report();
    let evidence = Evidence {
        report: &said_vcek,
        certificates: &only,
        crl: None,
    };
    let verified = verify(
        &evidence,
        &Roots::software(),
        &Expected::default(),
        &waive(&[]),
        NOW,
    );
    assert_eq!(failures(&verified), ["certificates"]);
}

/// M6: the reported TCB and the chip are tied to the key that signed.
#[test]
fn a_key_of_another_tcb_chip_or_product_is_told() {
    let chip = Chip::new(Product::Genoa);
    let newer = Chip {
        tcb: Tcb { snp: 23, ..TCB },
        ..Chip::new(Product::Genoa)
    };
    let other = Chip {
        id: [1; 64],
        ..Chip::new(Product::Genoa)
    };
    let roots = Roots::software();
    let report = chip.report();
    let with = |leaf: &Chip| failures(&chip.verify(&report, &leaf.certificate(), &roots));
    assert_eq!(with(&newer), ["key-tcb"]);
    assert_eq!(with(&other), ["key-chip"]);
    // A report of Genoa's processors with a certificate of Milan and Milan's chain.
    let milan = Chip::new(Product::Milan);
    let mixed = milan.verify(&report, &milan.certificate(), &roots);
    assert_eq!(failures(&mixed), ["product"]);
    // Genoa's VCEK does not name Milan's ASK as its issuer.
    let mixed = milan.verify(&report, &chip.certificate(), &roots);
    assert_eq!(failures(&mixed), ["certificates"]);
}

#[test]
fn a_masked_chip_needs_the_waiver_of_the_chip() {
    let chip = Chip::new(Product::Genoa);
    let mut report = chip.report();
    report[0x1a0..0x1e0].fill(0);
    let report = chip.sign(report);
    let verified = chip.verify(&report, &chip.certificate(), &Roots::software());
    assert_eq!(failures(&verified), ["key-chip"]);
    let kds = Kds::new(chip.product);
    let (leaf, ask) = (chip.certificate(), kds.ask().unwrap());
    let evidence = Evidence {
        report: &report,
        certificates: &[leaf.as_der(), ask.as_der()],
        crl: None,
    };
    let names = "revocation policy vmpl measurement host-data report-data tcb chip-id";
    let waivers = waive(&names.split(' ').collect::<Vec<_>>());
    let verified = verify(
        &evidence,
        &Roots::software(),
        &Expected::default(),
        &waivers,
        NOW,
    );
    assert_accepted(&verified.verdict);
    assert_eq!(
        verified.verdict.row("key-chip").unwrap().outcome,
        Outcome::Waived
    );
}

#[test]
fn a_revoked_ask_and_a_list_that_is_not_the_roots_are_told() {
    let chip = Chip::new(Product::Genoa);
    let kds = Kds::new(Product::Genoa);
    let (leaf, ask, ark) = (chip.certificate(), kds.ask().unwrap(), kds.ark().unwrap());
    let report = chip.report();
    let with = |crl: &[u8]| {
        let evidence = Evidence {
            report: &report,
            certificates: &[leaf.as_der(), ask.as_der(), ark.as_der()],
            crl: Some(crl),
        };
        let roots = Roots::software();
        verify(&evidence, &roots, &Expected::default(), &waive(&[]), NOW)
    };
    let list = |revocation: &Revocation| kds.crl(revocation).unwrap().as_der().to_vec();
    let good = list(&Revocation::default());
    assert_eq!(failures(&with(&good)), [""; 0]);
    let why = |crl: &[u8]| {
        let verified = with(crl);
        assert_eq!(failures(&verified), ["revocation"]);
        verified.verdict.first_failure().unwrap().1.to_owned()
    };
    let revoked = Revocation {
        revoked: vec![ask.clone()],
        ..Revocation::default()
    };
    assert!(why(&list(&revoked)).contains("SEV-Genoa is revoked"));
    let old = Revocation {
        validity: (1_600_000_000, 1_600_000_001),
        ..Revocation::default()
    };
    assert!(why(&list(&old)).contains("the list is of"));
    let other = Kds::new(Product::Milan)
        .crl(&Revocation::default())
        .unwrap();
    assert!(why(other.as_der()).contains("not one of ARK-Genoa"));
    for at in (0..good.len()).step_by(5) {
        let mut changed = good.clone();
        changed[at] ^= 1 << (at % 8);
        why(&changed);
    }
}

#[test]
fn a_debugged_guest_and_an_expired_certificate_need_their_waivers() {
    let chip = Chip::new(Product::Turin);
    let mut report = chip.report();
    report[0x0a] |= 8;
    let report = chip.sign(report);
    let verified = chip.verify(&report, &chip.certificate(), &Roots::software());
    assert_eq!(failures(&verified), ["debugging"]);
    let request = VekRequest {
        validity: (NOW - 10, NOW - 1),
        ..VekRequest::new(&chip.key.public().to_sec1(), TCB, Subject::Chip(chip.id))
    };
    let expired = Kds::new(Product::Turin).certify(&request).unwrap();
    let verified = chip.verify(&chip.report(), &expired, &Roots::software());
    assert_eq!(failures(&verified), ["validity"]);
}

#[test]
fn an_unsigned_report_and_other_algorithms_are_refused() {
    let chip = Chip::new(Product::Genoa);
    for (at, value) in [(0x34, 2), (0x48, 7 << 2), (0x48, 2), (0x48, 3 << 2)] {
        let mut report = chip.report();
        report[at] = value;
        let report = chip.sign(report);
        let verified = chip.verify(&report, &chip.certificate(), &Roots::software());
        assert!(
            failures(&verified).contains(&"algorithm"),
            "{at:#x} {value}"
        );
    }
}

#[test]
fn the_service_issues_the_same_bytes_for_the_same_request() {
    let chip = Chip::new(Product::Milan);
    assert_eq!(chip.certificate().as_der(), chip.certificate().as_der());
    let kds = Kds::new(Product::Milan);
    assert_eq!(kds.ark().unwrap().as_der(), kds.ark().unwrap().as_der());
    let pem = kds.ark().unwrap().to_pem();
    assert_eq!(bundle(pem.as_bytes()).unwrap(), [kds.ark().unwrap()]);
    assert_eq!(Roots::software().all().len(), 1);
    assert_eq!(Roots::software().all()[0].key(), kds.ark().unwrap().key());
    assert!(Roots::given(&kds.ark().unwrap()).unwrap().all()[0].is_software());
}
