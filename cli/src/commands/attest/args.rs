//! The options of `attest`.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::{Subcommand, ValueEnum};

use super::flip::FlipArgs;
use crate::bytes::{Bytes, parse_exact, parse_hex, parse_number};

/// Verifies evidence of confidential VMs from anywhere, and makes some to verify
///
/// Evidence is a guest's proof of what it was launched with: the report of an SNP guest, signed by the
/// key of the chip that runs it, or the quote of a TD, signed by a quoting enclave. Certificates lead
/// from these keys to the vendor's root.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops attest new demo
  kvm-ops attest verify report.bin --cert-chain vcek.der --cert-chain cert_chain.pem
  kvm-ops attest verify quote.bin --collateral collateral.json --mrtd HEX
  kvm-ops attest verify demo --root software --waive chip-id,tcb")]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub(super) enum What {
    Flip(FlipArgs),
    Inspect(InspectArgs),
    New(NewArgs),
    Samples(SamplesArgs),
    Verify(Box<VerifyArgs>),
}

/// Shows what a file of evidence says, without verifying it
///
/// The kind is told by the bytes: the report of an SNP guest, the report or quote of a TD,
/// certificates in DER or PEM, the certificate table of an extended guest request, a revocation
/// list, or the event log of a TD (/sys/firmware/acpi/tables/data/CCEL).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops attest inspect report.bin
  kvm-ops attest inspect quote.bin --json | jq -r .says.mrtd
  kvm-ops attest inspect /sys/firmware/acpi/tables/data/CCEL")]
pub(super) struct InspectArgs {
    /// The file
    #[arg(value_name = "FILE")]
    pub(super) evidence: PathBuf,

    /// Report as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Launches a small guest on a software platform, and writes its evidence into a directory
///
/// For an SNP guest these are report.bin, cert_chain.pem (VCEK, ASK and ARK, or VLEK, ASVK and ARK) and crl.der; for a TD
/// quote.bin, collateral.json and event_log.bin. What a verifier must expect is printed and not written there: it
/// must come from somebody else than the evidence. Files that exist are not overwritten.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops attest new demo
  kvm-ops attest new demo --product turin --report-data 00112233
  kvm-ops attest new demo --key vlek
  kvm-ops attest new td --tech tdx --quote-version 5")]
pub(super) struct NewArgs {
    /// The directory; it is created if it does not exist
    #[arg(value_name = "DIR")]
    pub(super) directory: PathBuf,

    /// The technology of the guest
    #[arg(long, value_enum, default_value_t)]
    pub(super) tech: TechChoice,

    /// What the guest puts into its report: at most 64 bytes in hex, zeros follow
    #[arg(long, value_name = "HEX", default_value = "", hide_default_value = true,
          value_parser = parse_hex::<64>)]
    pub(super) report_data: Bytes<64>,

    /// The processors that the AMD SP belongs to
    #[arg(long, value_enum, default_value_t)]
    pub(super) product: ProductChoice,

    /// The key that signs an SNP guest's report: the chip's, or the provider's, which the host loads
    #[arg(long, value_enum, default_value_t)]
    pub(super) key: KeyChoice,

    /// The version of a TD's quote
    #[arg(long, value_name = "VERSION", default_value_t = 4,
          value_parser = clap::value_parser!(u8).range(4..=5))]
    pub(super) quote_version: u8,

    /// Report as JSON: the files, and the command that verifies them
    #[arg(long)]
    pub(super) json: bool,
}

/// Writes evidence for the tests of verifiers: good, and wrong in one way each
///
/// Each sample has its own directory. manifest.json says of each what is wrong with it and which
/// check of `attest verify` fails first, what a verifier must expect, and at what time. The roots are
/// those of the software platform, beside the manifest. Every run writes the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops attest samples evidence
  jq -r '.samples[] | .name + \": \" + .about' evidence/manifest.json")]
pub(super) struct SamplesArgs {
    /// The directory; it must not exist
    #[arg(value_name = "DIR")]
    pub(super) directory: PathBuf,

    /// Print the manifest, too
    #[arg(long)]
    pub(super) json: bool,
}

/// Checks evidence against its certificates, a trusted root, and what it is expected to say
///
/// Every check has a row: passed, failed, not made because an earlier one failed, not asked because
/// no value was stated, or waived. What the evidence says is shown only if it is authentic.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The exit code is 0 only if every check was made and passed, or was given up by name (--waive); those
of ID key, author key, guest SVN, FMSPC and event log may be left out. It is 1 if a check failed, if one was not
asked, or if a file cannot be read.

Expected values never come from the evidence's own directory: state them.

Examples:
  kvm-ops attest verify report.bin --cert-chain vcek.der --cert-chain cert_chain.pem --crl crl.der \\
      --measurement HEX --report-data HEX --host-data 00 --vmpl 0 --policy 0x30000 \\
      --min-tcb boot-loader=3,snp=8,microcode=115 --waive chip-id
  kvm-ops attest verify quote.bin --collateral collateral.json --mrtd HEX --report-data HEX \\
      --attributes 0x10000000 --xfam 0x3 --accept-tcb-status SWHardeningNeeded \\
      --waive rtmr0,rtmr1,rtmr2,rtmr3,mrconfigid,mrowner,mrownerconfig,mrseam
  kvm-ops attest verify demo --root software --json --waive policy,vmpl,measurement,host-data")]
pub(super) struct VerifyArgs {
    /// The report or quote, or a directory that `kvm-ops attest new` has written
    #[arg(value_name = "EVIDENCE|DIR")]
    pub(super) evidence: PathBuf,

    /// The root that is trusted: `software` (whose private key is public), or a certificate
    /// [default: the vendor's]
    #[arg(long, value_name = "ROOT")]
    pub(super) root: Option<RootChoice>,

    /// Give up a check, by its name; several with commas
    #[arg(long, value_name = "CHECK", value_delimiter = ',')]
    pub(super) waive: Vec<String>,

    /// When certificates must be valid: seconds of Unix time or a date (RFC 3339) [default: now]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(super) time: Option<u64>,

    /// What the guest must have put into the evidence: at most 64 bytes, zeros follow
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<64>)]
    pub(super) report_data: Option<Bytes<64>>,

    /// Report as JSON
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) snp: SnpArgs,

    #[command(flatten)]
    pub(super) tdx: TdxArgs,
}

/// The options for reports of SNP guests.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Reports of SNP guests")]
pub(super) struct SnpArgs {
    /// Certificates: DER or PEM, one or several, or the table of an extended guest request
    #[arg(long, value_name = "FILE")]
    pub(super) cert_chain: Vec<PathBuf>,

    /// The root's revocation list, in DER
    #[arg(long, value_name = "FILE")]
    pub(super) crl: Option<PathBuf>,

    /// The launch digest
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) measurement: Option<Bytes<48>>,

    /// What the host must have stated at launch: at most 32 bytes, zeros follow
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<32>)]
    pub(super) host_data: Option<Bytes<32>>,

    /// The VMPL that must have asked for the report
    #[arg(long, value_name = "VMPL", value_parser = clap::value_parser!(u32).range(0..4))]
    pub(super) vmpl: Option<u32>,

    /// The guest's policy, all of it: a number, in hex with 0x
    #[arg(long, value_name = "POLICY", value_parser = parse_number)]
    pub(super) policy: Option<u64>,

    /// The least TCB, by parts: fmc (Turin only), boot-loader, tee, snp, microcode
    #[arg(long, value_name = "PART=VERSION,...")]
    pub(super) min_tcb: Option<String>,

    /// The chip that must run the guest: at most 64 bytes, zeros follow
    #[arg(long, value_name = "HEX", value_parser = parse_hex::<64>)]
    pub(super) chip_id: Option<Bytes<64>>,

    /// Digest of the ID key that must have signed the guest's ID block
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) id_key: Option<Bytes<48>>,

    /// Digest of the author key that must have signed the ID key
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) author_key: Option<Bytes<48>>,

    /// The least security version of the guest
    #[arg(long, value_name = "SVN")]
    pub(super) min_guest_svn: Option<u32>,
}

impl SnpArgs {
    /// An option that was given.
    pub(super) fn given(&self) -> Option<&'static str> {
        first(&[
            ("--cert-chain", !self.cert_chain.is_empty()),
            ("--crl", self.crl.is_some()),
            ("--measurement", self.measurement.is_some()),
            ("--host-data", self.host_data.is_some()),
            ("--vmpl", self.vmpl.is_some()),
            ("--policy", self.policy.is_some()),
            ("--min-tcb", self.min_tcb.is_some()),
            ("--chip-id", self.chip_id.is_some()),
            ("--id-key", self.id_key.is_some()),
            ("--author-key", self.author_key.is_some()),
            ("--min-guest-svn", self.min_guest_svn.is_some()),
        ])
    }
}

/// The options for quotes of TDs.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Quotes of TDs")]
pub(super) struct TdxArgs {
    /// TCB info, QE identity, revocation lists and their chains, as JSON in the form of dcap-qvl
    #[arg(long, value_name = "FILE")]
    pub(super) collateral: Option<PathBuf>,

    /// The TD's event log, which must replay to its RTMRs
    #[arg(long, value_name = "FILE")]
    pub(super) event_log: Option<PathBuf>,

    /// MRTD
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) mrtd: Option<Bytes<48>>,

    /// RTMR0: the firmware's configuration
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) rtmr0: Option<Bytes<48>>,

    /// RTMR1: the boot loader and the kernel
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) rtmr1: Option<Bytes<48>>,

    /// RTMR2: the kernel's command line and initrd
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) rtmr2: Option<Bytes<48>>,

    /// RTMR3: of the guest's choice
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) rtmr3: Option<Bytes<48>>,

    /// MRCONFIGID
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) mrconfigid: Option<Bytes<48>>,

    /// MROWNER
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) mrowner: Option<Bytes<48>>,

    /// MROWNERCONFIG
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) mrownerconfig: Option<Bytes<48>>,

    /// Measurement of the TDX module
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<48>)]
    pub(super) mrseam: Option<Bytes<48>>,

    /// ATTRIBUTES, all of it: a number, in hex with 0x
    #[arg(long, value_name = "BITS", value_parser = parse_number)]
    pub(super) attributes: Option<u64>,

    /// XFAM, all of it: a number, in hex with 0x
    #[arg(long, value_name = "BITS", value_parser = parse_number)]
    pub(super) xfam: Option<u64>,

    /// A TCB status that is accepted beside UpToDate, in Intel's words
    #[arg(long, value_name = "STATUS")]
    pub(super) accept_tcb_status: Vec<String>,

    /// A security advisory that is accepted, in Intel's words
    #[arg(long, value_name = "ADVISORY")]
    pub(super) accept_advisory: Vec<String>,

    /// The kind of processor: FMSPC
    #[arg(long, value_name = "HEX", value_parser = parse_exact::<6>)]
    pub(super) fmspc: Option<Bytes<6>>,
}

impl TdxArgs {
    /// An option that was given.
    pub(super) fn given(&self) -> Option<&'static str> {
        first(&[
            ("--collateral", self.collateral.is_some()),
            ("--event-log", self.event_log.is_some()),
            ("--mrtd", self.mrtd.is_some()),
            ("--rtmr0", self.rtmr0.is_some()),
            ("--rtmr1", self.rtmr1.is_some()),
            ("--rtmr2", self.rtmr2.is_some()),
            ("--rtmr3", self.rtmr3.is_some()),
            ("--mrconfigid", self.mrconfigid.is_some()),
            ("--mrowner", self.mrowner.is_some()),
            ("--mrownerconfig", self.mrownerconfig.is_some()),
            ("--mrseam", self.mrseam.is_some()),
            ("--attributes", self.attributes.is_some()),
            ("--xfam", self.xfam.is_some()),
            ("--accept-tcb-status", !self.accept_tcb_status.is_empty()),
            ("--accept-advisory", !self.accept_advisory.is_empty()),
            ("--fmspc", self.fmspc.is_some()),
        ])
    }
}

fn first(options: &[(&'static str, bool)]) -> Option<&'static str> {
    let mut given = options.iter().filter(|(_, given)| *given);
    given.next().map(|(name, _)| *name)
}

/// Technologies whose guests have evidence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum TechChoice {
    /// An SEV-SNP guest, on the software AMD SP
    #[default]
    Snp,
    /// A trust domain, on the software TDX module
    Tdx,
}

/// Processors with SNP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum ProductChoice {
    /// EPYC 7003; reports of version 2
    Milan,
    /// EPYC 9004; reports of version 3
    #[default]
    Genoa,
    /// EPYC 9005; reports of version 5
    Turin,
}

/// Keys that sign reports of SNP guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum KeyChoice {
    /// The versioned chip endorsement key
    #[default]
    Vcek,
    /// The versioned loaded endorsement key, of a provider
    Vlek,
}

/// The trusted root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RootChoice {
    /// The software platform's.
    Software,
    /// A certificate.
    File(PathBuf),
}

impl From<&str> for RootChoice {
    fn from(text: &str) -> Self {
        match text {
            "software" => Self::Software,
            path => Self::File(path.into()),
        }
    }
}

pub(super) fn parse_time(text: &str) -> Result<u64, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    let midnight = format!("{text}T00:00:00Z");
    let time = humantime::parse_rfc3339_weak(text)
        .or_else(|error| humantime::parse_rfc3339(&midnight).map_err(|_| error.to_string()))?;
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    Ok(since.map_err(|error| error.to_string())?.as_secs())
}
