//! CPUID of the TDX machine: the features that the processor has.

use kvm_ops_cpu::{CpuidLeaf, CpuidTable};
use soft_tdx_module::PlatformConfig;

/// Leaf 1 EDX: several logical processors. No instruction goes with it.
const HTT: u32 = 1 << 28;
/// Leaf 7 EDX: MD_CLEAR, and the MSRs of mitigations: SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, CORE_CAPABILITIES,
/// SSBD. A TD has these MSRs, which do nothing here.
const MITIGATIONS: u32 = 1 << 10 | 0b11_1111 << 26;
/// EBX of this leaf is the size of the area that XSAVES writes: legacy part and header, before components are enabled.
/// Linux 7.2 does not go on with another size than it has counted.
const XSAVES: (u32, u32) = (0xd, 1);
const EBX: usize = 1;
const AREA: u32 = 576;
/// Leaf 1 EAX and EBX, sizes and addresses, are no features.
const ALL: u32 = u32::MAX;

/// Takes the features away that the processor lacks, so that a guest that looks does not find an instruction that is
/// #UD.
pub(super) fn cut(config: &mut PlatformConfig) {
    let processor = CpuidTable::intel();
    for row in &mut config.cpuid {
        let mask = mask(&processor, row.leaf, row.subleaf);
        for (value, mask) in row.values.iter_mut().zip(mask) {
            *value &= mask;
        }
        if (row.leaf, row.subleaf) == XSAVES {
            row.values[EBX] = AREA;
        }
    }
}

/// The bits of a leaf that stay.
fn mask(processor: &CpuidTable, leaf: u32, subleaf: u32) -> [u32; 4] {
    let CpuidLeaf { eax, ebx, ecx, edx } =
        processor.get(leaf, if subleaf < 2 { subleaf } else { 0 });
    match (leaf, subleaf) {
        (1, _) => [ALL, ALL, ecx, edx | HTT],
        // EAX is the last sub-leaf.
        (7, 0) => [0, ebx, ecx, edx | MITIGATIONS],
        (0xd, 0) => [eax, ALL, ALL, edx],
        (0xd, 1) => [eax, ALL, 0, 0],
        // Size and place of a state component that the processor has.
        (0xd, n @ 2..32) if processor.get(0xd, 0).eax >> n & 1 != 0 => [ALL; 4],
        // Other features of leaf 7, state components, performance counters, traces, last branches, tiles, key locker.
        (7 | 0xa | 0xd | 0x14 | 0x19 | 0x1c..=0x1e | 0x20 | 0x23 | 0x24, _) => [0; 4],
        (0x8000_0001, _) => [eax, ALL, ecx, edx],
        (0x8000_0008, _) => [ALL, ebx, ALL, ALL],
        _ => [ALL; 4],
    }
}
