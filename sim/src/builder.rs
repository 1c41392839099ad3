//! Machines other than the default ones.

use std::error::Error;
use std::fmt;
use std::sync::LazyLock;

use kvm_ops::Vendor;

use crate::SimHost;
use crate::host::Machine;
use crate::{sev, tdx};

/// Makes a [`SimHost`] whose software platform is not the default one.
#[derive(Debug)]
pub struct SimHostBuilder {
    vendor: Vendor,
    parallel: bool,
    pub(crate) tdx: Option<tdx::Setup>,
    pub(crate) sev: Option<sev::Setup>,
}

/// The reason why a machine cannot be built; the platform's error is its source.
#[derive(Debug)]
pub struct BuildError {
    stage: BuildStage,
    source: Box<dyn Error + Send + Sync>,
}

/// The stage at which building a machine failed.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildStage {
    /// The parts of the machine do not fit together.
    Machine,
    /// The firmware (TDX module, AMD SP) does not come up on it.
    Firmware,
}

#[allow(dead_code)] // Nothing fails in a build without confidential VMs.
impl BuildError {
    pub(crate) fn machine(source: impl Error + Send + Sync + 'static) -> Self {
        let (stage, source) = (BuildStage::Machine, Box::new(source));
        Self { stage, source }
    }

    pub(crate) fn firmware(source: impl Error + Send + Sync + 'static) -> Self {
        let (stage, source) = (BuildStage::Firmware, Box::new(source));
        Self { stage, source }
    }

    /// The stage that failed.
    pub fn stage(&self) -> BuildStage {
        self.stage
    }

    /// Logs why a default machine has no firmware: the caller only sees that it is absent.
    pub(crate) fn log(self) {
        tracing::error!(error = %self, cause = %self.source, "confidential VMs are not offered");
    }
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.stage {
            BuildStage::Machine => "the parts of the machine do not fit together",
            BuildStage::Firmware => "the firmware of the machine does not come up",
        })
    }
}

impl Error for BuildError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

impl SimHostBuilder {
    pub(crate) fn new(vendor: Vendor) -> Self {
        Self {
            vendor,
            parallel: false,
            tdx: None,
            sev: None,
        }
    }

    /// Chooses whether the vCPUs of a VM execute machine code at the same time, each on the thread that runs it.
    ///
    /// By default they take turns, time passes with instructions, and a run is the same each time. At the same time,
    /// the work of several vCPUs is done sooner, the guest's time is that of the host, and no run is like another
    /// one. At most as many vCPUs of TDs execute at a time as the TDX machine has logical processors.
    ///
    /// ```
    /// use kvm_ops_core::{Host, Tech, Vendor, VmParams};
    /// use kvm_ops_sim::SimHost;
    ///
    /// let host = SimHost::builder(Vendor::Amd).parallel(true).build_lazy();
    /// assert!(host.create_vm(Tech::Svm, &VmParams::new(2)).is_ok());
    /// ```
    pub fn parallel(mut self, parallel: bool) -> Self {
        self.parallel = parallel;
        self
    }

    /// Builds the machine, and brings its firmware up. Parts of another vendor's machine are ignored.
    ///
    /// # Errors
    /// [`BuildError`] with the platform's error as its source.
    pub fn build(self) -> Result<SimHost, BuildError> {
        let mut machine = Machine::new(self.vendor);
        machine.parallel = self.parallel;
        if let (Some(setup), Vendor::Intel) = (self.tdx, self.vendor) {
            let tdx = tdx::Tdx::up(setup)?;
            machine.tdx = LazyLock::new(Box::new(|| Some(tdx)));
        }
        if let (Some(setup), Vendor::Amd) = (self.sev, self.vendor) {
            let sev = sev::Sev::up(setup)?;
            machine.sev = LazyLock::new(Box::new(|| Some(sev)));
        }
        Ok(SimHost::from_machine(machine))
    }

    /// Builds the machine; its firmware comes up when the machine is first asked for a confidential
    /// VM, so a machine with normal VMs only does not pay for it. Firmware that does not come up is
    /// logged, and the machine then offers no confidential VMs.
    pub fn build_lazy(self) -> SimHost {
        let mut machine = Machine::new(self.vendor);
        machine.parallel = self.parallel;
        if let Some(setup) = self.tdx {
            machine.tdx = LazyLock::new(Box::new(|| tdx::Tdx::up_or_log(setup)));
        }
        if let Some(setup) = self.sev {
            machine.sev = LazyLock::new(Box::new(|| sev::Sev::up_or_log(setup)));
        }
        SimHost::from_machine(machine)
    }
}
