//! The one place where the technology of a VM is chosen.

use alloc::boxed::Box;
use core::fmt;

use crate::{
    AnyVm, Backend, Diagnosis, Error, FreeReport, Host, Missing, Result, Tech, Vm, VmConfig, VmId,
    VmParams,
};

/// Creates a VM of the kind that `config` asks for, and initialises it (`vm_init`).
///
/// This is "if it is a TD then tdx, else vmx", said once: every later operation follows the variant
/// that is chosen here.
///
/// # Errors
/// A [`CreateError`] whose `error` is [`Error::Unsupported`] with the reason
/// ([`Missing::Feature`]: the build lacks the technology; [`Missing::Vendor`]: the host's processors
/// are of the other vendor; [`Missing::HostTech`]: the host does not offer it), [`Error::Invalid`] for a
/// parameter out of range, or the answer of the host. A VM that could not be initialised is torn down
/// before this returns, and the error holds the report.
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
assert_eq!(refused.error, Error::unsupported(Missing::Vendor, Tech::Sev));
# let report = vm.destroy();
# assert!(report.is_clean());
# Ok::<(), kvm_ops::Error>(())
```
"
)]
pub fn create<H: Host>(host: &H, config: &VmConfig) -> Result<Vm<AnyVm<H>>, CreateError> {
    create_as(host, config)
}

/// Creates a VM as [`create`] does, as a variant of an enum of the embedder's that holds
/// [`AnyVm`] of this host.
///
/// # Errors
/// As [`create`].
#[cfg_attr(
    all(feature = "sim", feature = "vmx", feature = "svm"),
    doc = "
```
use kvm_ops::sim::SimHost;
use kvm_ops::{AnyVcpu, AnyVm, Vendor, Vm, VmConfig, create_as};

kvm_ops::backend_enum! {
    pub enum OurVm { Sim(AnyVm<SimHost>) }
    pub enum OurVcpu { Sim(AnyVcpu<SimHost>) }
}

# fn main() -> Result<(), kvm_ops::Error> {
let mut fleet: Vec<Vm<OurVm>> = Vec::new();
for vendor in [Vendor::Intel, Vendor::Amd] {
    fleet.push(create_as(&SimHost::new(vendor), &VmConfig::normal())?);
}
# Ok(())
# }
```
"
)]
pub fn create_as<E, H>(host: &H, config: &VmConfig) -> Result<Vm<E>, CreateError>
where
    E: Backend + From<AnyVm<H>>,
    H: Host,
{
    Vm::init(create_back_end(host, config)?.into())
}

/// Creates a VM as [`create`] does, without initialising it or taking it into care.
///
/// # Errors
/// As [`create`], without a report.
pub fn create_back_end<H: Host>(host: &H, config: &VmConfig) -> Result<AnyVm<H>> {
    let tech = config.kind().tech(host.vendor());
    config.params().validate()?;
    if tech.vendor().is_some_and(|vendor| vendor != host.vendor()) {
        return Err(Error::unsupported(Missing::Vendor, tech));
    }
    choose(host, tech, host.next_vm_id(), config.params())
}

fn choose<H: Host>(host: &H, tech: Tech, id: VmId, params: &VmParams) -> Result<AnyVm<H>> {
    match tech {
        #[cfg(all(feature = "kvm", feature = "tdx"))]
        Tech::Tdx if host.holds(tech) => {
            let held = crate::held::HeldVm::create(host, id, tech, params)?;
            Ok(crate::IntelVm::from(held).into())
        }
        #[cfg(all(feature = "kvm", feature = "tdx"))]
        Tech::Vmx if params.enc == crate::EncParams::Private => {
            let held = crate::held::HeldVm::create(host, id, tech, params)?;
            Ok(crate::IntelVm::from(held).into())
        }
        #[cfg(all(feature = "kvm", feature = "sev"))]
        Tech::Svm if params.enc == crate::EncParams::Private => {
            let held = crate::held::HeldVm::create(host, id, tech, params)?;
            Ok(crate::AmdVm::from(held).into())
        }
        #[cfg(all(feature = "kvm", feature = "sev"))]
        Tech::Sev | Tech::SevEs | Tech::SevSnp if host.holds(tech) => {
            let held = crate::held::HeldVm::create(host, id, tech, params)?;
            Ok(crate::AmdVm::from(held).into())
        }
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
        _ => {
            let _ = (id, params);
            Err(Error::unsupported(Missing::Feature, tech))
        }
    }
}

/// The reason why a VM was not created, and the report of what was torn down.
#[derive(Debug)]
pub struct CreateError {
    /// The reason.
    pub error: Error,
    /// The reason in full, if a VM existed: firmware call and status by name, and what to do.
    pub diagnosis: Option<Box<Diagnosis>>,
    /// The report of the teardown, if a VM existed. Its leaks are the caller's to know.
    pub report: Option<Box<FreeReport>>,
}

impl CreateError {
    pub(crate) fn torn_down(error: Error, diagnosis: Diagnosis, report: FreeReport) -> Self {
        for leak in &report.leaks {
            tracing::error!(vm = report.vm.0, %leak, "leaked by a failed vm_init");
        }
        Self {
            error,
            diagnosis: Some(Box::new(diagnosis)),
            report: Some(Box::new(report)),
        }
    }
}

impl From<Error> for CreateError {
    fn from(error: Error) -> Self {
        Self {
            error,
            diagnosis: None,
            report: None,
        }
    }
}

/// Keeps the reason. The report is lost; its leaks were logged.
impl From<CreateError> for Error {
    fn from(failed: CreateError) -> Self {
        failed.error
    }
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.diagnosis {
            Some(diagnosis) => diagnosis.fmt(f)?,
            None => self.error.fmt(f)?,
        }
        match self.report.as_ref().map_or(0, |report| report.leaks.len()) {
            0 => Ok(()),
            leaks => write!(f, " ({leaks} things leaked by the teardown)"),
        }
    }
}

impl core::error::Error for CreateError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        Some(&self.error)
    }
}
