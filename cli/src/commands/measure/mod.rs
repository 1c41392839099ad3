//! `kvm-ops measure`: launch digests, computed off line.

mod sev;
mod tdx;

use std::path::Path;

use clap::{Subcommand, ValueEnum};
use kvm_ops_machine::{FileKind, ImageFormat, Recognition};
use kvm_ops_tdvf::TdvfError;

use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;

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
A file that is no firmware is refused: no VM would attest its digest.")]
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

/// Refuses an image without the TDX metadata that a TD starts with, and says what it is.
pub(crate) fn not_tdvf(path: &Path, image: &[u8], error: TdvfError) -> Failure {
    let without = matches!(
        error,
        TdvfError::NoTable { .. } | TdvfError::NoMetadata { .. }
    );
    let what = format!("{} cannot be launched as a TD", path.display());
    if !without {
        return Failure::because(what, error).code(Code::Input);
    }
    let found = Recognition::of(image);
    let kind = found.kind();
    let why = format!("it is {kind} ({}); {error}", found.why());
    let failure = Failure::because(what, why).code(Code::Input);
    match kind {
        FileKind::Rom | FileKind::Ovmf | FileKind::Unknown => failure.hint(
            "of OVMF's builds, OvmfPkgX64 and IntelTdxX64 have TDX metadata, in the file that holds \
             code and variables",
        ),
        FileKind::VariableStore | FileKind::CutFirmware | FileKind::Packed => {
            failure.hint(kind.advice())
        }
        _ => failure.hint("name a firmware image with TDX metadata, such as OVMF.fd"),
    }
}

/// Reads a firmware image to be measured as an SEV guest's. A digest of anything else is a mistake
/// that nobody would notice: no guest ever attests it.
fn read_firmware(path: &Path) -> Result<Vec<u8>, Failure> {
    let image = files::read("the image", path, files::FIRMWARE)?;
    let found = Recognition::of(&image);
    let kind = found.kind();
    if kind.format() == Some(ImageFormat::Firmware) {
        return Ok(image);
    }
    let what = format!("{} is no firmware", path.display());
    let hint = match kind {
        FileKind::VariableStore | FileKind::CutFirmware | FileKind::Empty | FileKind::Blank => {
            kind.advice()
        }
        FileKind::BzImage => "name the firmware, and the kernel with --kernel",
        _ => "name a ROM with code at its reset vector, such as OVMF.fd",
    };
    let why = format!("it is {kind}: {}", found.why());
    Err(Failure::because(what, why).hint(hint).code(Code::Input))
}
