//! `kvm-ops attest`: attestation reports of SNP guests, made and verified.

#![cfg_attr(
    not(feature = "sev"),
    allow(dead_code) // Without the platform, the options and the reason why not are left.
)]
mod fields;
mod new;
mod verify;

use std::path::PathBuf;

use clap::Subcommand;

use crate::failure::Outcome;

/// Verifies attestation reports of SNP guests, and makes some to verify
///
/// A report is an SNP guest's proof of what it was launched with, signed by the key of the chip that
/// runs it. The chain of certificates leads from that key to the vendor's root.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Certificates are in the layout of the SEV API, which the software AMD SP uses for all of them. Real
VCEKs are X.509 and real roots have RSA keys; this program reads neither.

Examples:
  kvm-ops attest new demo
  kvm-ops attest verify demo
  kvm-ops attest verify report.bin --cert-chain certs.bin --root ark.bin --measurement HEX")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    New(NewArgs),
    Verify(VerifyArgs),
}

/// Launches a small SNP guest on a software AMD SP, and writes its report into a directory
///
/// The directory then has report.bin, cert_chain.bin (VCEK, ASK and ARK) and measurement.hex, the
/// launch digest that was computed without the platform. Files that exist are not overwritten.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops attest new demo
  kvm-ops attest new demo --report-data 00112233 && kvm-ops attest verify demo --report-data 00112233")]
struct NewArgs {
    /// The directory; it is created if it does not exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// What the guest puts into its report: at most 64 bytes in hex, zeros follow
    #[arg(long, value_name = "HEX", default_value = "", hide_default_value = true,
          value_parser = parse_hex::<64>)]
    report_data: Padded<64>,
}

/// Checks a report against its chain of certificates and a trusted root, and shows what it says
///
/// Every check is listed. What a report says is shown only if all of them passed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The exit code is 0 if every check passed, 1 if one failed or a file cannot be read. With a directory
of `kvm-ops attest new`, the expected measurement is the one in it, unless another is stated.

Examples:
  kvm-ops attest verify demo
  kvm-ops attest verify demo --measurement $(kvm-ops measure snp OVMF.fd --vcpus 1 --vcpu-type EPYC-v4)
  kvm-ops attest verify report.bin --cert-chain certs.bin --json")]
struct VerifyArgs {
    /// The report, or a directory that `kvm-ops attest new` has written
    #[arg(value_name = "REPORT|DIR")]
    report: PathBuf,

    /// VCEK, ASK and ARK, one after another
    #[arg(long, value_name = "FILE")]
    cert_chain: Option<PathBuf>,

    /// The ARK that is trusted, instead of the software platform's
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,

    /// The launch digest that the report must have
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    measurement: Option<Padded<48>>,

    /// What the guest must have put into the report: at most 64 bytes, zeros follow
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<64>)]
    report_data: Option<Padded<64>>,

    /// Believe a guest whose policy lets the host debug it
    #[arg(long)]
    allow_debug: bool,

    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Bytes of the command line.
#[derive(Clone, Copy, Debug)]
struct Padded<const N: usize>([u8; N]);

fn parse_hex<const N: usize>(text: &str) -> Result<Padded<N>, String> {
    let bytes = hex::decode(text).map_err(|error| error.to_string().to_lowercase())?;
    let mut padded = [0; N];
    padded
        .get_mut(..bytes.len())
        .ok_or_else(|| format!("{} bytes are more than {N}", bytes.len()))?
        .copy_from_slice(&bytes);
    Ok(Padded(padded))
}

fn parse_exact<const N: usize>(text: &str) -> Result<Padded<N>, String> {
    if text.len() != 2 * N {
        return Err(format!(
            "{} digits are not the {} of {N} bytes",
            text.len(),
            2 * N
        ));
    }
    parse_hex(text)
}
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

/// The files in a directory of `attest new`.
mod files {
    pub(super) const REPORT: &str = "report.bin";
    pub(super) const CHAIN: &str = "cert_chain.bin";
    pub(super) const MEASUREMENT: &str = "measurement.hex";
}
