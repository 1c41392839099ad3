//! `kvm-ops doctor`: shows the technologies of this host.

use crate::doctor::{Diagnosis, text};
use crate::exit_code::Code;
use crate::failure::Outcome;
use crate::term;

/// Shows what this host offers for each technology, why not, and what to do.
///
/// Every "yes" was tried: a VM of the technology was created and closed again. THIS HOST is what the
/// kernel's KVM offers to any program; the other columns are what this build of kvm-ops creates, on
/// /dev/kvm and on the software platform that it brings along.
///
/// The exit code is 0 whatever is found.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops doctor
  kvm-ops doctor --json | jq '.technologies[] | {name, host: .host.offered}'")]
pub(crate) struct Args {
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let diagnosis = Diagnosis::make();
    if args.json {
        term::say_json(&diagnosis)?;
    } else {
        term::say(text::text(&diagnosis))?;
    }
    Ok(Code::Fine)
}
