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
}

impl fmt::Display for BuildError {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            #[cfg(feature = "tdx")]
            Self::Tdx(_) => _f.write_str("cannot build the TDX machine"),
            #[cfg(feature = "tdx")]
            Self::TdxBringUp(_) => _f.write_str("the TDX module does not come up"),
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
        }
    }
}

impl SimHostBuilder {
    pub(crate) fn new(vendor: Vendor) -> Self {
        Self {
            machine: Machine::new(vendor),
            #[cfg(feature = "tdx")]
            tdx: None,
        }
    }

    /// The TDX machine: processors, packages, memory, KeyIDs. Of no use on another vendor's.
    #[cfg(feature = "tdx")]
    #[must_use]
    pub fn tdx(mut self, builder: soft_tdx_module::PlatformBuilder) -> Self {
        self.tdx = Some(builder);
        self
    }

    /// Builds what was given, and brings its firmware up.
    ///
    /// # Errors
    /// [`BuildError`] with the platform's own reason as its source.
    #[cfg_attr(not(feature = "tdx"), allow(unused_mut))]
    pub fn build(mut self) -> Result<SimHost, BuildError> {
        #[cfg(feature = "tdx")]
        if let (Some(builder), Vendor::Intel) = (self.tdx, self.machine.vendor) {
            let up = crate::tdx::Tdx::up(builder)?;
            self.machine.tdx = std::sync::OnceLock::from(Some(up));
        }
        Ok(SimHost::from_machine(self.machine))
    }
}
