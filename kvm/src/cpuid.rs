//! The CPUID that a vCPU starts with.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ops::{CpuidEntry, Error, Field, Irqchip, Result};

mod leaf1 {
    /// ECX: x2APIC.
    pub(super) const X2APIC: u32 = 1 << 21;
    /// ECX: the local APIC's timer in TSC-deadline mode.
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    /// ECX: running under a hypervisor; no processor sets it.
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// EDX: local APIC.
    pub(super) const APIC: u32 = 1 << 9;
}

/// The properties in which vCPUs differ.
pub(crate) struct Shape {
    pub(crate) apic_id: u32,
    pub(crate) irqchip: Irqchip,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`: older KVM does not show it in the supported CPUID.
    pub(crate) tsc_deadline: bool,
}

/// The supported CPUID as a vCPU of that shape shows it: with its own APIC id, because
/// `KVM_GET_SUPPORTED_CPUID` shows that of the host processor that it ran on, and without the
/// APIC's features if the platform has no APIC (Linux api.rst, `KVM_GET_SUPPORTED_CPUID`).
pub(crate) fn for_vcpu(supported: &CpuId, shape: &Shape) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x00ff_ffff | shape.apic_id << 24;
                entry.ecx |= leaf1::HYPERVISOR;
                entry.ecx &= !leaf1::TSC_DEADLINE;
                if shape.irqchip == Irqchip::None {
                    entry.ecx &= !leaf1::X2APIC;
                    entry.edx &= !leaf1::APIC;
                } else if shape.tsc_deadline {
                    entry.ecx |= leaf1::TSC_DEADLINE;
                }
            }
            // Extended topology: the x2APIC id, alike in every subleaf.
            0xb | 0x1f => entry.edx = shape.apic_id,
            // AMD: the extended APIC id.
            0x8000_001e => entry.eax = shape.apic_id,
            _ => {}
        }
    }
    cpuid
}

/// The kernel's structure for a neutral list.
pub(crate) fn from_entries(entries: &[CpuidEntry]) -> Result<CpuId> {
    let entries: Vec<kvm_cpuid_entry2> = entries
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.leaf,
            index: entry.subleaf,
            flags: if entry.subleaf_significant {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: entry.regs[0],
            ebx: entry.regs[1],
            ecx: entry.regs[2],
            edx: entry.regs[3],
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| Error::Invalid(Field::BufferLength, entries.len() as u64))
}

/// The neutral list for the kernel's structure.
///
/// Older kernels (6.1 is one) return as many entries as there is room for, with zeros in the rest,
/// which are cut.
pub(crate) fn to_entries(cpuid: &CpuId) -> Vec<CpuidEntry> {
    let all = cpuid.as_slice();
    let used = all.iter().rposition(|entry| *entry != Default::default());
    all[..used.map_or(0, |last| last + 1)]
        .iter()
        .map(|entry| CpuidEntry {
            leaf: entry.function,
            subleaf: entry.index,
            subleaf_significant: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            regs: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, regs: [u32; 4]) -> CpuidEntry {
        CpuidEntry {
            leaf,
            subleaf: 0,
            subleaf_significant: leaf == 0xb,
            regs,
        }
    }

    #[test]
    fn lists_survive_both_conversions_and_too_long_ones_are_refused() {
        let list = vec![entry(0, [1, 2, 3, 4]), entry(0xb, [5, 6, 7, 8])];
        assert_eq!(to_entries(&from_entries(&list).unwrap()), list);
        let with_room = vec![
            list[0],
            list[1],
            CpuidEntry::default(),
            CpuidEntry::default(),
        ];
        assert_eq!(to_entries(&from_entries(&with_room).unwrap()), list);
        let long = vec![entry(0, [0; 4]); kvm_bindings::KVM_MAX_CPUID_ENTRIES + 1];
        assert_eq!(
            from_entries(&long).map(drop),
            Err(Error::Invalid(Field::BufferLength, long.len() as u64))
        );
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_only_an_apic_that_exists() {
        let supported = from_entries(&[
            entry(1, [0, 0xffff_ffff, 0, 1 << 9]),
            entry(0xb, [0, 0, 0, 0x77]),
        ])
        .unwrap();
        for irqchip in [Irqchip::None, Irqchip::Full, Irqchip::Split] {
            for tsc_deadline in [false, true] {
                let shape = Shape {
                    apic_id: 5,
                    irqchip,
                    tsc_deadline,
                };
                let list = to_entries(&for_vcpu(&supported, &shape));
                let [_, ebx, ecx, edx] = list[0].regs;
                let apic = irqchip != Irqchip::None;
                assert_eq!(ebx, 0x05ff_ffff);
                assert_eq!(ecx & leaf1::TSC_DEADLINE != 0, apic && tsc_deadline);
                assert_ne!(ecx & leaf1::HYPERVISOR, 0);
                assert_eq!(edx & leaf1::APIC != 0, apic);
                assert_eq!(list[1].regs[3], 5);
            }
        }
    }
}
