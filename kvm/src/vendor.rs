//! The vendor of the processor.

use std::arch::x86_64::__cpuid;

use kvm_ops::Vendor;

/// The registers EAX, EBX, ECX, EDX of a CPUID leaf of the host.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 processor has the CPUID instruction, in every mode. (A safe function in
    // newer toolchains, hence the allow.)
    #[allow(unused_unsafe)]
    let r = unsafe { __cpuid(leaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The vendor string of the processor.
pub(crate) fn vendor_string() -> String {
    name_of(cpuid(0))
}

/// The vendor string in CPUID leaf 0: EBX, EDX, ECX in this order (SDM vol. 2, CPUID).
pub(crate) fn name_of([_, ebx, ecx, edx]: [u32; 4]) -> String {
    let bytes: Vec<u8> = [ebx, edx, ecx]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The vendor that a string of leaf 0 names.
pub(crate) fn from_string(name: &str) -> Option<Vendor> {
    match name {
        "GenuineIntel" => Some(Vendor::Intel),
        "AuthenticAMD" | "HygonGenuine" => Some(Vendor::Amd),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_known_vendor_has_its_string_and_others_have_none() {
        assert_eq!(from_string("GenuineIntel"), Some(Vendor::Intel));
        assert_eq!(from_string("AuthenticAMD"), Some(Vendor::Amd));
        assert_eq!(from_string("HygonGenuine"), Some(Vendor::Amd));
        for other in ["  Shanghai  ", "CentaurHauls", "", "genuineintel"] {
            assert_eq!(from_string(other), None);
        }
    }

    #[test]
    fn the_vendor_string_agrees_with_proc_cpuinfo() {
        let Ok(cpuinfo) = std::fs::read_to_string("/proc/cpuinfo") else {
            println!("skipped: no /proc/cpuinfo");
            return;
        };
        let line = cpuinfo.lines().find(|l| l.starts_with("vendor_id"));
        let name = line.and_then(|l| l.split(": ").nth(1)).unwrap_or_default();
        assert_eq!(vendor_string().trim(), name.trim());
    }
}
