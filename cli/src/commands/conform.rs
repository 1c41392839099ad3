//! `kvm-ops conform`: recorded vectors against the software platforms.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;

use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

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

A file in a folder that cannot be replayed counts as failed. A PATH that leads to no file or folder, or
to none with vectors, is refused.")]
pub(crate) struct Args {
    #[command(subcommand)]
    platform: Platform,

    /// Report as JSON on standard output
    #[arg(long, global = true)]
    json: bool,
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
    let paths = match &args.platform {
        Platform::Tdx { paths, .. } | Platform::Sev { paths } => paths,
    };
    paths.iter().try_for_each(|path| check(path))?;
    let (text, report) = match &args.platform {
        Platform::Tdx { paths, encrypt } => tdx(paths, *encrypt),
        Platform::Sev { paths } => sev(paths),
    };
    if report.passed + report.failed == 0 {
        return Err(Failure::new("no vectors were found")
            .hint("name files, or folders with files of recorded vectors")
            .code(Code::Input));
    }
    let code = match report.failed {
        0 => Code::Fine,
        _ => Code::Negative,
    };
    if args.json {
        term::say_json(&report)?;
    } else {
        term::say(text)?;
    }
    Ok(code)
}

/// Refuses a path that is named and leads to neither a file nor a folder.
fn check(path: &Path) -> Result<(), Failure> {
    let what = || format!("the vectors {} cannot be used", path.display());
    let metadata = std::fs::metadata(path)
        .map_err(|error| Failure::because(what(), error).code(Code::Input))?;
    if metadata.is_file() || metadata.is_dir() {
        return Ok(());
    }
    Err(Failure::because(what(), "not a regular file")
        .hint("copy what it holds into a file first")
        .code(Code::Input))
}

/// The report in JSON.
#[derive(Serialize)]
struct Report {
    platform: &'static str,
    passed: usize,
    failed: usize,
    failures: Vec<Failed>,
    /// The outcomes that the transcripts have, and how often. Transcripts of a TDX module only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    coverage: Vec<Covered>,
}

/// A transcript or vector that did not pass.
#[derive(Serialize)]
struct Failed {
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    vector: Option<String>,
    why: String,
}

#[derive(Serialize)]
struct Covered {
    leaf: String,
    status: String,
    operand: String,
    count: u64,
}

fn tdx(paths: &[PathBuf], encrypt: bool) -> (String, Report) {
    use soft_tdx_module::conform::{Options, replay_paths};

    let options = Options {
        encrypt_memory: encrypt,
    };
    let summary = replay_paths(paths, options);
    let failures = summary.files.iter().filter_map(|file| {
        Some(Failed {
            file: file.name.clone(),
            vector: None,
            why: file.difference.as_ref()?.to_string(),
        })
    });
    let coverage = summary.coverage.0.iter();
    let report = Report {
        platform: "tdx",
        passed: summary.passed(),
        failed: summary.failed(),
        failures: failures.collect(),
        coverage: coverage
            .map(|((leaf, status, operand), count)| Covered {
                leaf: leaf.clone(),
                status: status.clone(),
                operand: operand.clone(),
                count: *count,
            })
            .collect(),
    };
    (summary.to_string(), report)
}

fn sev(paths: &[PathBuf]) -> (String, Report) {
    let summary = soft_amd_sp::conform::replay_paths(paths);
    let failures = summary.failures.iter().map(|failure| Failed {
        file: failure.file.display().to_string(),
        vector: failure.vector.clone(),
        why: failure.reason.clone(),
    });
    let report = Report {
        platform: "sev",
        passed: summary.passed,
        failed: summary.failed(),
        failures: failures.collect(),
        coverage: Vec::new(),
    };
    (summary.to_string(), report)
}
