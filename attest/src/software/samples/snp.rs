//! Reports of SNP guests.

use p384::ecdsa::signature::Signer;
use p384::ecdsa::{Signature, SigningKey};
use sha2::{Digest, Sha384};

use super::super::parts::{IssueError, Result};
use super::super::{Kds, Revocation, Subject, VekRequest};
use super::{Sample, TIME};
use crate::snp::{Expected, Product, REPORT_LEN, SIGNED_LEN, Tcb};
use crate::x509::Certificate;

const DAY: u64 = 86_400;
const POLICY: u64 = 0x30000;
const TCB: Tcb = Tcb {
    fmc: 0,
    boot_loader: 4,
    tee: 0,
    snp: 22,
    microcode: 213,
};
const OLD_TCB: Tcb = Tcb { snp: 21, ..TCB };

/// The chip of the samples.
pub fn chip() -> [u8; 64] {
    [0xc7; 64]
}

/// The values that a verifier of the samples expects.
pub fn expected() -> Expected {
    Expected {
        measurement: Some([0x5a; 48]),
        report_data: Some([0xda; 64]),
        host_data: Some([0x40; 32]),
        vmpl: Some(0),
        policy: Some(POLICY),
        tcb: Some(TCB),
        chip_id: Some(chip()),
        ..Expected::default()
    }
}

/// A report in the making, with the parts that a sample changes.
#[derive(Clone)]
struct Making {
    product: Product,
    report: Vec<u8>,
    certified: (Tcb, [u8; 64]),
    valid: Option<(u64, u64)>,
    chain: Option<[Certificate; 2]>,
    crl: Option<Vec<u8>>,
    /// The last byte of the VCEK's signature is changed.
    broken_leaf: bool,
}

/// The parts that the samples of a product share.
struct Authorities {
    chain: [Certificate; 2],
    crl: Vec<u8>,
}

impl Authorities {
    fn of(product: Product) -> Result<Self> {
        let kds = Kds::new(product);
        Ok(Self {
            chain: [kds.ask()?, kds.ark()?],
            crl: kds.crl(&Revocation::default())?.as_der().to_vec(),
        })
    }
}

impl Making {
    fn new(product: Product) -> Self {
        let mut report = vec![0; REPORT_LEN];
        report[0] = match product {
            Product::Milan => 2,
            Product::Genoa => 3,
            Product::Turin => 5,
        };
        let mut id = chip();
        id[product.chip_id_len()..].fill(0);
        let fms = match product {
            Product::Milan => [0, 0, 0],
            Product::Genoa => [0x19, 0x11, 1],
            Product::Turin => [0x1a, 2, 1],
        };
        let mut making = Self {
            product,
            report,
            certified: (TCB, id),
            valid: None,
            chain: None,
            crl: None,
            broken_leaf: false,
        };
        making.put(0x08, &POLICY.to_le_bytes());
        making.put(0x34, &[1]);
        making.put(0x50, &[0xda; 64]);
        making.put(0x90, &[0x5a; 48]);
        making.put(0xc0, &[0x40; 32]);
        making.put(0x140, &[0x1d; 32]);
        making.put(0x160, &[0xff; 32]);
        making.put(0x188, &fms);
        making.put(0x1a0, &id);
        making.put_tcb(TCB);
        making
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.report.iter_mut().skip(at).zip(bytes) {
            *place = *byte;
        }
    }

    fn put_tcb(&mut self, tcb: Tcb) {
        for at in [0x38, 0x180, 0x1e0, 0x1f0] {
            self.put(at, &tcb.to_bytes(self.product));
        }
    }

    fn sign(&mut self) -> Result<()> {
        let signature: Signature = key()?.sign(&self.report[..SIGNED_LEN]);
        let (r, s) = signature.split_bytes();
        for (at, scalar) in [(SIGNED_LEN, r), (SIGNED_LEN + 72, s)] {
            let little: Vec<u8> = scalar.iter().rev().copied().collect();
            self.put(at, &little);
        }
        Ok(())
    }

    fn files(&self, authorities: &Authorities) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let point = key()?.verifying_key().to_encoded_point(false);
        let (tcb, id) = self.certified;
        let mut request = VekRequest::new(point.as_bytes(), tcb, Subject::Chip(id));
        request.validity = self.valid.unwrap_or(request.validity);
        let mut leaf = Kds::new(self.product).certify(&request)?;
        if self.broken_leaf {
            let mut der = leaf.as_der().to_vec();
            der.last_mut().into_iter().for_each(|byte| *byte ^= 1);
            leaf = Certificate::from_der(&der)?;
        }
        let [ask, ark] = self.chain.as_ref().unwrap_or(&authorities.chain);
        let chain = [&leaf, ask, ark].map(Certificate::to_pem).concat();
        Ok(vec![
            ("report.bin", self.report.clone()),
            ("cert_chain.pem", chain.into_bytes()),
            (
                "crl.der",
                self.crl.as_ref().unwrap_or(&authorities.crl).clone(),
            ),
        ])
    }
}

/// The chip's key: published, as all keys of the samples are.
fn key() -> Result<SigningKey> {
    let scalar = Sha384::digest("kvm-ops software platform: VCEK of the samples");
    SigningKey::from_slice(&scalar).map_err(|_| IssueError::Key)
}

/// The changes to the report before it is signed, and after.
type Change = fn(&mut Making) -> Result<()>;

fn nothing(_: &mut Making) -> Result<()> {
    Ok(())
}

/// Name, the check that fails, what is wrong, the change before signing, the change after.
const BAD: [(&str, &str, &str, Change, Change); 30] = [
    (
        "measurement",
        "measurement",
        "another launch digest",
        |m| {
            m.put(0x90, &[1]);
            Ok(())
        },
        nothing,
    ),
    (
        "report-data",
        "report-data",
        "other report data: an answer to another nonce",
        |m| {
            m.put(0x50, &[1]);
            Ok(())
        },
        nothing,
    ),
    (
        "host-data",
        "host-data",
        "other host data",
        |m| {
            m.put(0xc0, &[1]);
            Ok(())
        },
        nothing,
    ),
    (
        "vmpl",
        "vmpl",
        "asked by VMPL 3",
        |m| {
            m.put(0x30, &[3]);
            Ok(())
        },
        nothing,
    ),
    (
        "policy",
        "policy",
        "a policy that allows a migration agent",
        |m| {
            m.put(0x0a, &[7]);
            Ok(())
        },
        nothing,
    ),
    (
        "debug",
        "debugging",
        "a policy that allows debugging",
        |m| {
            m.put(0x0a, &[0xb]);
            Ok(())
        },
        nothing,
    ),
    (
        "tcb-old",
        "tcb",
        "a TCB below the minimum, with the key of that TCB",
        |m| {
            m.put_tcb(OLD_TCB);
            m.certified.0 = OLD_TCB;
            Ok(())
        },
        nothing,
    ),
    (
        "tcb-of-another-key",
        "key-tcb",
        "a certificate for an older TCB than the reported one",
        |m| {
            m.certified.0 = OLD_TCB;
            Ok(())
        },
        nothing,
    ),
    (
        "tcb-reserved",
        "key-tcb",
        "reserved bytes of the launch TCB are not zero",
        |m| {
            m.put(0x1f3, &[1]);
            Ok(())
        },
        nothing,
    ),
    (
        "chip",
        "chip-id",
        "another chip, with its own certificate",
        |m| {
            m.put(0x1a0, &[1; 64]);
            m.certified.1 = [1; 64];
            Ok(())
        },
        nothing,
    ),
    (
        "chip-of-another-key",
        "key-chip",
        "a certificate for another chip",
        |m| {
            m.certified.1 = [1; 64];
            Ok(())
        },
        nothing,
    ),
    (
        "chip-masked",
        "key-chip",
        "the host masks the chip id",
        |m| {
            m.put(0x1a0, &[0; 64]);
            Ok(())
        },
        nothing,
    ),
    (
        "changed",
        "signature",
        "a bit of the launch digest changed after signing",
        nothing,
        |m| {
            m.put(0x90, &[0x5b]);
            Ok(())
        },
    ),
    (
        "signature-r",
        "signature",
        "R is another number",
        nothing,
        |m| {
            m.put(SIGNED_LEN, &[1, 2, 3]);
            Ok(())
        },
    ),
    (
        "signature-zero",
        "signature",
        "R and S are zero",
        nothing,
        |m| {
            m.put(SIGNED_LEN, &[0; 144]);
            Ok(())
        },
    ),
    (
        "signature-tail",
        "reserved",
        "bytes behind S are not zero",
        nothing,
        |m| {
            m.put(SIGNED_LEN + 144, &[1]);
            Ok(())
        },
    ),
    (
        "reserved",
        "reserved",
        "a reserved byte of the report is not zero, and signed",
        |m| {
            m.put(0x18c, &[1]);
            Ok(())
        },
        nothing,
    ),
    (
        "unsigned",
        "algorithm",
        "the host asked the firmware not to sign",
        |m| {
            m.put(0x48, &[0x1e]);
            Ok(())
        },
        |m| {
            m.put(SIGNED_LEN, &[0; 144]);
            Ok(())
        },
    ),
    (
        "algorithm",
        "algorithm",
        "another number of the signature's algorithm",
        |m| {
            m.put(0x34, &[2]);
            Ok(())
        },
        nothing,
    ),
    (
        "vcek-expired",
        "validity",
        "the VCEK's certificate is expired",
        |m| {
            m.valid = Some((TIME - 2 * DAY, TIME - DAY));
            Ok(())
        },
        nothing,
    ),
    (
        "ask-expired",
        "validity",
        "the ASK is expired",
        |m| {
            let kds = Kds::new(m.product);
            m.chain = Some([kds.ask_valid((TIME - 2 * DAY, TIME - DAY))?, kds.ark()?]);
            Ok(())
        },
        nothing,
    ),
    (
        "ask-revoked",
        "revocation",
        "the root's list names the ASK",
        |m| {
            let kds = Kds::new(m.product);
            let revoked = vec![kds.ask()?];
            m.crl = Some(
                kds.crl(&Revocation {
                    revoked,
                    ..Revocation::default()
                })?
                .as_der()
                .to_vec(),
            );
            Ok(())
        },
        nothing,
    ),
    (
        "crl-old",
        "revocation",
        "the root's list is out of date",
        |m| {
            let validity = (TIME - 2 * DAY, TIME - DAY);
            m.crl = Some(
                Kds::new(m.product)
                    .crl(&Revocation {
                        validity,
                        ..Revocation::default()
                    })?
                    .as_der()
                    .to_vec(),
            );
            Ok(())
        },
        nothing,
    ),
    (
        "crl-of-another-root",
        "revocation",
        "the list of another product's root",
        |m| {
            m.crl = Some(
                Kds::new(Product::Milan)
                    .crl(&Revocation::default())?
                    .as_der()
                    .to_vec(),
            );
            Ok(())
        },
        nothing,
    ),
    (
        "chain-of-another-product",
        "certificates",
        "ASK and ARK of another product",
        |m| {
            let kds = Kds::new(Product::Milan);
            m.chain = Some([kds.ask()?, kds.ark()?]);
            Ok(())
        },
        nothing,
    ),
    (
        "processor",
        "product",
        "a processor of another product than the key",
        |m| {
            m.put(0x188, &[0x1a, 2, 1]);
            Ok(())
        },
        nothing,
    ),
    (
        "root-forged",
        "root",
        "a root with the right name and another key",
        |m| {
            m.chain = Some(Kds::new(m.product).forged()?);
            Ok(())
        },
        nothing,
    ),
    (
        "ask-forged",
        "ask",
        "an ASK that another key than the root's signed",
        |m| {
            let kds = Kds::new(m.product);
            let [ask, _] = kds.forged()?;
            m.chain = Some([ask, kds.ark()?]);
            Ok(())
        },
        nothing,
    ),
    (
        "vcek-changed",
        "key",
        "a bit of the signature of the VCEK's certificate changed",
        |m| {
            m.broken_leaf = true;
            Ok(())
        },
        nothing,
    ),
    (
        "version",
        "form",
        "a version that does not exist",
        |m| {
            m.put(0, &[9]);
            Ok(())
        },
        nothing,
    ),
];

/// The samples: good ones of each product, and bad ones of Genoa.
pub fn reports() -> Result<Vec<Sample>> {
    let (milan, genoa) = (
        Authorities::of(Product::Milan)?,
        Authorities::of(Product::Genoa)?,
    );
    let mut samples = Vec::new();
    let good = [
        ("good-milan", Product::Milan, "a good report of version 2"),
        ("good-genoa", Product::Genoa, "a good report of version 3"),
    ];
    for (name, product, about) in good {
        let mut making = Making::new(product);
        let authorities = match product {
            Product::Milan => &milan,
            _ => &genoa,
        };
        making.sign()?;
        samples.push(Sample {
            name,
            about,
            fails: None,
            files: making.files(authorities)?,
        });
    }
    for (name, fails, about, before, after) in BAD {
        let mut making = Making::new(Product::Genoa);
        before(&mut making)?;
        making.sign()?;
        after(&mut making)?;
        samples.push(Sample {
            name,
            about,
            fails: Some(fails),
            files: making.files(&genoa)?,
        });
    }
    let mut cut = samples[1].clone();
    cut.name = "cut";
    cut.about = "a report without its last byte";
    cut.fails = Some("form");
    cut.files[0].1.pop();
    samples.push(cut);
    let mut no_key = samples[1].clone();
    no_key.name = "no-vcek";
    no_key.about = "a chain without the VCEK";
    no_key.fails = Some("certificates");
    no_key.files[1].1 = genoa.chain.map(|c| c.to_pem()).concat().into_bytes();
    samples.push(no_key);
    Ok(samples)
}
