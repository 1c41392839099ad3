//! `kvm-ops attest verify`: checks evidence, row by row.

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

/// A quote comes with collateral, a report without.
fn technology(args: &VerifyArgs) -> TechChoice {
    let is_quote = args.tdx.collateral.is_some() || args.evidence.join(files::QUOTE).exists();
    match is_quote {
        true => TechChoice::Tdx,
        false => TechChoice::Snp,
    }
}

pub(super) fn waivers(args: &VerifyArgs, known: &[Check]) -> Result<Waivers, Failure> {
    Waivers::new(args.waive.iter().map(String::as_str), known)
        .map_err(|error| Failure::new(error.to_string()).code(Code::Usage))
}

pub(super) fn time(args: &VerifyArgs) -> Result<u64, Failure> {
    if let Some(time) = args.time {
        return Ok(time);
    }
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.map_err(|error| Failure::because("the clock is before 1970", error))?;
    Ok(since.as_secs())
}
