//! `kvm-ops attest`: evidence of confidential VMs, made and verified.

mod args;
mod fields;
mod files;
mod new;
mod rows;
mod verify;

pub(crate) use args::Args;
use args::What;

use crate::failure::Outcome;

pub(crate) fn run(args: &Args) -> Outcome {
    match &args.what {
        What::New(args) => new::run(args),
        What::Verify(args) => verify::run(args),
    }
}
