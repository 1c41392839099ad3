//! Machines other than the default ones.

use std::fmt;

use kvm_ops::Vendor;

use crate::SimHost;
use crate::host::Machine;

/// Makes a [`SimHost`] whose software platform is not the default one.
#[derive(Debug)]
pub struct SimHostBuilder {
    machine: Machine,
    #[cfg(feature = "tdx")]
    tdx: Option<soft_tdx_module::PlatformBuilder>,
    #[cfg(feature = "sev")]
    sev: Option<crate::SevSetup>,
}

/// Why a machine cannot be built.
#[non_exhaustive]
#[derive(Debug)]
pub enum BuildError {
    /// The parts of the TDX machine do not fit together.
    #[cfg(feature = "tdx")]
    Tdx(soft_tdx_module::BuildError),
    /// The TDX module does not come up on it.
    #[cfg(feature = "tdx")]
    TdxBringUp(soft_tdx_module::CallError),
    /// The parts of the AMD machine do not fit together.
    #[cfg(feature = "sev")]
    Sev(soft_amd_sp::BuildError),
    /// The AMD SP's firmware does not come up on it.
    #[cfg(feature = "sev")]
    SevBringUp(soft_amd_sp::Status),
}

impl fmt::Display for BuildError {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            #[cfg(feature = "tdx")]
            Self::Tdx(_) => _f.write_str("cannot build the TDX machine"),
            #[cfg(feature = "tdx")]
            Self::TdxBringUp(_) => _f.write_str("the TDX module does not come up"),
            #[cfg(feature = "sev")]
            Self::Sev(_) => _f.write_str("cannot build the AMD machine"),
            #[cfg(feature = "sev")]
            Self::SevBringUp(_) => _f.write_str("the firmware of the AMD SP does not come up"),
        }
    }
}

impl std::error::Error for BuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match *self {
            #[cfg(feature = "tdx")]
            Self::Tdx(ref error) => Some(error),
            #[cfg(feature = "tdx")]
            Self::TdxBringUp(ref error) => Some(error),
            #[cfg(feature = "sev")]
            Self::Sev(ref error) => Some(error),
            #[cfg(feature = "sev")]
            Self::SevBringUp(ref error) => Some(error),
        }
    }
}

impl SimHostBuilder {
    pub(crate) fn new(vendor: Vendor) -> Self {
        Self {
            machine: Machine::new(vendor),
            #[cfg(feature = "tdx")]
            tdx: None,
            #[cfg(feature = "sev")]
            sev: None,
        }
    }

    /// The TDX machine: processors, packages, memory, KeyIDs. Of no use on another vendor's.
    #[cfg(feature = "tdx")]
    #[must_use]
    pub fn tdx(mut self, builder: soft_tdx_module::PlatformBuilder) -> Self {
        self.tdx = Some(builder);
        self
    }

    /// The AMD machine and how its firmware is brought up. Of no use on another vendor's.
    #[cfg(feature = "sev")]
    #[must_use]
    pub fn sev(mut self, setup: impl Into<crate::SevSetup>) -> Self {
        self.sev = Some(setup.into());
        self
    }

    /// Builds what was given, and brings its firmware up.
    ///
    /// # Errors
    /// [`BuildError`] with the platform's own reason as its source.
    pub fn build(mut self) -> Result<SimHost, BuildError> {
        #[cfg(feature = "tdx")]
        if let (Some(builder), Vendor::Intel) = (self.tdx, self.machine.vendor) {
            let up = crate::tdx::Tdx::up(builder)?;
            self.machine.tdx = std::sync::OnceLock::from(Some(up));
        }
        #[cfg(feature = "sev")]
        if let (Some(setup), Vendor::Amd) = (self.sev, self.machine.vendor) {
            let up = crate::sev::Sev::up(setup)?;
            self.machine.sev = std::sync::OnceLock::from(Some(up));
        }
        Ok(SimHost::from_machine(self.machine))
    }
}
