//! The machine without `/dev/kvm`: its processor and its KVM modules.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kvm_ops::Vendor;

use crate::{SevDevice, vendor};

/// AMD's leaf of memory encryption (APM vol. 3, Fn8000_001F): EAX bits 1, 3 and 4.
const AMD_ENCRYPTION: u32 = 0x8000_001f;
const AMD_MAX_EXTENDED: u32 = 0x8000_0000;

/// The processor and the KVM modules of this machine, found without opening a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostMachine {
    /// The vendor string of CPUID leaf 0.
    pub vendor_string: String,
    /// The processor's name.
    pub model: String,
    /// The processor's features, as `/proc/cpuinfo` names them: sorted.
    pub flags: Vec<String>,
    /// Memory encryption in CPUID, even if Linux does not use it; none on Intel.
    pub encryption: Encryption,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// `/dev/sev`, on AMD processors.
    pub sev: SevDevice,
    /// The loaded vendor modules of KVM (`kvm_intel`, `kvm_amd`, ..) with their parameters.
    pub modules: BTreeMap<String, BTreeMap<String, String>>,
}

/// The technologies in AMD's CPUID leaf `0x8000001f`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encryption {
    /// SEV, EAX bit 1.
    pub sev: bool,
    /// SEV-ES, EAX bit 3.
    pub sev_es: bool,
    /// SEV-SNP, EAX bit 4.
    pub sev_snp: bool,
    /// The number of ASIDs, ECX.
    pub asids: u32,
    /// The first ASID of plain SEV, EDX: the firmware set-up chooses it. Those below are for SEV-ES and SNP.
    pub min_sev_asid: u32,
}

impl Encryption {
    /// The number of ASIDs for guests of plain SEV.
    pub const fn sev_asids(&self) -> u32 {
        (self.asids + 1).saturating_sub(if self.min_sev_asid == 0 {
            1
        } else {
            self.min_sev_asid
        })
    }

    /// The number of ASIDs for SEV-ES and SNP guests, which share them.
    pub const fn es_asids(&self) -> u32 {
        let below = self.min_sev_asid.saturating_sub(1);
        if below < self.asids {
            below
        } else {
            self.asids
        }
    }
}

impl HostMachine {
    /// Looks at this machine.
    pub fn probe() -> Self {
        let mut machine = Self::read(Path::new("/proc/cpuinfo"), Path::new("/sys/module"));
        let release = fs::read_to_string("/proc/sys/kernel/osrelease");
        machine.kernel = release.unwrap_or_default().trim().to_owned();
        if machine.vendor() == Some(Vendor::Amd) {
            machine.sev = SevDevice::probe(Path::new("/dev/sev"));
        }
        machine
    }

    /// The kernel's version, if its release begins with one.
    pub fn kernel_version(&self) -> Option<(u32, u32)> {
        let mut parts = self.kernel.split(|c: char| !c.is_ascii_digit());
        let mut number = || parts.next()?.parse().ok();
        Some((number()?, number()?))
    }

    fn read(cpuinfo: &Path, modules: &Path) -> Self {
        let cpuinfo = fs::read_to_string(cpuinfo).unwrap_or_default();
        let mut flags: Vec<String> = field(&cpuinfo, "flags")
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        flags.sort_unstable();
        Self {
            vendor_string: vendor::vendor_string(),
            model: field(&cpuinfo, "model name").to_owned(),
            flags,
            encryption: Encryption::probe(),
            modules: read_modules(modules),
            ..Self::default()
        }
    }

    /// The vendor, if it is a known one.
    pub fn vendor(&self) -> Option<Vendor> {
        vendor::from_string(&self.vendor_string)
    }

    /// True if the processor has the feature of that name in `/proc/cpuinfo`.
    pub fn has_flag(&self, name: &str) -> bool {
        self.flags
            .binary_search_by(|flag| flag.as_str().cmp(name))
            .is_ok()
    }

    /// True if this machine is itself a virtual machine.
    pub fn is_guest(&self) -> bool {
        self.has_flag("hypervisor")
    }

    /// The value of a module's parameter, if the module is loaded and has it.
    pub fn parameter(&self, module: &str, name: &str) -> Option<&str> {
        self.modules.get(module)?.get(name).map(String::as_str)
    }
}

impl Encryption {
    fn probe() -> Self {
        if vendor::from_string(&vendor::vendor_string()) != Some(Vendor::Amd)
            || vendor::cpuid(AMD_MAX_EXTENDED)[0] < AMD_ENCRYPTION
        {
            return Self::default();
        }
        let [eax, _, ecx, edx] = vendor::cpuid(AMD_ENCRYPTION);
        Self {
            asids: ecx,
            min_sev_asid: edx,
            sev: eax >> 1 & 1 != 0,
            sev_es: eax >> 3 & 1 != 0,
            sev_snp: eax >> 4 & 1 != 0,
        }
    }
}

/// The first value of a name in `/proc/cpuinfo`; all processors of a machine show the same.
fn field<'a>(cpuinfo: &'a str, name: &str) -> &'a str {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or("", |(_, value)| value.trim())
}

/// The modules named `kvm_*`. Built-in ones are there too, if they have parameters.
fn read_modules(directory: &Path) -> BTreeMap<String, BTreeMap<String, String>> {
    let Ok(entries) = fs::read_dir(directory) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(name, _)| name.starts_with("kvm_"))
        .map(|(name, path)| (name, read_parameters(&path.join("parameters"))))
        .collect()
}

/// The parameters that may be read; some are for root only.
fn read_parameters(directory: &Path) -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let value = fs::read_to_string(entry.path()).ok()?;
            Some((
                entry.file_name().into_string().ok()?,
                value.trim().to_owned(),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuinfo_and_modules_are_read_as_linux_writes_them() {
        let root = std::env::temp_dir().join(format!("kvm-ops-machine-{}", std::process::id()));
        let parameters = root.join("module/kvm_amd/parameters");
        fs::create_dir_all(&parameters).unwrap();
        fs::create_dir_all(root.join("module/kvm")).unwrap();
        fs::create_dir_all(root.join("module/e1000")).unwrap();
        fs::write(parameters.join("sev"), "Y\n").unwrap();
        let cpuinfo = "processor\t: 0\nmodel name\t: A B\nflags\t\t: svm fpu npt\n\n\
                       processor\t: 1\nflags\t\t: other\n";
        fs::write(root.join("cpuinfo"), cpuinfo).unwrap();

        let machine = HostMachine::read(&root.join("cpuinfo"), &root.join("module"));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(machine.model, "A B");
        assert!(machine.has_flag("svm") && machine.has_flag("fpu"));
        assert!(!machine.has_flag("other") && !machine.is_guest());
        assert_eq!(machine.modules.len(), 1);
        assert_eq!(machine.parameter("kvm_amd", "sev"), Some("Y"));
        assert_eq!(machine.parameter("kvm_amd", "npt"), None);
        assert_eq!(machine.parameter("kvm_intel", "tdx"), None);
    }

    #[test]
    fn asids_are_shared_out_as_the_firmware_set_up_says() {
        for (asids, min, sev, es) in [
            (509, 100, 410, 99),
            (509, 1, 509, 0),
            (509, 510, 0, 509),
            (509, 600, 0, 509),
            (0, 0, 0, 0),
            (15, 0, 15, 0),
        ] {
            let encryption = Encryption {
                asids,
                min_sev_asid: min,
                ..Encryption::default()
            };
            let found = (encryption.sev_asids(), encryption.es_asids());
            assert_eq!(found, (sev, es), "{asids} from {min}");
        }
    }

    #[test]
    fn a_kernels_version_is_read_from_its_release() {
        for (release, version) in [
            ("6.18.44-fc-v669", Some((6, 18))),
            ("7.3.4-1~bpo13+1", Some((7, 3))),
            ("6.16-rc1", Some((6, 16))),
            ("6", None),
            ("", None),
        ] {
            let machine = HostMachine {
                kernel: release.to_owned(),
                ..HostMachine::default()
            };
            assert_eq!(machine.kernel_version(), version, "{release}");
        }
    }

    #[test]
    fn a_machine_without_proc_and_sys_is_an_empty_one() {
        let machine = HostMachine::read(Path::new("/nonexistent"), Path::new("/nonexistent"));
        assert!(machine.flags.is_empty() && machine.modules.is_empty());
    }
}
