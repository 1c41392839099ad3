//! The offers of `/dev/kvm`, as the library probes them.

use kvm_ops::kvm::{self, KvmHost, TechOffer, WhyNot};
use kvm_ops::{Call, Error, Kind, Missing, Tech, VcpuId, VmConfig, create};

use super::software::created;
use super::{Capability, Device, Diagnosis, Machine, Offer, technology};

pub(super) fn diagnose() -> Diagnosis {
    match KvmHost::open() {
        Ok(host) => {
            let offer = host.offer();
            let mut diagnosis = Diagnosis::new(Device {
                usable: true,
                vm_types: Some(offer.vm_types),
                error: None,
                hint: None,
            });
            fill(&mut diagnosis, offer, |tech| {
                let config = VmConfig::new(Kind::Of(tech));
                launched(&host, &config)
            });
            diagnosis
        }
        Err(error) => {
            let hint = error.hint().to_owned();
            let mut why = error.to_string();
            if let Some(cause) = std::error::Error::source(&error) {
                why.push_str(&format!(": {cause}"));
            }
            let mut diagnosis = Diagnosis::new(Device {
                usable: false,
                vm_types: None,
                error: Some(why.clone()),
                hint: Some(hint),
            });
            let none = Offer::no("no", why);
            fill(&mut diagnosis, kvm::Offer::without_device(&error), |_| {
                none.clone()
            });
            diagnosis
        }
    }
}

/// Launches a VM without memory, and ends it again: its first vCPU, and the end of the measured start.
fn launched(host: &KvmHost, config: &VmConfig) -> Offer {
    let mut vm = match create(host, config) {
        Ok(vm) => vm,
        Err(refused) => return created(Err(Error::from(refused))),
    };
    let tried = vm.create_vcpu(VcpuId(0)).and_then(|vcpu| {
        let finalized = vm.finalize();
        drop(vcpu);
        finalized
    });
    let mut offer = match tried {
        Ok(()) => Offer::yes(),
        Err(error) => Offer::no("no", vm.explain(error).to_string()),
    };
    if let Err(Error::Sys(Call::OpenSev, _)) = tried {
        offer.what_to_do.push(
            "load the driver of the secure processor (modprobe ccp), and let the user open /dev/sev"
                .into(),
        );
    }
    drop(vm.destroy());
    offer
}

fn fill(diagnosis: &mut Diagnosis, offer: kvm::Offer, mut create: impl FnMut(Tech) -> Offer) {
    let device_hint = diagnosis.dev_kvm.hint.clone();
    diagnosis.technologies = Tech::ALL
        .into_iter()
        .map(|tech| {
            let host = offer.technology(tech).map(|line| host(line, &device_hint));
            technology(tech, host, create(tech))
        })
        .collect();
    diagnosis.capabilities = offer
        .capabilities
        .into_iter()
        .map(|capability| Capability {
            name: capability.name,
            purpose: capability.purpose,
            available: capability.is_available(),
            answer: capability.answer,
            tried: capability.tried.is_some(),
            errno: capability.tried.and_then(Result::err),
        })
        .collect();
    diagnosis.machine = Some(Machine {
        is_virtual: offer.machine.is_guest(),
        kernel: offer.machine.kernel,
        vendor: offer.machine.vendor_string,
        model: offer.machine.model,
        kvm_modules: offer.machine.modules.into_keys().collect(),
    });
}

fn host(line: &TechOffer, device_hint: &Option<String>) -> Offer {
    let mut offer = Offer {
        offered: line.is_offered(),
        summary: if line.is_offered() { "yes" } else { "no" }.into(),
        why_not: line.why_not.iter().map(WhyNot::to_string).collect(),
        notes: line.notes.clone(),
        what_to_do: Vec::new(),
    };
    // Until the device can be opened, the other reasons are uncertain: the device may belong to a
    // module other than the vendor's.
    let reasons = match line.why_not.as_slice() {
        [device @ WhyNot::Device(_), ..] => std::slice::from_ref(device),
        all => all,
    };
    offer.what_to_do = reasons
        .iter()
        .filter_map(|why| what_to_do(line.tech, why, device_hint))
        .collect();
    offer
}

fn what_to_do(tech: Tech, why: &WhyNot, device_hint: &Option<String>) -> Option<String> {
    Some(match why {
        WhyNot::Device(_) => device_hint.clone()?,
        WhyNot::Vendor { needs, .. } => format!("use a machine with {needs} processors"),
        WhyNot::ProcessorLacks { .. } => match tech {
            Tech::Vmx => {
                "switch VT-x on in the firmware set-up; inside a virtual machine, ask its \
                          host for nested virtualisation"
                    .into()
            }
            Tech::Svm => "switch SVM on in the firmware set-up; inside a virtual machine, ask its \
                          host for nested virtualisation"
                .into(),
            Tech::Tdx => "use a bare-metal machine whose processor has TDX, switch TDX on in its \
                          firmware set-up, and run Linux 6.16 or later with CONFIG_INTEL_TDX_HOST"
                .into(),
            _ => format!(
                "use a bare-metal EPYC machine that has {tech}, switch memory encryption on in its \
                 firmware set-up, and run Linux with CONFIG_KVM_AMD_SEV"
            ),
        },
        WhyNot::ModuleMissing { module } => format!("modprobe {module}"),
        WhyNot::Parameter {
            module,
            name,
            value,
        } if value != "absent" => {
            format!(
                "load the module with it on: modprobe -r {module} && modprobe {module} {name}=1"
            )
        }
        WhyNot::Parameter { module, name, .. } => {
            format!("run a kernel whose {module} knows the parameter {name}")
        }
        WhyNot::Kernel { needs, .. } => {
            format!("run Linux {}.{} or later", needs.0, needs.1)
        }
        WhyNot::NoAsids { .. } => {
            "give it ASIDs in the firmware set-up (minimum SEV ASID, or SEV-ES ASID space limit)"
                .into()
        }
        WhyNot::Refused(Error::Unsupported(Missing::HostTech, _)) => {
            "see in dmesg why KVM refuses it".into()
        }
        _ => return None,
    })
}
