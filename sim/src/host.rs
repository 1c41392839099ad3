//! The machine: a vendor, a count of the VMs that live on it, and the software platform for
//! confidential VMs.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use kvm_ops::{Error, Host, Missing, Result, Runs, Tech, Vendor, VmId, VmIds, VmParams};

use crate::sev::{Sev, SoftPsp};
use crate::tdx::{SoftSeam, Tdx};
use crate::{SimHostBuilder, SimVm, SoftPages};

/// A software platform. Each new value is another machine; clones are handles to it.
///
/// The software TDX module and the software AMD SP come up on first use, so a machine with normal
/// VMs only does not pay for them.
#[derive(Clone, Debug)]
pub struct SimHost {
    pub(crate) machine: Arc<Machine>,
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) vendor: Vendor,
    /// The processors of a VM execute at the same time.
    pub(crate) parallel: bool,
    ids: VmIds,
    live_vms: AtomicUsize,
    /// Instructions that processors executed.
    instructions: AtomicU64,
    /// The TDX machine; `None` inside if its module does not come up.
    pub(crate) tdx: WhenAsked<Tdx>,
    /// The AMD SP; `None` inside if its firmware does not come up.
    pub(crate) sev: WhenAsked<Sev>,
}

/// A platform that comes up when it is first asked for.
type WhenAsked<T> = LazyLock<Option<T>, Box<dyn FnOnce() -> Option<T> + Send>>;

impl SimHost {
    /// A machine with processors of that vendor.
    ///
    /// ```
    /// use kvm_ops_core::{Host, Runs, Tech, Vendor, VmParams, VmPort};
    /// use kvm_ops_sim::SimHost;
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let vm = host.create_vm(Tech::Vmx, &VmParams::new(1))?;
    /// assert_eq!((host.runs(), host.live_vms()), (Runs::Both, 1));
    /// vm.close()?;
    /// assert_eq!(host.live_vms(), 0);
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    pub fn new(vendor: Vendor) -> Self {
        Self::from_machine(Machine::new(vendor))
    }

    /// A machine whose software platform is given: processors, memory, keys.
    ///
    /// ```
    /// use kvm_ops_core::Vendor;
    /// use kvm_ops_sim::SimHost;
    ///
    /// let builder = SimHost::builder(Vendor::Intel);
    /// # #[cfg(feature = "tdx")]
    /// let builder = builder.tdx(soft_tdx_module::Platform::builder().processors([0, 0, 1, 1]));
    /// let host = builder.build()?;
    /// # #[cfg(feature = "tdx")]
    /// assert_eq!(host.tdx_platform().unwrap().config().packages, 2);
    /// # Ok::<(), kvm_ops_sim::BuildError>(())
    /// ```
    pub fn builder(vendor: Vendor) -> SimHostBuilder {
        SimHostBuilder::new(vendor)
    }

    /// The number of instructions that the vCPUs of all VMs of this machine executed as machine code.
    /// A VM with one vCPU executes the same number in each run, if the answers to its exits are the
    /// same.
    pub fn instructions(&self) -> u64 {
        self.machine.instructions.load(Ordering::Relaxed)
    }

    pub(crate) fn from_machine(machine: Machine) -> Self {
        Self {
            machine: Arc::new(machine),
        }
    }

    /// The number of VMs on this machine that were created and not yet dropped with all their vCPUs.
    pub fn live_vms(&self) -> usize {
        self.machine.live_vms.load(Ordering::Acquire)
    }
}

impl Machine {
    pub(crate) fn executed(&self, instructions: u64) {
        self.instructions.fetch_add(instructions, Ordering::Relaxed);
    }

    pub(crate) fn new(vendor: Vendor) -> Self {
        Self {
            vendor,
            parallel: false,
            ids: VmIds::new(),
            live_vms: AtomicUsize::new(0),
            instructions: AtomicU64::new(0),
            tdx: LazyLock::new(Box::new(Tdx::up_default)),
            sev: LazyLock::new(Box::new(Sev::up_default)),
        }
    }

    pub(crate) fn tdx(&self) -> Option<&Tdx> {
        match self.vendor {
            Vendor::Intel => self.tdx.as_ref(),
            _ => None,
        }
    }

    pub(crate) fn sev(&self) -> Option<&Sev> {
        match self.vendor {
            Vendor::Amd => self.sev.as_ref(),
            _ => None,
        }
    }

    fn offers(&self, tech: Tech) -> bool {
        match tech {
            Tech::Sev | Tech::SevEs | Tech::SevSnp => {
                self.sev().is_some_and(|sev| sev.offers(tech))
            }
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
    type Seam = SoftSeam;
    type Psp = SoftPsp;
    type Pages = SoftPages;

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
            return Err(Error::unsupported(Missing::HostTech, tech));
        }
        tracing::debug!(%tech, vcpus = params.vcpus, "VM created");
        Ok(SimVm::new(Arc::clone(&self.machine), tech, params.clone()))
    }

    fn runs(&self) -> Runs {
        Runs::Both
    }

    fn seam(&self) -> Option<&SoftSeam> {
        self.machine.tdx().map(Tdx::seam)
    }

    fn psp(&self) -> Option<&SoftPsp> {
        self.machine.sev().map(Sev::psp)
    }

    fn pages(&self) -> Option<&SoftPages> {
        let sev = self.machine.sev().map(Sev::pages);
        sev.or_else(|| self.machine.tdx().map(Tdx::pages))
    }
}
