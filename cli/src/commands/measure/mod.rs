//! `kvm-ops measure`: launch digests, computed off line.

mod sev;
mod tdx;

use std::fs;
use std::path::Path;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::term;

/// Computes what a confidential VM measures at its launch, from its firmware image
///
/// Nothing is launched. The digest is what an attestation report of the VM must contain: MRTD of a
/// TD, the launch digest of an SEV guest.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops measure tdx OVMF.fd
  kvm-ops measure tdx OVMF.fd --order both
  kvm-ops measure sev OVMF.fd --kernel bzImage --append 'console=ttyS0'
  kvm-ops measure seves OVMF.fd --vcpus 4 --vcpu-type EPYC-Milan
  kvm-ops measure snp OVMF.fd --vcpus 4 --vcpu-type EPYC-v4 --guest-features 0x1 --json

Options of sev, seves and snp that sev-snp-measure has, too, mean the same and have its defaults.
The exit code is 1 if the image cannot be read, or cannot be launched in that way.")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Tdx(tdx::Args),
    Sev(sev::SevArgs),
    Seves(sev::SevEsArgs),
    Snp(sev::SnpArgs),
}

pub(crate) fn run(args: &Args) -> Outcome {
    match &args.what {
        What::Tdx(args) => tdx::run(args),
        What::Sev(args) => sev::run(sev::Measured::of_sev(args)),
        What::Seves(args) => sev::run(sev::Measured::of_sev_es(args)),
        What::Snp(args) => sev::run(sev::Measured::of_snp(args)),
    }
}

/// How a digest is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// Lower-case hexadecimal digits
    #[default]
    Hex,
    /// Base64 with padding
    Base64,
}

impl OutputFormat {
    fn write(self, digest: &[u8]) -> String {
        use base64::Engine;
        match self {
            Self::Hex => hex::encode(digest),
            Self::Base64 => base64::engine::general_purpose::STANDARD.encode(digest),
        }
    }
}

fn read(what: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| {
        Failure::because(
            format!("the {what} {} cannot be read", path.display()),
            error,
        )
    })
}

fn say_json(report: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::because("cannot write the report", error))?;
    Ok(term::say(text)?)
}
