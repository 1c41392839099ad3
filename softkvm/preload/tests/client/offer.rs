//! What a host offers, as `kvm-ops doctor` asks it.

use kvm_ops::Tech;
use kvm_ops::kvm::WhyNot;

use crate::common::again;
use crate::guest::host;

/// The capabilities by which a guest goes to another VM. The kernel claims them on Intel machines, too.
const CONTEXTS: [&str; 2] = [
    "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM",
    "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM",
];

fn offered(techs: &[Tech]) {
    let offer = host().offer();
    for tech in Tech::ALL {
        let line = offer.technology(tech).unwrap();
        assert_eq!(line.is_offered(), techs.contains(&tech), "{line:?}");
        let other = line.why_not.iter();
        let other = other.filter(|why| matches!(why, WhyNot::Refused(_)));
        assert_eq!(other.count(), 0, "{line:?}");
    }
    let tried = |name| {
        let line = offer.capabilities.iter().find(|cap| cap.name == name);
        (line.unwrap().answer, line.unwrap().tried)
    };
    assert_eq!(tried("KVM_X86_SW_PROTECTED_VM"), (1, Some(Ok(()))));
    let expected = match techs.contains(&Tech::Sev) {
        true => Ok(()),
        false => Err(libc::EINVAL),
    };
    for name in CONTEXTS {
        assert_eq!(tried(name), (1, Some(expected)), "{name}");
    }
}

#[test]
fn an_amd_machine_offers_sev_in_all_forms() {
    if again("offer::an_amd_machine_offers_sev_in_all_forms", "amd").is_none() {
        offered(&[Tech::Svm, Tech::Sev, Tech::SevEs, Tech::SevSnp]);
    }
}

#[test]
fn an_intel_machine_offers_tds() {
    if again("offer::an_intel_machine_offers_tds", "intel").is_none() {
        offered(&[Tech::Vmx, Tech::Tdx]);
    }
}
