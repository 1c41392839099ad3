//! The command line.

use crate::commands::migrate;
use crate::commands::{attest, completions, conform, doctor, fleet, man, measure, run, with};
use crate::exit_code;
use clap::{ArgAction, Parser, Subcommand, ValueEnum};

/// Holds normal and confidential VMs alike, on /dev/kvm or on a software platform
#[derive(Debug, Parser)]
#[command(
    name = "kvm-ops",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = after_help(),
)]
pub(crate) struct Cli {
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Show the library's steps on standard error; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count, display_order = 100)]
    pub(crate) verbose: u8,
}

const EXAMPLES: &str = "\
Examples:
  kvm-ops doctor                            what this host offers, and why not
  kvm-ops fleet                             run the built-in fleet
  kvm-ops fleet --show-default > my.toml    a fleet file to start from
  kvm-ops run /usr/share/seabios/bios.bin   boot a firmware image
  kvm-ops run --tech tdx                    a small TD on the software platform, step by step
  kvm-ops measure tdx OVMF.fd               what a TD of that firmware must attest
  kvm-ops attest new demo                   an SNP guest's report, to be verified
  kvm-ops migrate hosts                     a SEV guest travels between two hosts as it runs
  kvm-ops conform tdx tests/vectors/tdx     recorded transcripts against the software TDX module
  kvm-ops with --amd -- ./my-vmm            a program of yours on a software /dev/kvm";

fn after_help() -> String {
    format!("{EXAMPLES}\n\n{}", exit_code::help())
}

/// The commands. Their help is what stands above each one's `Args`, in its file.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Doctor(doctor::Args),
    Run(run::Args),
    Fleet(fleet::Args),
    Measure(measure::Args),
    Attest(attest::Args),
    Migrate(migrate::Args),
    Conform(conform::Args),
    With(with::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Where VMs run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum HostChoice {
    /// /dev/kvm where it can hold the VM, else the software platform
    #[default]
    Auto,
    /// The real /dev/kvm
    Kvm,
    /// The software platform: machine code in normal VMs, guest programs in confidential ones
    Sim,
}

impl HostChoice {
    /// The name on the command line and in fleet files.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Sim => "sim",
        }
    }

    /// Every choice.
    pub(crate) const ALL: [Self; 3] = [Self::Auto, Self::Kvm, Self::Sim];
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
