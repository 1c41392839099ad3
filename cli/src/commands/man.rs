//! `kvm-ops man`: the manual pages.

use std::io::Write;
use std::path::PathBuf;

use clap::CommandFactory;

use crate::args::Cli;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};

/// Prints the manual page, or writes one page a command into a directory.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops man | man -l -
  kvm-ops man --into ~/.local/share/man/man1")]
pub(crate) struct Args {
    /// Write kvm-ops.1, kvm-ops-run.1 and so on into this directory, which must exist
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Outcome {
    let command = Cli::command();
    match &args.into {
        Some(dir) => clap_mangen::generate_to(command, dir).map_err(|error| {
            Failure::because(format!("cannot write to {}", dir.display()), error)
        })?,
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            std::io::stdout().lock().write_all(&page)?;
        }
    }
    Ok(Code::Fine)
}
