//! Which technology holds a VM, and which vendor's processors offer it.

use core::fmt;

/// Who made the host's processors, as CPUID leaf 0 tells.
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
}

impl Tech {
    /// Every technology.
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

    /// Whose processors offer it.
    pub const fn vendor(self) -> Vendor {
        match self {
            Self::Vmx | Self::Tdx => Vendor::Intel,
            Self::Svm | Self::Sev | Self::SevEs | Self::SevSnp => Vendor::Amd,
        }
    }

    /// Whether the host cannot read the VM's private memory.
    pub const fn is_confidential(self) -> bool {
        !matches!(self, Self::Vmx | Self::Svm)
    }

    /// The number that `KVM_CREATE_VM` takes on x86 (`KVM_X86_*_VM` in Linux `asm/kvm.h`).
    pub const fn kvm_vm_type(self) -> u64 {
        match self {
            Self::Vmx | Self::Svm => 0,
            Self::Sev => 2,
            Self::SevEs => 3,
            Self::SevSnp => 4,
            Self::Tdx => 5,
        }
    }

    /// The name by which programs and files call it: `vmx`, `tdx`, `svm`, `sev`, `sev-es`,
    /// `sev-snp`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Tdx => "tdx",
            Self::Svm => "svm",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::SevSnp => "sev-snp",
        }
    }

    /// The technology of that name.
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
            assert_eq!(tech.vendor(), vendor);
            assert_eq!(tech.kvm_vm_type(), 0);
        }
    }
}
