//! The one place where the technology of a VM is chosen.

use crate::{AnyVm, Error, Host, Missing, Result, Tech, Vm, VmConfig, VmId, VmParams};

/// Creates a VM of the kind that `config` asks for, and initialises it (`vm_init`).
///
/// This is "if it is a TD then tdx, else vmx", said once: every later operation follows the
/// variant that is chosen here.
///
/// # Errors
/// [`Error::Unsupported`] says whether the build lacks the technology ([`Missing::Feature`]), the
/// host's processors are of the other vendor ([`Missing::Vendor`]) or the host does not offer it;
/// [`Error::Invalid`] names a parameter out of range; otherwise what the host answers. A VM that
/// could not be initialised is torn down before this returns.
#[cfg_attr(
    all(feature = "sim", feature = "vmx"),
    doc = "
```
use kvm_ops::sim::SimHost;
use kvm_ops::{Error, Kind, Missing, Tech, Vendor, VmConfig, create};

let host = SimHost::new(Vendor::Intel);
let vm = create(&host, &VmConfig::normal())?;
assert_eq!(vm.tech(), Tech::Vmx);

let refused = create(&host, &VmConfig::new(Kind::Of(Tech::Sev))).unwrap_err();
assert_eq!(refused, Error::Unsupported(Missing::Vendor(Tech::Sev)));
# let report = vm.destroy();
# assert!(report.is_clean());
# Ok::<(), kvm_ops::Error>(())
```
"
)]
pub fn create<H: Host>(host: &H, config: &VmConfig) -> Result<Vm<AnyVm<H>>> {
    let tech = config.kind().tech(host.vendor());
    config.params().validate()?;
    if tech.vendor() != host.vendor() {
        return Err(Error::Unsupported(Missing::Vendor(tech)));
    }
    Vm::init(choose(host, tech, host.next_vm_id(), config.params())?)
}

fn choose<H: Host>(host: &H, tech: Tech, id: VmId, params: &VmParams) -> Result<AnyVm<H>> {
    match tech {
        #[cfg(feature = "vmx")]
        Tech::Vmx => crate::vmx::VmxVm::create(host, id, params).map(AnyVm::from),
        #[cfg(feature = "tdx")]
        Tech::Tdx => crate::tdx::TdxVm::create(host, id, params).map(AnyVm::from),
        #[cfg(feature = "svm")]
        Tech::Svm => crate::svm::SvmVm::create(host, id, params).map(AnyVm::from),
        #[cfg(feature = "sev")]
        Tech::Sev | Tech::SevEs | Tech::SevSnp => {
            crate::sev::SevVm::create(host, id, tech, params).map(AnyVm::from)
        }
        #[allow(unreachable_patterns)] // With every technology built in, nothing is left.
        _ => {
            let _ = (id, params);
            Err(Error::Unsupported(Missing::Feature(tech)))
        }
    }
}
