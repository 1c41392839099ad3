//! `kvm-ops attest verify`: whether a report is to be believed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};
use soft_amd_sp::RootOfTrust;
use soft_amd_sp::attestation::{CertChain, Report, VerifyError, verify_report};
use soft_amd_sp::crypto::{CERT_LEN, CertUsage, Certificate};
use soft_amd_sp::snp_policy;

use super::{VerifyArgs, fields, files};
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

/// A check, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Check {
    Form,
    Root,
    Ark,
    Ask,
    Vcek,
    Signed,
    Signature,
    Debug,
    Measurement,
    ReportData,
}

impl Check {
    /// Those that are always made.
    const ALWAYS: [Self; 8] = [
        Self::Form,
        Self::Root,
        Self::Ark,
        Self::Ask,
        Self::Vcek,
        Self::Signed,
        Self::Signature,
        Self::Debug,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Form => "form",
            Self::Root => "root",
            Self::Ark => "ark",
            Self::Ask => "ask",
            Self::Vcek => "vcek",
            Self::Signed => "algorithm",
            Self::Signature => "signature",
            Self::Debug => "debugging",
            Self::Measurement => "measurement",
            Self::ReportData => "report-data",
        }
    }

    const fn about(self) -> &'static str {
        match self {
            Self::Form => "report and certificates can be read",
            Self::Root => "the chain ends at the trusted root",
            Self::Ark => "the ARK is signed by itself",
            Self::Ask => "the ASK is signed by the ARK",
            Self::Vcek => "the VCEK is signed by the ASK",
            Self::Signed => "the report is signed, by a VCEK with ECDSA P-384 and SHA-384",
            Self::Signature => "the signature is the VCEK's",
            Self::Debug => "the policy forbids the host to debug the guest",
            Self::Measurement => "the launch digest is the expected one",
            Self::ReportData => "the report data is the expected one",
        }
    }

    /// The check that an error of the library belongs to.
    fn of(error: &VerifyError) -> Self {
        match error {
            VerifyError::Root => Self::Root,
            VerifyError::Chain(CertUsage::Ark) => Self::Ark,
            VerifyError::Chain(CertUsage::Ask) => Self::Ask,
            VerifyError::Chain(_) => Self::Vcek,
            VerifyError::Unsigned | VerifyError::Algorithm => Self::Signed,
            VerifyError::Signature => Self::Signature,
            _ => Self::Form,
        }
    }
}

/// What is to be verified, read from files.
struct Input {
    report: Vec<u8>,
    chain: Vec<u8>,
    root: Certificate,
    measurement: Option<[u8; 48]>,
}

pub(super) fn run(args: &VerifyArgs) -> Outcome {
    let input = Input::read(args)?;
    let mut checks = Check::ALWAYS.to_vec();
    if input.measurement.is_some() {
        checks.push(Check::Measurement);
    }
    if args.report_data.is_some() {
        checks.push(Check::ReportData);
    }
    if args.allow_debug {
        checks.retain(|check| *check != Check::Debug);
    }
    match believe(args, &input) {
        Ok(report) => {
            if args.json {
                say_json(&Verdict::new(&checks, None, Some(&report)))?;
            } else {
                term::say(format!("{}\n\n{}", listed(&checks, None), shown(&report)))?;
            }
            Ok(Code::Fine)
        }
        Err((check, why)) => {
            if args.json {
                say_json(&Verdict::new(&checks, Some((check, &why)), None))?;
            } else {
                term::say(listed(&checks, Some(check)))?;
            }
            Err(Failure::because(
                format!(
                    "{} is not to be believed: the check `{}` failed",
                    args.report.display(),
                    check.name()
                ),
                why,
            ))
        }
    }
}

/// The report, or the check that it does not pass, and why.
fn believe(args: &VerifyArgs, input: &Input) -> Result<Report, (Check, String)> {
    let failed = |error: VerifyError| (Check::of(&error), error.to_string());
    let chain = CertChain::from_bytes(&input.chain).map_err(failed)?;
    let report = verify_report(&input.report, &chain, &input.root).map_err(failed)?;
    if report.policy & snp_policy::DEBUG != 0 && !args.allow_debug {
        let why = format!(
            "the policy {:#x} lets the host read and write the guest's memory",
            report.policy
        );
        return Err((Check::Debug, why));
    }
    let differs = |what: &str, has: &[u8], expected: &[u8]| {
        format!(
            "the {what} is {}, expected {}",
            hex::encode(has),
            hex::encode(expected)
        )
    };
    if let Some(expected) = input.measurement.filter(|m| *m != report.measurement) {
        let why = differs("measurement", &report.measurement, &expected);
        return Err((Check::Measurement, why));
    }
    let expected = args.report_data.map(|data| data.0);
    if let Some(expected) = expected.filter(|data| *data != report.report_data) {
        let why = differs("report data", &report.report_data, &expected);
        return Err((Check::ReportData, why));
    }
    Ok(report)
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path)
        .map_err(|error| Failure::because(format!("cannot read {}", path.display()), error))
}

impl Input {
    fn read(args: &VerifyArgs) -> Result<Self, Failure> {
        let directory = args.report.is_dir().then_some(&args.report);
        let in_directory = |name: &str| directory.map(|directory| directory.join(name));
        let report = in_directory(files::REPORT).unwrap_or_else(|| args.report.clone());
        let chain = args.cert_chain.clone().or(in_directory(files::CHAIN));
        let chain = chain.ok_or_else(|| {
            Failure::new("a report needs its chain of certificates")
                .hint("name it with --cert-chain, or a directory that has both")
                .code(Code::Usage)
        })?;
        let root = match &args.root {
            Some(path) => root(path)?,
            None => RootOfTrust::default().ark(),
        };
        let measurement = match args.measurement {
            Some(measurement) => Some(measurement.0),
            None => in_directory(files::MEASUREMENT)
                .map(measurement)
                .transpose()?,
        };
        Ok(Self {
            report: read(&report)?,
            chain: read(&chain)?,
            root,
            measurement,
        })
    }
}

fn root(path: &Path) -> Result<Certificate, Failure> {
    let bytes = read(path)?;
    let failure = || {
        Failure::new(format!(
            "{} is not the certificate of an ARK",
            path.display()
        ))
    };
    let length = bytes.len();
    let bytes: [u8; CERT_LEN] = bytes.try_into().map_err(|_| {
        failure().hint(format!(
            "it has {length:#x} bytes, a certificate has {CERT_LEN:#x}"
        ))
    })?;
    Certificate::from_bytes(&bytes)
        .filter(|certificate| certificate.usage() == Some(CertUsage::Ark))
        .ok_or_else(failure)
}

fn measurement(path: PathBuf) -> Result<[u8; 48], Failure> {
    let text = read(&path)?;
    let text = String::from_utf8_lossy(&text);
    super::parse_exact::<48>(text.trim())
        .map(|measurement| measurement.0)
        .map_err(|error| Failure::because(format!("{} is no measurement", path.display()), error))
}

/// The result of a check, given the one that failed.
fn outcome(check: Check, failed: Option<Check>) -> &'static str {
    match failed {
        Some(failed) if check == failed => "failed",
        Some(failed) if check > failed => "not made",
        _ => "ok",
    }
}

fn listed(checks: &[Check], failed: Option<Check>) -> String {
    let mut table = table(&["CHECK", "RESULT", ""]);
    for check in checks {
        table.add_row([check.name(), outcome(*check, failed), check.about()]);
    }
    finish(table)
}

fn shown(report: &Report) -> String {
    let mut table = table(&["FIELD", "VALUE"]);
    for field in fields::of(report) {
        table.add_row([field.name, &field.value]);
        if !field.meaning.is_empty() {
            table.add_row(["", &field.meaning]);
        }
    }
    finish(table)
}

#[derive(Serialize)]
struct Verdict {
    believed: bool,
    failed: Option<&'static str>,
    why: Option<String>,
    checks: Map<String, Value>,
    report: Option<Map<String, Value>>,
}

impl Verdict {
    fn new(checks: &[Check], failed: Option<(Check, &str)>, report: Option<&Report>) -> Self {
        let at = failed.map(|(check, _)| check);
        let text = |text: &str| Value::from(text);
        Self {
            believed: failed.is_none(),
            failed: at.map(Check::name),
            why: failed.map(|(_, why)| why.to_owned()),
            checks: checks
                .iter()
                .map(|check| (check.name().to_owned(), text(outcome(*check, at))))
                .collect(),
            report: report.map(|report| {
                fields::of(report)
                    .into_iter()
                    .map(|field| (field.name.replace(' ', "_"), Value::from(field.value)))
                    .collect()
            }),
        }
    }
}

fn say_json(verdict: &Verdict) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(verdict)
        .map_err(|error| Failure::because("cannot write the report", error))?;
    Ok(term::say(text)?)
}
