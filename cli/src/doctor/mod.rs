//! What this host offers: data for `kvm-ops doctor`. Nothing stands here that was not tried.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod software;
pub(crate) mod text;

use serde::Serialize;

use kvm_ops::Tech;

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Diagnosis {
    /// Of this program.
    version: &'static str,
    /// The processor and the modules; `None` where this build cannot look.
    machine: Option<Machine>,
    /// The device.
    dev_kvm: Device,
    /// Each technology.
    technologies: Vec<Technology>,
    /// What KVM can do, as far as it matters here.
    capabilities: Vec<Capability>,
}

/// The processor and the modules.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    vendor: String,
    model: String,
    is_virtual: bool,
    kvm_modules: Vec<String>,
}

/// Whether `/dev/kvm` can be used.
#[derive(Debug, Serialize)]
pub(crate) struct Device {
    usable: bool,
    /// The bitmap of VM types, where KVM was asked.
    vm_types: Option<u32>,
    error: Option<String>,
    hint: Option<String>,
}

/// What there is of one technology.
#[derive(Debug, Serialize)]
pub(crate) struct Technology {
    name: &'static str,
    is_confidential: bool,
    /// What the kernel of this machine offers; `None` where this build cannot ask.
    host: Option<Offer>,
    /// Whether this build creates such a VM on `/dev/kvm`.
    kvm: Offer,
    /// Whether this build creates such a VM on the software platform.
    software: Offer,
}

/// An answer.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Offer {
    offered: bool,
    /// In one or two words.
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
    /// What `KVM_CHECK_EXTENSION` answers.
    answer: u32,
    /// Whether the operation itself was tried.
    tried: bool,
    /// The errno of the try.
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
    /// Looks, and tries.
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

/// What `/dev/kvm` offers.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn host() -> Diagnosis {
    kvm::diagnose()
}

/// Why nothing can be said of `/dev/kvm`.
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
