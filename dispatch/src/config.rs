//! The configuration of a VM that is to be created.

use core::fmt;

use crate::{EncParams, Irqchip, Tech, Vendor, VmParams};

/// The kind of a VM: a normal one of the host's vendor, or one of a named technology.
///
/// ```
/// use kvm_ops::{Kind, Tech, Vendor};
/// assert_eq!(Kind::Normal.tech(Vendor::Amd), Tech::Svm);
/// assert_eq!(Kind::from_name("sev-snp"), Some(Kind::Of(Tech::SevSnp)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A normal VM: [`Tech::Vmx`] or [`Tech::Svm`], as the host's processors are.
    Normal,
    /// A VM of this technology, or an error.
    Of(Tech),
}

impl Kind {
    /// The technology on a host of that vendor.
    pub const fn tech(self, vendor: Vendor) -> Tech {
        match self {
            Self::Normal => Tech::normal(vendor),
            Self::Of(tech) => tech,
        }
    }

    /// `normal`, or the name of a technology.
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "normal" {
            Some(Self::Normal)
        } else {
            Tech::from_name(name).map(Self::Of)
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Normal => f.write_str("normal"),
            Self::Of(tech) => tech.fmt(f),
        }
    }
}

/// The configuration of a VM.
///
/// ```
/// use kvm_ops::{Irqchip, VmConfig};
/// let config = VmConfig::normal().vcpus(2).irqchip(Irqchip::Full);
/// assert_eq!(config.params().vcpus, 2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    kind: Kind,
    params: VmParams,
}

impl VmConfig {
    /// A VM of that kind with one vCPU and no irqchip.
    pub const fn new(kind: Kind) -> Self {
        Self {
            kind,
            params: VmParams::new(1),
        }
    }

    /// A normal VM.
    pub const fn normal() -> Self {
        Self::new(Kind::Normal)
    }

    /// Sets the number of vCPUs that it may have.
    pub const fn vcpus(mut self, vcpus: u32) -> Self {
        self.params.vcpus = vcpus;
        self
    }

    /// Sets the place of its interrupt controllers.
    pub const fn irqchip(mut self, irqchip: Irqchip) -> Self {
        self.params.irqchip = irqchip;
        self
    }

    /// Sets the parameters that only a confidential VM has.
    ///
    /// ```
    /// use kvm_ops::{EncParams, Kind, SevParams, Tech, VmConfig};
    /// let snp = SevParams { policy: Some(0x3_0000), ..SevParams::default() };
    /// let config = VmConfig::new(Kind::Of(Tech::SevSnp)).enc(EncParams::Sev(Box::new(snp)));
    /// assert_eq!(config.kind(), Kind::Of(Tech::SevSnp));
    /// ```
    pub fn enc(mut self, enc: EncParams) -> Self {
        self.params.enc = enc;
        self
    }

    /// The kind of VM.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The parameters for the back end.
    pub const fn params(&self) -> &VmParams {
        &self.params
    }
}
