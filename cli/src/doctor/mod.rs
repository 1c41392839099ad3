//! The diagnosis of this host: data for `kvm-ops doctor`. Every entry was tried.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod software;
pub(crate) mod text;

use serde::Serialize;

use kvm_ops::Tech;

/// All findings.
#[derive(Debug, Serialize)]
pub(crate) struct Diagnosis {
    /// The version of this program.
    version: &'static str,
    /// The processor and the modules; `None` if this build cannot look.
    machine: Option<Machine>,
    /// The device.
    dev_kvm: Device,
    /// Each technology.
    technologies: Vec<Technology>,
    /// Capabilities of KVM that the library uses.
    capabilities: Vec<Capability>,
}

/// The processor and the modules.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    vendor: String,
    model: String,
    is_virtual: bool,
    kernel: String,
    kvm_modules: Vec<String>,
}

/// The state of `/dev/kvm`.
#[derive(Debug, Serialize)]
pub(crate) struct Device {
    usable: bool,
    /// The bitmap of VM types, if KVM was asked.
    vm_types: Option<u32>,
    error: Option<String>,
    hint: Option<String>,
}

/// The findings for one technology.
#[derive(Debug, Serialize)]
pub(crate) struct Technology {
    name: &'static str,
    is_confidential: bool,
    /// The kernel's offer on this machine; `None` if this build cannot ask.
    host: Option<Offer>,
    /// This build's offer on `/dev/kvm`.
    kvm: Offer,
    /// This build's offer on the software platform.
    software: Offer,
}

/// The answer to one question.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Offer {
    offered: bool,
    /// The answer in one or two words.
    summary: String,
    why_not: Vec<String>,
    notes: Vec<String>,
    what_to_do: Vec<String>,
}

/// A capability of KVM.
#[derive(Debug, Serialize)]
pub(crate) struct Capability {
    name: &'static str,
    purpose: &'static str,
    available: bool,
    /// The answer of `KVM_CHECK_EXTENSION`.
    answer: u32,
    /// True if the operation itself was tried.
    tried: bool,
    /// The errno of that attempt.
    errno: Option<i32>,
}

impl Offer {
    fn yes() -> Self {
        Self {
            offered: true,
            summary: "yes".into(),
            ..Self::default()
        }
    }

    fn no(summary: &str, why: impl Into<String>) -> Self {
        Self {
            summary: summary.into(),
            why_not: vec![why.into()],
            ..Self::default()
        }
    }
}

impl Diagnosis {
    /// Probes the host.
    pub(crate) fn make() -> Self {
        let mut diagnosis = host();
        diagnosis.technologies = Tech::ALL
            .into_iter()
            .zip(std::mem::take(&mut diagnosis.technologies))
            .map(|(tech, technology)| Technology {
                software: software::offer(tech),
                ..technology
            })
            .collect();
        diagnosis
    }

    fn new(device: Device) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            machine: None,
            dev_kvm: device,
            technologies: Vec::new(),
            capabilities: Vec::new(),
        }
    }
}

fn technology(tech: Tech, host: Option<Offer>, kvm: Offer) -> Technology {
    Technology {
        name: tech.name(),
        is_confidential: tech.is_confidential(),
        host,
        kvm,
        software: Offer::default(),
    }
}

/// The findings about `/dev/kvm`.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn host() -> Diagnosis {
    kvm::diagnose()
}

/// A placeholder with the reason why this build cannot probe `/dev/kvm`.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn host() -> Diagnosis {
    let why = "this build cannot use /dev/kvm";
    let mut diagnosis = Diagnosis::new(Device {
        usable: false,
        vm_types: None,
        error: Some(why.into()),
        hint: Some("use x86-64 Linux".into()),
    });
    diagnosis.technologies = Tech::ALL
        .map(|tech| technology(tech, None, Offer::no("not in this build", why)))
        .into();
    diagnosis
}
