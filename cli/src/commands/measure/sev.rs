//! `kvm-ops measure sev`, `seves` and `snp`: launch digests.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;
use soft_amd_sp::measure::{self, KernelHashes, Launch, MeasureError, Vmm};

use super::{OutputFormat, read_firmware};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::term;

/// The launch digest of an SEV guest: SHA-256 of the image and of the kernel's hashes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops measure sev OVMF.fd
  kvm-ops measure sev OVMF.amdsev.fd --kernel bzImage --initrd initrd.img --append 'quiet'")]
pub(crate) struct SevArgs {
    #[command(flatten)]
    common: Common,
}

/// The launch digest of an SEV-ES guest: that of SEV, and the state of each vCPU
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops measure seves OVMF.fd --vcpus 1 --vcpu-type EPYC-Milan
  kvm-ops measure seves OVMF.fd --vcpus 4 --vcpu-family 25 --vcpu-model 1 --vcpu-stepping 1")]
pub(crate) struct SevEsArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    vcpus: Vcpus,
}

/// The launch digest of an SEV-SNP guest: every page with its type and address
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kvm-ops measure snp OVMF.fd --vcpus 1 --vcpu-type EPYC-v4
  kvm-ops measure snp OVMF.fd --vcpus 4 --vcpu-sig 0x800f12 --guest-features 0x21 --json")]
pub(crate) struct SnpArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    vcpus: Vcpus,

    /// SEV_FEATURES of the vCPUs
    #[arg(long, value_name = "VALUE", default_value = "0x1", value_parser = number::<u64>)]
    guest_features: u64,
}

#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// The firmware image
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// A kernel that is booted directly; its hash is part of the measurement
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    append: Option<String>,

    /// How the digest is written
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    output_format: OutputFormat,

    /// Report as JSON, with everything that was measured
    #[arg(long, conflicts_with = "output_format")]
    json: bool,
}

#[derive(Clone, Debug, clap::Args)]
struct Vcpus {
    /// How many vCPUs the guest has
    #[arg(long = "vcpus", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    count: u32,

    /// QEMU's name of the vCPUs' model
    #[arg(long, value_name = "MODEL", value_parser = vcpu_types(), hide_possible_values = true,
          conflicts_with_all = ["vcpu_sig", "vcpu_family"])]
    vcpu_type: Option<String>,

    /// CPUID signature of the vCPUs (CPUID leaf 1, EAX)
    #[arg(long, value_name = "VALUE", value_parser = number::<u32>, conflicts_with = "vcpu_family")]
    vcpu_sig: Option<u32>,

    /// CPUID family of the vCPUs, with model and stepping
    #[arg(long, value_name = "FAMILY", requires_all = ["vcpu_model", "vcpu_stepping"],
          value_parser = clap::value_parser!(u32).range(0..=270))]
    vcpu_family: Option<u32>,

    /// CPUID model of the vCPUs
    #[arg(long, value_name = "MODEL", requires = "vcpu_family",
          value_parser = clap::value_parser!(u32).range(0..=255))]
    vcpu_model: Option<u32>,

    /// CPUID stepping of the vCPUs
    #[arg(long, value_name = "STEPPING", requires = "vcpu_family",
          value_parser = clap::value_parser!(u32).range(0..=15))]
    vcpu_stepping: Option<u32>,

    /// Whose reset values the vCPUs have; all but QEMU's do without a signature
    #[arg(long, value_enum, ignore_case = true, default_value_t)]
    vmm_type: VmmType,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum VmmType {
    #[default]
    #[value(name = "QEMU")]
    Qemu,
    Ec2,
    Gce,
}

/// Parses a number: decimal, or hexadecimal after `0x`.
fn number<N: TryFrom<u64>>(text: &str) -> Result<N, String> {
    let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16),
        _ => text.parse(),
    };
    parsed
        .ok()
        .and_then(|number| N::try_from(number).ok())
        .ok_or_else(|| {
            let bits = 8 * size_of::<N>();
            format!("`{text}` is not a number of at most {bits} bits such as 1 or 0x1")
        })
}
fn vcpu_types() -> clap::builder::PossibleValuesParser {
    soft_amd_sp::measure::cpu_types()
        .map(|(name, _)| name)
        .collect::<Vec<_>>()
        .into()
}

/// The inputs of a measurement, of any technology.
pub(super) struct Measured {
    technology: Technology,
    common: Common,
    vcpus: Option<Vcpus>,
    guest_features: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Technology {
    Sev,
    SevEs,
    Snp,
}

impl Measured {
    pub(super) fn of_sev(args: &SevArgs) -> Self {
        Self {
            technology: Technology::Sev,
            common: args.common.clone(),
            vcpus: None,
            guest_features: None,
        }
    }

    pub(super) fn of_sev_es(args: &SevEsArgs) -> Self {
        Self {
            technology: Technology::SevEs,
            common: args.common.clone(),
            vcpus: Some(args.vcpus.clone()),
            guest_features: None,
        }
    }

    pub(super) fn of_snp(args: &SnpArgs) -> Self {
        Self {
            technology: Technology::Snp,
            common: args.common.clone(),
            vcpus: Some(args.vcpus.clone()),
            guest_features: Some(args.guest_features),
        }
    }
}

#[derive(Serialize)]
struct Report {
    technology: &'static str,
    image: String,
    bytes: usize,
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_sig: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vmm_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_features: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    append: Option<String>,
}

impl VmmType {
    const fn of_library(self) -> (Vmm, &'static str) {
        match self {
            Self::Qemu => (Vmm::Qemu, "QEMU"),
            Self::Ec2 => (Vmm::Ec2, "ec2"),
            Self::Gce => (Vmm::Gce, "gce"),
        }
    }
}

/// Returns the CPUID signature that the options give, or 0 if the VMM's reset values do not contain
/// one.
fn signature(vcpus: &Vcpus) -> Result<u32, Failure> {
    let family = match (vcpus.vcpu_family, vcpus.vcpu_model, vcpus.vcpu_stepping) {
        (Some(family), Some(model), Some(stepping)) => {
            Some(measure::signature_of(family, model, stepping))
        }
        _ => None,
    };
    let model = vcpus.vcpu_type.as_deref().and_then(measure::cpu_signature);
    match (family.or(vcpus.vcpu_sig).or(model), vcpus.vmm_type) {
        (Some(signature), _) => Ok(signature),
        (None, VmmType::Ec2 | VmmType::Gce) => Ok(0),
        (None, VmmType::Qemu) => Err(Failure::new(
            "QEMU measures the vCPUs' model, and none is stated",
        )
        .hint("state --vcpu-type, --vcpu-sig, or --vcpu-family with model and stepping")
        .code(Code::Usage)),
    }
}

pub(in crate::commands::measure) fn run(measured: Measured) -> Outcome {
    let Measured {
        technology,
        common,
        vcpus,
        guest_features,
    } = measured;
    let signature = vcpus.as_ref().map(signature).transpose()?;
    let image = read_firmware(&common.image)?;
    let mut launch = Launch::new(&image);
    if let (Some(vcpus), Some(signature)) = (&vcpus, signature) {
        launch = launch
            .vcpus(vcpus.count)
            .vcpu_sig(signature)
            .vmm(vcpus.vmm_type.of_library().0);
    }
    if let Some(features) = guest_features {
        launch = launch.guest_features(features);
    }
    if let Some(kernel) = &common.kernel {
        let kernel = files::read("the kernel", kernel, files::KERNEL)?;
        let initrd = match &common.initrd {
            Some(initrd) => files::read("the initial RAM disk", initrd, files::KERNEL)?,
            None => Vec::new(),
        };
        launch = launch.kernel_hashes(KernelHashes::new(
            &kernel,
            &initrd,
            common.append.as_deref(),
        ));
    }
    let (name, digest) = match technology {
        Technology::Sev => ("sev", launch.sev().map(Vec::from)),
        Technology::SevEs => ("sev-es", launch.sev_es().map(Vec::from)),
        Technology::Snp => ("sev-snp", launch.snp().map(Vec::from)),
    };
    let digest = digest.map_err(|error| {
        let what = format!("{} cannot be measured as {name}", common.image.display());
        let hint = hint(&error);
        let failure = Failure::because(what, error).code(Code::Input);
        hint.into_iter().fold(failure, Failure::hint)
    })?;
    if !common.json {
        term::say(common.output_format.write(&digest))?;
        return Ok(Code::Fine);
    }
    let shown = |path: Option<std::path::PathBuf>| path.map(|path| path.display().to_string());
    term::say_json(&Report {
        technology: name,
        image: common.image.display().to_string(),
        bytes: image.len(),
        digest: hex::encode(digest),
        vcpus: vcpus.as_ref().map(|vcpus| vcpus.count),
        vcpu_sig: signature,
        vmm_type: vcpus.map(|vcpus| vcpus.vmm_type.of_library().1),
        guest_features,
        kernel: shown(common.kernel),
        initrd: shown(common.initrd),
        append: common.append,
    })?;
    Ok(Code::Fine)
}

fn hint(error: &MeasureError) -> Option<&'static str> {
    Some(match error {
        MeasureError::NoHashTable => {
            "of OVMF's builds, AmdSevX64 has a place for the hashes (Debian: ovmf-amdsev)"
        }
        MeasureError::NoResetBlock(_) => "use an OVMF image of 2021 or later, or measure one vCPU",
        _ => return None,
    })
}
