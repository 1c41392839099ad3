//! Verification of a report, as rows.

use p384::ecdsa::signature::Verifier;
use p384::ecdsa::{Signature, VerifyingKey};
use x509_cert::der::referenced::OwnedToRef;

use super::chain::{self, Chain};
use super::report::SCALAR;
use super::{
    Endorsement, Expected, KeyKind, Product, Report, Root, Roots, SIGNED_LEN, SigningKey, Tcb,
};
use crate::row::{Check, Rows, Verdict, Waivers};
use crate::x509::Crl;

/// The checks, in the order in which they are made.
pub(super) mod check {
    use crate::row::Check;
    use crate::row::Weight::{Always, Needed, Optional};

    pub(crate) const FORM: Check = Check::new(
        "form",
        Always,
        "the report has its length and a known version",
    );
    pub(crate) const RESERVED: Check = Check::new(
        "reserved",
        Always,
        "reserved bytes are zero, the signature's included",
    );
    pub(crate) const CERTIFICATES: Check =
        Check::new("certificates", Always, "the certificates form one chain");
    pub(crate) const ROOT: Check = Check::new("root", Always, "the chain ends at a trusted root");
    pub(crate) const ASK: Check = Check::new("ask", Always, "the ASK is signed by the root");
    pub(crate) const LEAF: Check =
        Check::new("key", Always, "the key that signed is certified by the ASK");
    pub(crate) const ALGORITHM: Check = Check::new(
        "algorithm",
        Always,
        "signed by that kind of key, ECDSA P-384 with SHA-384",
    );
    pub(crate) const SIGNATURE: Check = Check::new(
        "signature",
        Always,
        "the signature over the report verifies",
    );
    pub(crate) const PRODUCT: Check =
        Check::new("product", Always, "report, key and root are of one product");
    pub(crate) const KEY_TCB: Check = Check::new(
        "key-tcb",
        Always,
        "the key belongs to the TCB that is reported",
    );
    pub(crate) const KEY_CHIP: Check = Check::new(
        "key-chip",
        Always,
        "the key belongs to the chip that is reported",
    );
    pub(crate) const VALIDITY: Check = Check::new(
        "validity",
        Needed,
        "every certificate is valid at that time",
    );
    pub(crate) const REVOCATION: Check = Check::new(
        "revocation",
        Needed,
        "the root's revocation list does not name the ASK",
    );
    pub(crate) const DEBUGGING: Check = Check::new(
        "debugging",
        Needed,
        "the policy forbids the host to debug the guest",
    );
    pub(crate) const POLICY: Check = Check::new("policy", Needed, "the policy is the expected one");
    pub(crate) const VMPL: Check = Check::new("vmpl", Needed, "the expected VMPL asked");
    pub(crate) const MEASUREMENT: Check = Check::new(
        "measurement",
        Needed,
        "the launch digest is the expected one",
    );
    pub(crate) const HOST_DATA: Check =
        Check::new("host-data", Needed, "the host data is the expected one");
    pub(crate) const REPORT_DATA: Check =
        Check::new("report-data", Needed, "the report data is the expected one");
    pub(crate) const TCB: Check = Check::new(
        "tcb",
        Needed,
        "no part of the reported TCB is below the minimum",
    );
    pub(crate) const CHIP_ID: Check = Check::new("chip-id", Needed, "the chip is the expected one");
    pub(crate) const ID_KEY: Check =
        Check::new("id-key", Optional, "the ID key is the expected one");
    pub(crate) const AUTHOR_KEY: Check =
        Check::new("author-key", Optional, "the author key is the expected one");
    pub(crate) const GUEST_SVN: Check = Check::new(
        "guest-svn",
        Optional,
        "the guest's SVN is not below the minimum",
    );
}

/// Every check, in the order of the rows.
pub const CHECKS: [Check; 24] = [
    check::FORM,
    check::RESERVED,
    check::CERTIFICATES,
    check::ROOT,
    check::ASK,
    check::LEAF,
    check::ALGORITHM,
    check::SIGNATURE,
    check::PRODUCT,
    check::KEY_TCB,
    check::KEY_CHIP,
    check::VALIDITY,
    check::REVOCATION,
    check::DEBUGGING,
    check::POLICY,
    check::VMPL,
    check::MEASUREMENT,
    check::HOST_DATA,
    check::REPORT_DATA,
    check::TCB,
    check::CHIP_ID,
    check::ID_KEY,
    check::AUTHOR_KEY,
    check::GUEST_SVN,
];

/// The evidence to verify.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// The report.
    pub report: &'a [u8],
    /// Files with the certificates: DER or PEM, one or several, or a certificate table.
    pub certificates: &'a [&'a [u8]],
    /// The root's revocation list in DER. Without it the one of a certificate table is used.
    pub crl: Option<&'a [u8]>,
}

/// The rows, and what the report says.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The rows.
    pub verdict: Verdict,
    /// The report, if it can be read. Believe it only if the verdict
    /// [is authentic](Verdict::is_authentic).
    pub report: Option<Report>,
    /// The product, if the signing key's certificate can be read.
    pub product: Option<Product>,
}

/// Verifies a report against roots that the caller trusts and values that it expects, at `now` in
/// seconds of Unix time.
///
/// Every check that can be made is made, so the rows name all that is wrong and not only the first.
/// The work is bounded: certificates, lists and tables beyond their limits are refused unread.
pub fn verify(
    evidence: &Evidence<'_>,
    roots: &Roots,
    expected: &Expected,
    waivers: &Waivers,
    now: u64,
) -> Verified {
    let mut rows = Rows::new(waivers);
    let text = |error: super::ReportError| error.to_string();
    let report = rows.value(
        check::FORM,
        Report::from_bytes(evidence.report).map_err(text),
    );
    let Some(report) = report else {
        return Verified {
            verdict: rows.finish(&CHECKS),
            report: None,
            product: None,
        };
    };
    rows.made(check::RESERVED, reserved(&report, evidence.report));
    let found = chain::read(evidence.certificates).and_then(|(all, crl)| {
        let chain = Chain::find(&all, report.signing_key)?;
        Ok((chain, crl))
    });
    let found = rows.value(check::CERTIFICATES, found);
    let mut endorsement = None;
    if let Some((chain, table_crl)) = &found {
        let root = check_chain(&mut rows, chain, roots);
        endorsement = check_key(&mut rows, chain, &report, evidence.report, waivers);
        rows.made(check::VALIDITY, validity(chain, now));
        let crl = evidence.crl.or(table_crl.as_deref());
        revocation(&mut rows, chain, root, crl, now);
    }
    expected.compare(&mut rows, &report, endorsement.as_ref());
    Verified {
        verdict: rows.finish(&CHECKS),
        report: Some(report),
        product: endorsement.map(|endorsement| endorsement.product),
    }
}

fn reserved(report: &Report, bytes: &[u8]) -> Result<(), String> {
    let all = report.reserved().into_iter().flatten();
    let mut set = all.filter(|at| bytes.get(*at) != Some(&0));
    match set.next() {
        Some(at) => Err(format!("the reserved byte at {at:#x} is not zero")),
        None => Ok(()),
    }
}

/// From the root down to the key.
fn check_chain<'a>(rows: &mut Rows<'_>, chain: &Chain, roots: &'a Roots) -> Option<&'a Root> {
    let root = rows.value(check::ROOT, chain.root(roots))?;
    rows.note(root.name().to_owned());
    let signed = chain.ask.verify(root.key());
    rows.made(check::ASK, signed.map_err(|error| error.to_string()));
    Some(root)
}

/// Checks that the report belongs to the key that signed it.
fn check_key(
    rows: &mut Rows<'_>,
    chain: &Chain,
    report: &Report,
    bytes: &[u8],
    waivers: &Waivers,
) -> Option<Endorsement> {
    let leaf = &chain.leaf;
    let signed = leaf.verify(chain.ask.key()).map_err(|e| e.to_string());
    let read = signed.and_then(|()| Endorsement::of(leaf));
    let endorsement = rows.value(check::LEAF, read);
    rows.made(check::ALGORITHM, algorithm(report));
    rows.made(check::SIGNATURE, signature(chain, bytes));
    let known = endorsement.as_ref()?;
    rows.made(check::PRODUCT, product(report, known, &chain.ask.issuer()));
    rows.made(check::KEY_TCB, key_tcb(report, known));
    match &known.hwid {
        Some(_) if report.chip_id == [0; 64] && waivers.has(check::CHIP_ID.name) => {
            rows.waived(check::KEY_CHIP);
            rows.note("the host masks the chip id".into());
        }
        Some(hwid) => rows.made(check::KEY_CHIP, key_chip(report, hwid)),
        None => {
            rows.made(check::KEY_CHIP, Ok(()));
            rows.note("a VLEK belongs to a provider and to no chip".into());
        }
    }
    endorsement
}

fn algorithm(report: &Report) -> Result<(), String> {
    match (report.signing_key, report.algorithm) {
        (SigningKey::Vcek | SigningKey::Vlek, 1) if !report.mask_chip_key => Ok(()),
        (SigningKey::None, _) => Err("the report is not signed, at the host's request".into()),
        (key, number) => Err(format!(
            "signed by {key:?} with algorithm {number:#x}, chip key masked: {}",
            report.mask_chip_key
        )),
    }
}

fn signature(chain: &Chain, bytes: &[u8]) -> Result<(), String> {
    let key = chain.leaf.key();
    let curve = key.owned_to_ref().algorithm.parameters_oid();
    const P384: &str = "1.3.132.0.34";
    if !curve.is_ok_and(|oid| oid.to_string() == P384) {
        return Err("the certified key is not of the curve P-384".into());
    }
    let point = key.subject_public_key.raw_bytes();
    let key = VerifyingKey::from_sec1_bytes(point)
        .map_err(|_| "the certified key is no point of the curve P-384")?;
    let scalar = |at: usize| {
        let mut big_endian = [0; 48];
        big_endian.copy_from_slice(&bytes[at..at + 48]);
        big_endian.reverse();
        big_endian
    };
    let (r, s) = (scalar(SIGNED_LEN), scalar(SIGNED_LEN + SCALAR));
    let signature = Signature::from_scalars(r, s).map_err(|_| "it is no pair of scalars")?;
    key.verify(&bytes[..SIGNED_LEN], &signature)
        .map_err(|_| "it does not verify with the certified key".into())
}

fn product(report: &Report, key: &Endorsement, root: &str) -> Result<(), String> {
    let has = key.product;
    if let Some((family, model, _)) = report.cpuid_fms {
        let processor = Product::from_cpuid(family, model);
        if processor != Some(has) {
            return Err(format!(
                "the key is of {}, the processor of family {family:#x}, model {model:#x}",
                has.name()
            ));
        }
    }
    match root.strip_prefix("ARK-").and_then(Product::from_name) {
        Some(product) if product == has => Ok(()),
        _ => Err(format!("the key is of {}, its root is {root}", has.name())),
    }
}

fn key_tcb(report: &Report, key: &Endorsement) -> Result<(), String> {
    let tcbs = [
        ("current", report.current_tcb),
        ("committed", report.committed_tcb),
        ("launch", report.launch_tcb),
        ("reported", report.reported_tcb),
    ];
    let mut reported = Tcb::default();
    for (name, bytes) in tcbs {
        reported = Tcb::from_bytes(key.product, bytes)
            .ok_or_else(|| format!("the {name} TCB has reserved bytes that are not zero"))?;
    }
    match reported == key.tcb {
        true => Ok(()),
        false => Err(format!("the key is of {}, reported is {reported}", key.tcb)),
    }
}

fn key_chip(report: &Report, hwid: &[u8]) -> Result<(), String> {
    let mut padded = [0; 64];
    if let Some(slot) = padded.get_mut(..hwid.len()) {
        slot.copy_from_slice(hwid);
    }
    if report.chip_id == [0; 64] {
        return Err("the host masks the chip id; waive chip-id to accept that".into());
    }
    crate::row::same("chip id", &report.chip_id, &padded)
}

fn validity(chain: &Chain, now: u64) -> Result<(), String> {
    for certificate in [&chain.leaf, &chain.ask].into_iter().chain(&chain.ark) {
        let (from, to) = certificate.validity();
        if !(from..=to).contains(&now) {
            let name = certificate.subject();
            return Err(format!(
                "{name} is valid from {from} to {to}, not at {now} (Unix time)"
            ));
        }
    }
    Ok(())
}

fn revocation(
    rows: &mut Rows<'_>,
    chain: &Chain,
    root: Option<&Root>,
    crl: Option<&[u8]>,
    now: u64,
) {
    rows.asked(check::REVOCATION, crl, |der| {
        let text = |error: crate::x509::X509Error| error.to_string();
        let root = root.ok_or("there is no trusted root to verify the list with")?;
        let crl = Crl::from_der(der).map_err(text)?;
        if !crl.is_of_issuer_of(&chain.ask) {
            return Err(format!("the list is not one of {}", chain.ask.issuer()));
        }
        crl.verify(root.key()).map_err(text)?;
        let (from, to) = crl.validity();
        if now < from || to.is_some_and(|to| now > to) {
            return Err(format!("the list is of {from} (Unix time), not of {now}"));
        }
        match crl.revokes(&chain.ask) {
            true => Err(format!("{} is revoked", chain.ask.subject())),
            false => Ok(()),
        }
    });
}

impl Verified {
    /// The kind of key that signed.
    pub fn key_kind(&self) -> Option<KeyKind> {
        match self.report?.signing_key {
            SigningKey::Vcek => Some(KeyKind::Vcek),
            SigningKey::Vlek => Some(KeyKind::Vlek),
            _ => None,
        }
    }
}
