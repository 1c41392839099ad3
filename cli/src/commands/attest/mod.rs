//! `kvm-ops attest`: evidence of confidential VMs, made, shown and verified.

mod args;
mod fields;
mod files;
mod flip;
mod inspect;
mod new_snp;
mod new_td;
mod rows;
mod samples;
mod snp;
mod tdx;
mod verify;
mod written;

pub(crate) use args::Args;
use args::{TechChoice, What};

use crate::failure::Outcome;

pub(crate) fn run(args: &Args) -> Outcome {
    match &args.what {
        What::Flip(args) => flip::run(args),
        What::Inspect(args) => inspect::run(args),
        What::New(args) => match args.tech {
            TechChoice::Snp => new_snp::new_report(args),
            TechChoice::Tdx => new_td::new_quote(args),
        },
        What::Samples(args) => samples::run(args),
        What::Verify(args) => verify::run(args),
    }
}
