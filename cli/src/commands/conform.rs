//! `kvm-ops conform`: recorded vectors against the software platforms.

use std::io::Write;
use std::path::PathBuf;

use clap::Subcommand;

use crate::exit_code::Code;
use crate::failure::Outcome;

/// Replays recorded vectors against a software platform
///
/// Each PATH is a file or a folder; files may be compressed with gzip or Zstandard, and those of
/// `tdx` may be tar archives. For each file that fails, the first difference is printed with what
/// was expected and what came; the last line counts.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops conform tdx tests/vectors/tdx
  kvm-ops conform sev tests/vectors/sev

The exit code is 0 if everything passed, 1 if anything differs or nothing was found.")]
pub(crate) struct Args {
    #[command(subcommand)]
    platform: Platform,
}

#[derive(Debug, Subcommand)]
enum Platform {
    /// Transcripts of a TDX module, against the software TDX module
    Tdx {
        /// Files and folders of transcripts
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,

        /// Keep private memory encrypted during the replay; the answers must be the same
        #[arg(long)]
        encrypt: bool,
    },
    /// Measurement vectors of the AMD SP, against the software AMD SP
    Sev {
        /// Files and folders of vectors
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
    },
}

pub(crate) fn run(args: &Args) -> Outcome {
    let (report, success) = match &args.platform {
        Platform::Tdx { paths, encrypt } => tdx(paths, *encrypt)?,
        Platform::Sev { paths } => sev(paths)?,
    };
    writeln!(std::io::stdout().lock(), "{report}")?;
    Ok(if success { Code::Fine } else { Code::Refused })
}

/// The report of a replay, and true if everything passed.
type Replay = Outcome<(String, bool)>;

fn tdx(paths: &[PathBuf], encrypt: bool) -> Replay {
    use soft_tdx_module::conform::{Options, replay_paths};

    let options = Options {
        encrypt_memory: encrypt,
    };
    let summary = replay_paths(paths, options);
    Ok((summary.to_string(), summary.is_success()))
}

fn sev(paths: &[PathBuf]) -> Replay {
    let summary = soft_amd_sp::conform::replay_paths(paths);
    Ok((summary.to_string(), summary.is_success()))
}
