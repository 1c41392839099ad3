//! The technologies that this host offers, and the reasons against the others.

use std::fmt;

use kvm_ops::{Error, Host, Missing, Tech, Vendor, VmParams};

use crate::capability::{self, Capability};
use crate::{HostMachine, KvmHost, SevFirmware};

/// The technologies and capabilities of a host, for a report to its user. Every "yes" was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The processor and the modules.
    pub machine: HostMachine,
    /// The bitmap of VM types (`KVM_CAP_VM_TYPES`); 1 on kernels that do not know it.
    pub vm_types: u32,
    /// Each technology, in the order of [`Tech::ALL`].
    pub technologies: Vec<TechOffer>,
    /// The capabilities that matter here.
    pub capabilities: Vec<Capability>,
}

/// The verdict on one technology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TechOffer {
    /// The technology.
    pub tech: Tech,
    /// The reasons why it is not offered, from the processor upwards. Empty if a VM of it was created
    /// and closed again.
    pub why_not: Vec<WhyNot>,
    /// Remarks beside the verdict, a sentence each.
    pub notes: Vec<String>,
}

impl TechOffer {
    /// True if VMs of it can be created.
    pub fn is_offered(&self) -> bool {
        self.why_not.is_empty()
    }
}

/// A reason why a technology is not offered.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// The device cannot be opened, for this reason.
    Device(String),
    /// KVM has no VMs of this technology.
    NotInKvm,
    /// The processors are of another vendor.
    Vendor {
        /// The vendor that it needs.
        needs: Vendor,
        /// The vendor string of the processors.
        found: String,
    },
    /// The processor does not have, or the kernel or a hypervisor hides, this feature.
    ProcessorLacks {
        /// Its name in `/proc/cpuinfo`.
        flag: &'static str,
    },
    /// The module that would offer it is not loaded.
    ModuleMissing {
        /// Its name.
        module: &'static str,
    },
    /// A parameter of the module switches it off, or the module found that it cannot.
    Parameter {
        /// The module.
        module: &'static str,
        /// The parameter's name.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// The kernel is older than the technology.
    Kernel {
        /// The first version that has it.
        needs: (u32, u32),
        /// The release of this kernel.
        found: String,
    },
    /// No ASID is left for guests of the technology.
    NoAsids {
        /// The number of ASIDs.
        asids: u32,
        /// The first that is for plain SEV.
        min_sev_asid: u32,
    },
    /// KVM does not list the type of VM.
    VmType {
        /// The number of the type.
        number: u64,
        /// `KVM_CAP_VM_TYPES`.
        bitmap: u32,
    },
    /// KVM lists the type but refuses to create such a VM.
    Refused(Error),
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(why) => f.write_str(why),
            Self::NotInKvm => f.write_str("KVM has no VMs of this technology"),
            Self::Vendor { needs, found } => {
                write!(f, "needs {needs} processors, these are {found:?}")
            }
            Self::ProcessorLacks { flag } => {
                write!(f, "the processor shows no {flag} in /proc/cpuinfo")
            }
            Self::ModuleMissing { module } => write!(f, "module {module} is not loaded"),
            Self::Parameter {
                module,
                name,
                value,
            } => write!(f, "{module}.{name} is {value}"),
            Self::Kernel { needs, found } => {
                write!(f, "needs Linux {}.{}, this is {found}", needs.0, needs.1)
            }
            Self::NoAsids {
                asids,
                min_sev_asid,
            } => write!(
                f,
                "no ASID is for it: of 1 to {asids}, those of plain SEV begin at {min_sev_asid}"
            ),
            Self::VmType { number, bitmap } => write!(
                f,
                "KVM offers no VM type {number} (KVM_CAP_VM_TYPES is {bitmap:#x})"
            ),
            Self::Refused(error) => write!(f, "KVM lists the VM type but: {error}"),
        }
    }
}

/// The requirements of a technology on the processor and on its module.
struct Needs {
    module: &'static str,
    flag: &'static str,
    parameter: Option<&'static str>,
    /// The first kernel whose KVM has VMs of it, as this port drives them.
    kernel: (u32, u32),
}

const fn needs(tech: Tech) -> Needs {
    let (module, flag, parameter, kernel) = match tech {
        Tech::Vmx => ("kvm_intel", "vmx", None, (4, 11)),
        Tech::Tdx => ("kvm_intel", "tdx_host_platform", Some("tdx"), (6, 16)),
        Tech::Svm => ("kvm_amd", "svm", None, (4, 11)),
        Tech::Sev => ("kvm_amd", "sev", Some("sev"), (6, 10)),
        Tech::SevEs => ("kvm_amd", "sev_es", Some("sev_es"), (6, 10)),
        Tech::SevSnp => ("kvm_amd", "sev_snp", Some("sev_snp"), (6, 11)),
        _ => ("kvm", "", None, (0, 0)),
    };
    Needs {
        module,
        flag,
        parameter,
        kernel,
    }
}

/// The reason that the shares of the ASIDs are, if the processor has the technology.
fn no_asids(tech: Tech, machine: &HostMachine) -> Option<WhyNot> {
    let encryption = machine.encryption;
    let (is_there, left) = match tech {
        Tech::Sev => (encryption.sev, encryption.sev_asids()),
        Tech::SevEs => (encryption.sev_es, encryption.es_asids()),
        Tech::SevSnp => (encryption.sev_snp, encryption.es_asids()),
        _ => return None,
    };
    (is_there && left == 0).then_some(WhyNot::NoAsids {
        asids: encryption.asids,
        min_sev_asid: encryption.min_sev_asid,
    })
}

/// The reasons that the machine shows. They explain a refusal but do not decide it.
fn reasons(tech: Tech, machine: &HostMachine) -> Vec<WhyNot> {
    let Some(vendor) = tech.vendor() else {
        return vec![WhyNot::NotInKvm];
    };
    if machine.vendor() != Some(vendor) {
        return vec![WhyNot::Vendor {
            needs: vendor,
            found: machine.vendor_string.clone(),
        }];
    }
    let mut why_not = Vec::new();
    let Needs {
        module,
        flag,
        parameter,
        kernel,
    } = needs(tech);
    if !machine.has_flag(flag) {
        why_not.push(WhyNot::ProcessorLacks { flag });
    }
    why_not.extend(no_asids(tech, machine));
    if machine.kernel_version().is_some_and(|found| found < kernel) {
        why_not.push(WhyNot::Kernel {
            needs: kernel,
            found: machine.kernel.clone(),
        });
    }
    if !machine.modules.contains_key(module) {
        why_not.push(WhyNot::ModuleMissing { module });
    } else if let Some(name) = parameter {
        match machine.parameter(module, name) {
            Some("Y" | "1") => {}
            value => why_not.push(WhyNot::Parameter {
                module,
                name,
                value: value.unwrap_or("absent").to_owned(),
            }),
        }
    }
    why_not
}

/// Remarks on a technology beside the verdict.
fn notes(tech: Tech, offered: bool, machine: &HostMachine) -> Vec<String> {
    let mut notes = Vec::new();
    let needs = needs(tech);
    if machine.vendor() != tech.vendor() {
        return notes;
    }
    if offered && !machine.modules.contains_key(needs.module) {
        let names: Vec<&str> = machine.modules.keys().map(String::as_str).collect();
        if !names.is_empty() {
            notes.push(format!(
                "held by module {}, not by {}",
                names.join(", "),
                needs.module
            ));
        }
    }
    let paging = match tech.vendor() {
        Some(Vendor::Amd) => "npt",
        _ => "ept",
    };
    if let Some("N" | "0") = machine.parameter(needs.module, paging) {
        notes.push(format!(
            "{}.{paging} is off: guest memory goes through shadow page tables",
            needs.module
        ));
    }
    notes.extend(sev_notes(tech, offered, machine));
    if tech == Tech::Tdx && machine.has_flag("tme") && !machine.has_flag(needs.flag) {
        notes.push(
            "the processor encrypts memory (TME), which TDX needs: it may have TDX, and the firmware \
             set-up or the kernel keeps it off"
                .to_owned(),
        );
    }
    let in_cpuid = match tech {
        Tech::Sev => machine.encryption.sev,
        Tech::SevEs => machine.encryption.sev_es,
        Tech::SevSnp => machine.encryption.sev_snp,
        _ => false,
    };
    if in_cpuid && !machine.has_flag(needs.flag) {
        notes.push(
            "the processor has it (CPUID 0x8000001f), but the firmware or the kernel keeps it off"
                .to_owned(),
        );
    }
    notes
}

/// Remarks on an SEV technology that is offered: the device and the firmware of launches, and the ASIDs.
fn sev_notes(tech: Tech, offered: bool, machine: &HostMachine) -> Vec<String> {
    let asids = match tech {
        Tech::Sev => machine.encryption.sev_asids(),
        Tech::SevEs | Tech::SevSnp => machine.encryption.es_asids(),
        _ => return Vec::new(),
    };
    if !offered {
        return Vec::new();
    }
    let mut notes = Vec::new();
    if let Some(refused) = &machine.sev.refused {
        notes.push(format!("no launch is possible: {refused}"));
    }
    if let Some(SevFirmware { api, build, guests }) = machine.sev.firmware {
        let (major, minor) = api;
        notes.push(format!(
            "firmware {major}.{minor} build {build}, {guests} guests now"
        ));
    }
    if asids != 0 {
        notes.push(format!("at most {asids} guests at once, by ASIDs"));
    }
    notes
}

impl Offer {
    /// The offer of a machine whose KVM device cannot be opened: no technology, with the reasons.
    pub fn without_device(error: &crate::OpenError) -> Self {
        let machine = HostMachine::probe();
        let technologies = Tech::ALL
            .into_iter()
            .map(|tech| {
                let mut why_not = reasons(tech, &machine);
                if machine.vendor() == tech.vendor() {
                    // The device exists, so a module of some name holds normal VMs.
                    if matches!(error, crate::OpenError::Denied { .. }) && !tech.is_confidential() {
                        why_not.clear();
                    }
                    why_not.insert(0, WhyNot::Device(error.to_string()));
                }
                TechOffer {
                    tech,
                    why_not,
                    notes: notes(tech, false, &machine),
                }
            })
            .collect();
        Self {
            machine,
            vm_types: 0,
            technologies,
            capabilities: Vec::new(),
        }
    }

    pub(crate) fn probe(host: &KvmHost) -> Self {
        let machine = HostMachine::probe();
        let vm_types = host.vm_types();
        let technologies = Tech::ALL
            .into_iter()
            .map(|tech| probe_tech(host, tech, &machine, vm_types))
            .collect();
        Self {
            technologies,
            vm_types,
            capabilities: capability::probe(host),
            machine,
        }
    }

    /// The verdict on that technology.
    pub fn technology(&self, tech: Tech) -> Option<&TechOffer> {
        self.technologies.iter().find(|offer| offer.tech == tech)
    }
}

/// Creates a VM of the technology, which decides the verdict.
fn probe_tech(host: &KvmHost, tech: Tech, machine: &HostMachine, vm_types: u32) -> TechOffer {
    let why_not = match host.create_vm(tech, &VmParams::new(1)) {
        Ok(_) => Vec::new(),
        Err(error) => {
            let mut why_not = reasons(tech, machine);
            match (error, tech.kvm_vm_type()) {
                (Error::Unsupported(Missing::Vendor, _), _) | (_, None) => {}
                (_, Some(number)) if u64::from(vm_types) >> number & 1 == 0 => {
                    why_not.push(WhyNot::VmType {
                        number,
                        bitmap: vm_types,
                    });
                }
                (error, _) => why_not.push(WhyNot::Refused(error)),
            }
            why_not
        }
    };
    TechOffer {
        tech,
        notes: notes(tech, why_not.is_empty(), machine),
        why_not,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(vendor: &str, flags: &[&str], modules: &[(&str, &[(&str, &str)])]) -> HostMachine {
        let mut flags: Vec<String> = flags.iter().map(|flag| flag.to_string()).collect();
        flags.sort_unstable();
        let parameters = |list: &[(&str, &str)]| {
            list.iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect()
        };
        HostMachine {
            vendor_string: vendor.to_owned(),
            flags,
            modules: modules
                .iter()
                .map(|(name, list)| (name.to_string(), parameters(list)))
                .collect(),
            ..HostMachine::default()
        }
    }

    #[test]
    fn the_other_vendors_technologies_have_that_one_reason() {
        let intel = machine("GenuineIntel", &[], &[]);
        let amd = machine("AuthenticAMD", &[], &[]);
        for tech in Tech::ALL {
            let other = match tech.vendor() {
                Some(Vendor::Amd) => &intel,
                _ => &amd,
            };
            assert!(matches!(reasons(tech, other)[..], [WhyNot::Vendor { .. }]));
        }
    }

    #[test]
    fn each_layer_that_lacks_a_technology_is_named_and_no_other() {
        let full = machine(
            "AuthenticAMD",
            &["svm", "sev", "sev_es"],
            &[("kvm_amd", &[("sev", "Y"), ("sev_es", "N"), ("npt", "1")])],
        );
        assert_eq!(reasons(Tech::Svm, &full), []);
        assert_eq!(reasons(Tech::Sev, &full), []);
        let parameter = |name, value: &str| WhyNot::Parameter {
            module: "kvm_amd",
            name,
            value: value.to_owned(),
        };
        assert_eq!(reasons(Tech::SevEs, &full), [parameter("sev_es", "N")]);
        assert_eq!(
            reasons(Tech::SevSnp, &full),
            [
                WhyNot::ProcessorLacks { flag: "sev_snp" },
                parameter("sev_snp", "absent")
            ]
        );
        let bare = machine("GenuineIntel", &["vmx"], &[]);
        assert_eq!(
            reasons(Tech::Vmx, &bare),
            [WhyNot::ModuleMissing {
                module: "kvm_intel"
            }]
        );
    }

    #[test]
    fn an_old_kernel_and_asids_that_are_all_the_other_technologys_are_named() {
        let mut machine = machine(
            "AuthenticAMD",
            &["sev", "sev_es", "sev_snp"],
            &[(
                "kvm_amd",
                &[("sev", "Y"), ("sev_es", "Y"), ("sev_snp", "Y")],
            )],
        );
        machine.kernel = "6.10.3".to_owned();
        machine.encryption = crate::Encryption {
            sev: true,
            sev_es: true,
            sev_snp: true,
            asids: 509,
            min_sev_asid: 1,
        };
        assert_eq!(reasons(Tech::Sev, &machine), []);
        let none = WhyNot::NoAsids {
            asids: 509,
            min_sev_asid: 1,
        };
        assert_eq!(reasons(Tech::SevEs, &machine), std::slice::from_ref(&none));
        let old = WhyNot::Kernel {
            needs: (6, 11),
            found: "6.10.3".to_owned(),
        };
        assert_eq!(reasons(Tech::SevSnp, &machine), [none, old]);
        machine.encryption.min_sev_asid = 510;
        assert!(matches!(
            reasons(Tech::Sev, &machine)[..],
            [WhyNot::NoAsids { .. }]
        ));
        machine.sev.refused = Some("/dev/sev cannot be opened: gone".to_owned());
        machine.sev.firmware = Some(SevFirmware {
            api: (1, 55),
            build: 21,
            guests: 3,
        });
        assert_eq!(
            notes(Tech::SevEs, true, &machine),
            [
                "no launch is possible: /dev/sev cannot be opened: gone",
                "firmware 1.55 build 21, 3 guests now",
                "at most 509 guests at once, by ASIDs"
            ]
        );
    }

    #[test]
    fn a_processor_that_may_have_tdx_is_noted() {
        let intel = machine("GenuineIntel", &["tme"], &[]);
        assert!(notes(Tech::Tdx, false, &intel)[0].contains("may have TDX"));
        let without = machine("GenuineIntel", &["vmx"], &[]);
        assert!(notes(Tech::Tdx, false, &without).is_empty());
    }

    #[test]
    fn another_module_than_the_vendors_and_missing_nested_paging_are_noted() {
        let software = machine("GenuineIntel", &[], &[("kvm_soft", &[])]);
        assert_eq!(
            notes(Tech::Vmx, true, &software),
            ["held by module kvm_soft, not by kvm_intel"]
        );
        assert!(notes(Tech::Svm, false, &software).is_empty());
        let shadow = machine("AuthenticAMD", &["svm"], &[("kvm_amd", &[("npt", "0")])]);
        assert!(notes(Tech::Svm, true, &shadow)[0].contains("kvm_amd.npt is off"));
    }
}
