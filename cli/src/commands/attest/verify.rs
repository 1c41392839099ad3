//! `kvm-ops attest verify`: checks evidence, row by row.

use std::path::Path;
use std::time::SystemTime;

use kvm_ops_attest::{Check, Waivers};

use super::args::{TechChoice, VerifyArgs};
use super::files;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};

pub(super) fn run(args: &VerifyArgs) -> Outcome {
    let tech = technology(args);
    // An option about the other technology would never be checked.
    let (stray, whose) = match tech {
        TechChoice::Snp => (args.tdx.given(), "quotes of TDs"),
        TechChoice::Tdx => (args.snp.given(), "reports of SNP guests"),
    };
    if let Some(option) = stray {
        let what = format!("{option} is about {whose}, and the evidence is none");
        return Err(Failure::new(what).code(Code::Usage));
    }
    match tech {
        TechChoice::Snp => super::snp::verify_report(args),
        TechChoice::Tdx => super::tdx::verify_quote(args),
    }
}

fn technology(args: &VerifyArgs) -> TechChoice {
    match is_quote(&args.evidence, args.tdx.collateral.as_deref()) {
        true => TechChoice::Tdx,
        false => TechChoice::Snp,
    }
}

/// A quote comes with collateral, a report without.
pub(super) fn is_quote(evidence: &Path, collateral: Option<&Path>) -> bool {
    collateral.is_some() || evidence.join(files::QUOTE).exists()
}

pub(super) fn waivers(args: &VerifyArgs, known: &[Check]) -> Result<Waivers, Failure> {
    Waivers::new(args.waive.iter().map(String::as_str), known)
        .map_err(|error| Failure::new(error.to_string()).code(Code::Usage))
}

/// The time that was stated, or now.
pub(super) fn time(stated: Option<u64>) -> Result<u64, Failure> {
    if let Some(time) = stated {
        return Ok(time);
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.map_err(|error| Failure::because("the clock is before 1970", error))?;
    Ok(since.as_secs())
}
