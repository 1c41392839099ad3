//! The answers to CPUID of a normal VM's processors.

use kvm_ops::{CpuidEntry, Vendor};
use kvm_ops_cpu::CpuidTable;

use crate::SimHost;

/// CPUID leaf 1: x2APIC and the TSC deadline in ECX, the local APIC in EDX.
const LEAF1_ECX_APIC: u32 = 1 << 21 | 1 << 24;
const LEAF1_EDX_APIC: u32 = 1 << 9;

/// What a vCPU answers to CPUID unless told otherwise.
pub(super) fn table(vendor: Vendor, has_apic: bool) -> CpuidTable {
    let mut table = match vendor {
        Vendor::Amd => CpuidTable::amd(),
        _ => CpuidTable::intel(),
    };
    if !has_apic {
        let mut leaf = table.get(1, 0);
        leaf.ecx &= !LEAF1_ECX_APIC;
        leaf.edx &= !LEAF1_EDX_APIC;
        table.set(1, 0, leaf);
    }
    table
}

impl SimHost {
    /// All that a normal VM's vCPU with a local APIC can answer to CPUID: its answers, unless its embedder
    /// sets others.
    ///
    /// ```
    /// use kvm_ops_core::Vendor;
    /// use kvm_ops_sim::SimHost;
    ///
    /// let leaves = SimHost::new(Vendor::Amd).cpuid();
    /// assert_eq!(leaves[0].regs[1].to_le_bytes(), *b"Auth");
    /// ```
    pub fn cpuid(&self) -> Vec<CpuidEntry> {
        let table = table(self.machine.vendor, true);
        let leaves = table.leaves().map(|(leaf, subleaf, values)| CpuidEntry {
            leaf,
            subleaf,
            subleaf_significant: has_subleaves(leaf),
            regs: [values.eax, values.ebx, values.ecx, values.edx],
        });
        leaves.collect()
    }
}

/// True for the leaves whose answer depends on ECX.
fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x14 | 0x1f)
}
