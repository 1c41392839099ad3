//! `kvm-ops attest`: evidence of confidential VMs, made and verified.

#![cfg_attr(
    not(feature = "sev"),
    allow(dead_code) // Without the platform, the options and the reason why not are left.
)]

mod args;
#[cfg(feature = "sev")]
mod fields;
#[cfg(feature = "sev")]
mod files;
#[cfg(feature = "sev")]
mod new;
#[cfg(feature = "sev")]
mod rows;
#[cfg(feature = "sev")]
mod verify;

pub(crate) use args::Args;
use args::What;

use crate::failure::Outcome;

#[cfg(feature = "sev")]
pub(crate) fn run(args: &Args) -> Outcome {
    match &args.what {
        What::New(args) => new::run(args),
        What::Verify(args) => verify::run(args),
    }
}

#[cfg(not(feature = "sev"))]
pub(crate) fn run(args: &Args) -> Outcome {
    use crate::failure::Failure;
    let what = match &args.what {
        What::New(_) => "make",
        What::Verify(_) => "verify",
    };
    Err(
        Failure::new(format!("this build cannot {what} reports of SNP guests"))
            .hint("build with the cargo feature `sev`"),
    )
}
