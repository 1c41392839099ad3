//! A report in the making.

use p384::ecdsa::signature::Signer;
use p384::ecdsa::{Signature, SigningKey};
use sha2::{Digest, Sha384};

use super::super::super::parts::{IssueError, Result};
use super::super::super::{Kds, Revocation, Subject, VekRequest};
use crate::snp::{Expected, KeyKind, Product, REPORT_LEN, SIGNED_LEN, Tcb};
use crate::x509::Certificate;

const POLICY: u64 = 0x30000;
/// The owner of the VLEK of the samples.
const PROVIDER: &str = "kvm-ops samples";

/// The TCB of a product's samples.
pub(super) const fn tcb(product: Product) -> Tcb {
    Tcb {
        fmc: matches!(product, Product::Turin) as u8,
        boot_loader: 4,
        tee: 0,
        snp: 22,
        microcode: 213,
    }
}

/// One below it.
pub(super) fn old_tcb(product: Product) -> Tcb {
    Tcb {
        snp: 21,
        ..tcb(product)
    }
}

/// The chip of a product's samples, zeros behind what the product uses.
pub(super) fn chip(product: Product) -> [u8; 64] {
    let mut id = [0xc7; 64];
    id[product.chip_id_len()..].fill(0);
    id
}

/// The values that a verifier of a product's samples expects.
pub(super) fn expected(product: Product) -> Expected {
    Expected {
        measurement: Some([0x5a; 48]),
        report_data: Some([0xda; 64]),
        host_data: Some([0x40; 32]),
        vmpl: Some(0),
        policy: Some(POLICY),
        tcb: Some(tcb(product)),
        chip_id: Some(chip(product)),
        ..Expected::default()
    }
}

/// A report in the making, with the parts that a sample changes.
#[derive(Clone)]
pub(super) struct Making {
    pub(super) product: Product,
    pub(super) report: Vec<u8>,
    /// The key that is certified.
    pub(super) kind: KeyKind,
    pub(super) certified: (Tcb, [u8; 64]),
    pub(super) valid: Option<(u64, u64)>,
    pub(super) chain: Option<[Certificate; 2]>,
    pub(super) crl: Option<Vec<u8>>,
    /// The last byte of the signature of the key's certificate is changed.
    pub(super) broken_leaf: bool,
}

/// The parts that the samples of a product share.
pub(super) struct Authorities {
    ask: Certificate,
    asvk: Certificate,
    ark: Certificate,
    crl: Vec<u8>,
}

impl Authorities {
    pub(super) fn of(product: Product) -> Result<Self> {
        let kds = Kds::new(product);
        Ok(Self {
            ask: kds.ask()?,
            asvk: kds.asvk()?,
            ark: kds.ark()?,
            crl: kds.crl(&Revocation::default())?.as_der().to_vec(),
        })
    }

    /// The certificates above a key of this kind, as PEM.
    pub(super) fn above(&self, kind: KeyKind) -> String {
        let authority = match kind {
            KeyKind::Vcek => &self.ask,
            KeyKind::Vlek => &self.asvk,
        };
        authority.to_pem() + &self.ark.to_pem()
    }
}

impl Making {
    pub(super) fn new(product: Product) -> Self {
        let mut report = vec![0; REPORT_LEN];
        report[0] = match product {
            Product::Milan => 2,
            Product::Genoa => 3,
            Product::Turin => 5,
        };
        let id = chip(product);
        let fms = match product {
            Product::Milan => [0, 0, 0],
            Product::Genoa => [0x19, 0x11, 1],
            Product::Turin => [0x1a, 2, 1],
        };
        let mut making = Self {
            product,
            report,
            kind: KeyKind::Vcek,
            certified: (tcb(product), id),
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
        making.put_tcb(tcb(product));
        if product == Product::Turin {
            // The mitigations at launch and now, which version 5 brought.
            making.put(0x1f8, &[1]);
            making.put(0x200, &[1]);
        }
        making
    }

    /// The same, signed by a VLEK.
    pub(super) fn by_vlek(mut self) -> Self {
        self.kind = KeyKind::Vlek;
        self.name_signer(KeyKind::Vlek);
        self
    }

    /// Names the key in the report (SIGNING_KEY).
    pub(super) fn name_signer(&mut self, kind: KeyKind) {
        self.put(0x48, &[(kind as u8) << 2]);
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.report.iter_mut().skip(at).zip(bytes) {
            *place = *byte;
        }
    }

    pub(super) fn put_tcb(&mut self, tcb: Tcb) {
        for at in [0x38, 0x180, 0x1e0, 0x1f0] {
            self.put(at, &tcb.to_bytes(self.product));
        }
    }

    pub(super) fn sign(&mut self) -> Result<()> {
        let signature: Signature = key()?.sign(&self.report[..SIGNED_LEN]);
        let (r, s) = signature.split_bytes();
        for (at, scalar) in [(SIGNED_LEN, r), (SIGNED_LEN + 72, s)] {
            let little: Vec<u8> = scalar.iter().rev().copied().collect();
            self.put(at, &little);
        }
        Ok(())
    }

    pub(super) fn files(&self, authorities: &Authorities) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let point = key()?.verifying_key().to_encoded_point(false);
        let (tcb, id) = self.certified;
        let subject = match self.kind {
            KeyKind::Vcek => Subject::Chip(id),
            KeyKind::Vlek => Subject::Provider(PROVIDER.into()),
        };
        let mut request = VekRequest::new(point.as_bytes(), tcb, subject);
        request.validity = self.valid.unwrap_or(request.validity);
        let mut leaf = Kds::new(self.product).certify(&request)?;
        if self.broken_leaf {
            let mut der = leaf.as_der().to_vec();
            der.last_mut().into_iter().for_each(|byte| *byte ^= 1);
            leaf = Certificate::from_der(&der)?;
        }
        let above = match &self.chain {
            Some(chain) => chain.iter().map(Certificate::to_pem).collect(),
            None => authorities.above(self.kind),
        };
        let chain = leaf.to_pem() + &above;
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

/// The key that signs: published, as all keys of the samples are.
fn key() -> Result<SigningKey> {
    let scalar = Sha384::digest("kvm-ops software platform: VCEK of the samples");
    SigningKey::from_slice(&scalar).map_err(|_| IssueError::Key)
}
