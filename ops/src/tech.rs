//! The technologies that hold VMs, and the vendors whose processors offer them.

use core::fmt;

use crate::OpName;

/// The maker of the host's processors, as CPUID leaf 0 names it.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// `GenuineIntel`: VMX and TDX.
    Intel,
    /// `AuthenticAMD` or `HygonGenuine`: SVM and SEV.
    Amd,
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intel => "Intel",
            Self::Amd => "AMD",
        })
    }
}

/// The technology that holds a VM. It is chosen once, when the VM is created.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tech {
    /// A normal VM on Intel VT-x.
    Vmx,
    /// A trust domain on Intel TDX.
    Tdx,
    /// A normal VM on AMD-V.
    Svm,
    /// An AMD SEV guest: memory encrypted.
    Sev,
    /// An AMD SEV-ES guest: memory and register state encrypted.
    SevEs,
    /// An AMD SEV-SNP guest: encrypted, and protected against remapping and replay.
    SevSnp,
    /// A technology of an embedder's back end, by its name in lower case.
    ///
    /// ```
    /// use kvm_ops_core::{OpName, Tech};
    /// static ENCLAVE: OpName = OpName("enclave");
    /// assert_eq!(Tech::Other(&ENCLAVE).name(), "enclave");
    /// ```
    Other(&'static OpName),
}

impl Tech {
    /// Every technology of this project.
    pub const ALL: [Tech; 6] = [
        Self::Vmx,
        Self::Tdx,
        Self::Svm,
        Self::Sev,
        Self::SevEs,
        Self::SevSnp,
    ];

    /// The technology of a normal VM on that vendor's processors.
    pub const fn normal(vendor: Vendor) -> Self {
        match vendor {
            Vendor::Intel => Self::Vmx,
            Vendor::Amd => Self::Svm,
        }
    }

    /// The vendor whose processors offer it. `None` for [`Other`](Self::Other), which needs no
    /// particular one.
    pub const fn vendor(self) -> Option<Vendor> {
        match self {
            Self::Vmx | Self::Tdx => Some(Vendor::Intel),
            Self::Svm | Self::Sev | Self::SevEs | Self::SevSnp => Some(Vendor::Amd),
            Self::Other(_) => None,
        }
    }

    /// True if the host cannot read the VM's private memory.
    pub const fn is_confidential(self) -> bool {
        matches!(self, Self::Tdx | Self::Sev | Self::SevEs | Self::SevSnp)
    }

    /// The number that `KVM_CREATE_VM` takes on x86 (`KVM_X86_*_VM` in Linux `asm/kvm.h`). `None` for
    /// a technology that KVM does not have.
    pub const fn kvm_vm_type(self) -> Option<u64> {
        match self {
            Self::Vmx | Self::Svm => Some(0),
            Self::Sev => Some(2),
            Self::SevEs => Some(3),
            Self::SevSnp => Some(4),
            Self::Tdx => Some(5),
            Self::Other(_) => None,
        }
    }

    /// The name in programs and files: `vmx`, `tdx`, `svm`, `sev`, `sev-es`, `sev-snp`.
    pub const fn name(self) -> &'static str {
        self.op_name().0
    }

    /// The name as an [`Error`](crate::Error) carries it.
    pub(crate) const fn op_name(self) -> &'static OpName {
        match self {
            Self::Vmx => &OpName("vmx"),
            Self::Tdx => &OpName("tdx"),
            Self::Svm => &OpName("svm"),
            Self::Sev => &OpName("sev"),
            Self::SevEs => &OpName("sev-es"),
            Self::SevSnp => &OpName("sev-snp"),
            Self::Other(name) => name,
        }
    }

    /// The technology of this project that has that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tech| tech.name() == name)
    }
}

impl fmt::Display for Tech {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_read_back() {
        for tech in Tech::ALL {
            assert_eq!(Tech::from_name(tech.name()), Some(tech));
        }
        assert_eq!(Tech::from_name("TDX"), None);
    }

    #[test]
    fn a_normal_vm_of_a_vendor_is_not_confidential() {
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let tech = Tech::normal(vendor);
            assert!(!tech.is_confidential());
            assert_eq!(tech.vendor(), Some(vendor));
            assert_eq!(tech.kvm_vm_type(), Some(0));
        }
    }
}
