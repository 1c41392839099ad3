//! `attest verify` of quotes of TDs.

use std::path::Path;

use kvm_ops_attest::tdx::{CHECKS, Evidence, Expected, Root, verify};
use kvm_ops_attest::x509::bundle;

use super::args::{RootChoice, VerifyArgs};
use super::fields;
use super::files::{self, read};
use super::rows::Findings;
use super::verify::{time, waivers};
use crate::bytes::Bytes;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};

pub(super) fn verify_quote(args: &VerifyArgs) -> Outcome {
    let waivers = waivers(args, &CHECKS)?;
    let root = root(args.root.as_ref())?;
    let input = Input::read(&args.evidence, args.tdx.collateral.as_deref())?;
    let log = event_log(args)?;
    let evidence = Evidence {
        quote: &input.quote,
        collateral: &input.collateral,
        event_log: log.as_deref(),
    };
    let verified = verify(
        &evidence,
        &root,
        &expected(args),
        &waivers,
        time(args.time)?,
    );
    Findings {
        evidence: &args.evidence,
        technology: "tdx",
        verdict: &verified.verdict,
        fields: verified
            .quote
            .as_ref()
            .map(fields::of_quote)
            .unwrap_or_default(),
    }
    .tell(args.json)
}

/// The quote and its collateral, read from files.
pub(super) struct Input {
    pub(super) quote: Vec<u8>,
    pub(super) collateral: Vec<u8>,
}

impl Input {
    /// Reads the files that are named, or those of the directory.
    pub(super) fn read(evidence: &Path, collateral: Option<&Path>) -> Result<Self, Failure> {
        let directory = evidence.is_dir().then_some(evidence);
        let there = |name: &str| directory.map(|directory| directory.join(name));
        let quote = there(files::QUOTE).unwrap_or_else(|| evidence.to_path_buf());
        let collateral = collateral.map(Path::to_path_buf);
        let collateral = collateral.or(there(files::COLLATERAL)).ok_or_else(|| {
            Failure::new("a quote needs its collateral")
                .hint("name it with --collateral, or a directory that has both")
                .code(Code::Usage)
        })?;
        Ok(Self {
            quote: read(&quote)?,
            collateral: read(&collateral)?,
        })
    }
}

/// The event log: optional in a directory, but required if an option names it.
fn event_log(args: &VerifyArgs) -> Result<Option<Vec<u8>>, Failure> {
    let beside = args
        .evidence
        .is_dir()
        .then(|| args.evidence.join(files::EVENT_LOG));
    let path = args.tdx.event_log.clone();
    let path = path.or(beside.filter(|path| path.exists()));
    path.as_deref().map(read).transpose()
}

fn expected(args: &VerifyArgs) -> Expected {
    let tdx = &args.tdx;
    let value = |digest: Option<Bytes<48>>| digest.map(|digest| digest.0);
    Expected {
        mrtd: value(tdx.mrtd),
        rtmr: [tdx.rtmr0, tdx.rtmr1, tdx.rtmr2, tdx.rtmr3].map(value),
        mr_config_id: value(tdx.mrconfigid),
        mr_owner: value(tdx.mrowner),
        mr_owner_config: value(tdx.mrownerconfig),
        mr_seam: value(tdx.mrseam),
        attributes: tdx.attributes,
        xfam: tdx.xfam,
        report_data: args.report_data.map(|data| data.0),
        tcb_statuses: tdx.accept_tcb_status.clone(),
        advisories: tdx.accept_advisory.clone(),
        fmspc: tdx.fmspc.map(|fmspc| fmspc.0),
    }
}

pub(super) fn root(choice: Option<&RootChoice>) -> Result<Root, Failure> {
    let built_in = |root: Result<Root, kvm_ops_attest::x509::X509Error>| {
        root.map_err(|error| Failure::because("cannot read a root that is built in", error))
    };
    let path = match choice {
        None => return built_in(Root::intel()),
        Some(RootChoice::Software) => return built_in(Root::software()),
        Some(RootChoice::File(path)) => path,
    };
    let refuse = |why: String| {
        let what = format!("{} is no root to trust", path.display());
        Failure::because(what, why).code(Code::Input)
    };
    let found = bundle(&read(path)?).map_err(|error| refuse(error.to_string()))?;
    match <[_; 1]>::try_from(found) {
        Ok([root]) => Ok(Root::given(root)),
        Err(several) => Err(refuse(format!("{} certificates", several.len()))
            .hint("name a file with the root's certificate alone")),
    }
}
