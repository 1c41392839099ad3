//! The machine: a vendor, a count of what lives on it, and the software platform for confidential
//! VMs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[allow(unused_imports)] // `NoPort` is for what is switched off.
use kvm_ops::{Host, Missing, NoPort, Result, Tech, Vendor, VmId, VmIds, VmParams};

use crate::SimVm;

/// A software platform. Each value is a machine of its own; clones are handles to it.
///
/// The software TDX module and the software AMD SP come up when they are first asked for, so a
/// machine that holds normal VMs only does not pay for them.
#[derive(Clone, Debug)]
pub struct SimHost {
    machine: Arc<Machine>,
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) vendor: Vendor,
    ids: VmIds,
    live_vms: AtomicUsize,
    /// The TDX machine; `None` inside where its module does not come up.
    #[cfg(feature = "tdx")]
    pub(crate) tdx: std::sync::OnceLock<Option<crate::tdx::Tdx>>,
    /// The AMD SP; `None` inside where its firmware does not come up.
    #[cfg(feature = "sev")]
    pub(crate) sev: std::sync::OnceLock<Option<crate::sev::Sev>>,
}

impl SimHost {
    /// A machine with that vendor's processors.
    pub fn new(vendor: Vendor) -> Self {
        Self::from_machine(Machine::new(vendor))
    }

    /// A machine whose software platform is given.
    #[cfg(any(feature = "tdx", feature = "sev"))]
    pub fn builder(vendor: Vendor) -> crate::SimHostBuilder {
        crate::SimHostBuilder::new(vendor)
    }

    pub(crate) fn from_machine(machine: Machine) -> Self {
        Self {
            machine: Arc::new(machine),
        }
    }

    /// How many VMs live on this machine: created, and not yet dropped with all their vCPUs.
    pub fn live_vms(&self) -> usize {
        self.machine.live_vms.load(Ordering::Acquire)
    }

    /// The software TDX module below, for faults, traces and counts. `None` on AMD.
    #[cfg(feature = "tdx")]
    pub fn tdx_platform(&self) -> Option<&Arc<soft_tdx_module::Platform>> {
        self.machine.tdx().map(|tdx| &tdx.platform)
    }
}

#[cfg(feature = "sev")]
impl SimHost {
    /// The software AMD SP below, for faults, traces and counts. `None` on Intel.
    pub fn sev_platform(&self) -> Option<&Arc<soft_amd_sp::Platform>> {
        self.machine.sev().map(|sev| &sev.platform)
    }
}

impl Machine {
    pub(crate) fn new(vendor: Vendor) -> Self {
        Self {
            vendor,
            ids: VmIds::new(),
            live_vms: AtomicUsize::new(0),
            #[cfg(feature = "tdx")]
            tdx: std::sync::OnceLock::new(),
            #[cfg(feature = "sev")]
            sev: std::sync::OnceLock::new(),
        }
    }

    #[cfg(feature = "tdx")]
    pub(crate) fn tdx(&self) -> Option<&crate::tdx::Tdx> {
        use crate::tdx::Tdx;
        if self.vendor != Vendor::Intel {
            return None;
        }
        let up = || Tdx::up(Tdx::default_machine()).ok();
        self.tdx.get_or_init(up).as_ref()
    }

    #[cfg(feature = "sev")]
    pub(crate) fn sev(&self) -> Option<&crate::sev::Sev> {
        use crate::sev::{Sev, SevSetup};
        if self.vendor != Vendor::Amd {
            return None;
        }
        let up = || Sev::up(SevSetup::default()).ok();
        self.sev.get_or_init(up).as_ref()
    }

    fn offers(&self, tech: Tech) -> bool {
        match tech {
            #[cfg(feature = "sev")]
            Tech::Sev | Tech::SevEs | Tech::SevSnp => self.sev().is_some_and(|sev| {
                use kvm_ops::PspPort;
                !sev.psp.asid_pools().range(tech).is_empty()
            }),
            #[cfg(feature = "tdx")]
            Tech::Tdx => self.tdx().is_some(),
            _ => tech == Tech::normal(self.vendor),
        }
    }

    pub(crate) fn vm_created(&self) {
        self.live_vms.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn vm_gone(&self) {
        self.live_vms.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Host for SimHost {
    type Vm = SimVm;
    #[cfg(feature = "tdx")]
    type Seam = crate::SoftSeam;
    #[cfg(not(feature = "tdx"))]
    type Seam = NoPort;
    #[cfg(feature = "sev")]
    type Psp = crate::SoftPsp;
    #[cfg(not(feature = "sev"))]
    type Psp = NoPort;
    #[cfg(any(feature = "tdx", feature = "sev"))]
    type Pages = crate::SoftPages;
    #[cfg(not(any(feature = "tdx", feature = "sev")))]
    type Pages = NoPort;

    fn name(&self) -> &'static str {
        "sim"
    }

    fn vendor(&self) -> Vendor {
        self.machine.vendor
    }

    fn next_vm_id(&self) -> VmId {
        self.machine.ids.next()
    }

    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<SimVm> {
        params.validate()?;
        if !self.machine.offers(tech) {
            return Err(kvm_ops::Error::Unsupported(Missing::HostTech(tech)));
        }
        Ok(SimVm::new(Arc::clone(&self.machine), tech, params.clone()))
    }

    #[cfg(feature = "tdx")]
    fn seam(&self) -> Option<&Self::Seam> {
        self.machine.tdx().map(|tdx| &tdx.seam)
    }

    #[cfg(feature = "sev")]
    fn psp(&self) -> Option<&Self::Psp> {
        self.machine.sev().map(|sev| &sev.psp)
    }

    fn pages(&self) -> Option<&Self::Pages> {
        #[cfg(feature = "sev")]
        if let Some(sev) = self.machine.sev() {
            return Some(&sev.pages);
        }
        #[cfg(feature = "tdx")]
        if let Some(tdx) = self.machine.tdx() {
            return Some(&tdx.pages);
        }
        None
    }
}
