//! `kvm-ops completions`: completions for a shell.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use crate::args::Cli;
use crate::exit_code::Code;
use crate::failure::Outcome;

/// Prints the completions that a shell loads.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops completions bash > /etc/bash_completion.d/kvm-ops
  kvm-ops completions zsh > ~/.zfunc/_kvm-ops
  kvm-ops completions fish > ~/.config/fish/completions/kvm-ops.fish")]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Args) -> Outcome {
    // `generate` panics if its writer fails, so it writes to a buffer.
    let mut text = Vec::new();
    generate(args.shell, &mut Cli::command(), "kvm-ops", &mut text);
    std::io::stdout().lock().write_all(&text)?;
    Ok(Code::Fine)
}
