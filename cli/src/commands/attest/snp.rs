//! `attest verify` of reports of SNP guests.

use std::path::{Path, PathBuf};

use kvm_ops_attest::snp::{CHECKS, Evidence, Expected, Roots, Tcb, verify};
use kvm_ops_attest::x509::bundle;

use super::args::{RootChoice, VerifyArgs};
use super::fields;
use super::files::{self, read};
use super::rows::Findings;
use super::verify::{time, waivers};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};

pub(super) fn verify_report(args: &VerifyArgs) -> Outcome {
    let waivers = waivers(args, &CHECKS)?;
    let expected = expected(args)?;
    let roots = roots(args.root.as_ref())?;
    let input = Input::read(
        &args.evidence,
        &args.snp.cert_chain,
        args.snp.crl.as_deref(),
    )?;
    let certificates: Vec<&[u8]> = input.certificates.iter().map(Vec::as_slice).collect();
    let evidence = Evidence {
        report: &input.report,
        certificates: &certificates,
        crl: input.crl.as_deref(),
    };
    let verified = verify(&evidence, &roots, &expected, &waivers, time(args.time)?);
    let fields = verified
        .report
        .map(|report| fields::of_report(&report, verified.product))
        .unwrap_or_default();
    Findings {
        evidence: &args.evidence,
        technology: "snp",
        verdict: &verified.verdict,
        fields,
    }
    .tell(args.json)
}

fn expected(args: &VerifyArgs) -> Result<Expected, Failure> {
    let snp = &args.snp;
    let tcb = snp.min_tcb.as_deref().map(Tcb::parse).transpose();
    let tcb = tcb.map_err(|error| {
        Failure::because("the value of --min-tcb is no TCB", error).code(Code::Usage)
    })?;
    Ok(Expected {
        measurement: snp.measurement.map(|value| value.0),
        report_data: args.report_data.map(|value| value.0),
        host_data: snp.host_data.map(|value| value.0),
        vmpl: snp.vmpl,
        policy: snp.policy,
        tcb,
        chip_id: snp.chip_id.map(|value| value.0),
        id_key: snp.id_key.map(|value| value.0),
        author_key: snp.author_key.map(|value| value.0),
        guest_svn: snp.min_guest_svn,
    })
}

pub(super) fn roots(choice: Option<&RootChoice>) -> Result<Roots, Failure> {
    let path = match choice {
        None => return Ok(Roots::amd()),
        Some(RootChoice::Software) => return Ok(Roots::software()),
        Some(RootChoice::File(path)) => path,
    };
    let refuse = |why: String| {
        let what = format!("{} is no root to trust", path.display());
        Failure::because(what, why).code(Code::Input)
    };
    let found = bundle(&read(path)?).map_err(|error| refuse(error.to_string()))?;
    match found.as_slice() {
        [root] => Roots::given(root).map_err(|error| refuse(error.to_string())),
        several => Err(refuse(format!("{} certificates", several.len()))
            .hint("name a file with the root's certificate alone")),
    }
}

/// The evidence to verify, read from files.
pub(super) struct Input {
    pub(super) report: Vec<u8>,
    pub(super) certificates: Vec<Vec<u8>>,
    crl: Option<Vec<u8>>,
}

impl Input {
    /// Reads the files that are named, or those of the directory.
    pub(super) fn read(
        evidence: &Path,
        cert_chain: &[PathBuf],
        crl: Option<&Path>,
    ) -> Result<Self, Failure> {
        let directory = evidence.is_dir().then_some(evidence);
        let there = |name: &str| directory.map(|directory| directory.join(name));
        let mut chain = cert_chain.to_vec();
        if chain.is_empty() {
            chain.extend(there(files::CHAIN));
        }
        if chain.is_empty() {
            return Err(Failure::new("a report needs its chain of certificates")
                .hint("name it with --cert-chain, or a directory that has both")
                .code(Code::Usage));
        }
        let list = crl.map(Path::to_path_buf).or(there(files::CRL));
        // The list is optional in a directory, but required if an option names it.
        let list = list.filter(|path| crl.is_some() || path.exists());
        let report = there(files::REPORT).unwrap_or_else(|| evidence.to_path_buf());
        let all = |paths: &[PathBuf]| -> Result<Vec<_>, Failure> {
            paths.iter().map(|path| read(path)).collect()
        };
        Ok(Self {
            report: read(&report)?,
            certificates: all(&chain)?,
            crl: list.as_deref().map(read).transpose()?,
        })
    }
}
