//! MSRs of a TD's vCPU that KVM keeps: the others are the TDX module's or nobody's.

/// MSRs that user space reads and, but for [`READ_ONLY`], writes: ranges, both ends included.
const EMULATED: [(u32, u32); 17] = [
    (0x1b, 0x1b),               // IA32_APIC_BASE
    (0x3a, 0x3a),               // IA32_FEATURE_CONTROL
    (0x8b, 0x8b),               // IA32_BIOS_SIGN_ID
    (0xce, 0xce),               // MSR_PLATFORM_INFO
    (0xfe, 0xfe),               // IA32_MTRRCAP
    (0x10a, 0x10a),             // IA32_ARCH_CAPABILITIES
    (0x140, 0x140),             // MISC_FEATURES_ENABLES
    (0x179, 0x17b),             // IA32_MCG_CAP, IA32_MCG_STATUS, IA32_MCG_CTL
    (0x1a0, 0x1a0),             // IA32_MISC_ENABLE
    (0x1fc, 0x1fc),             // MSR_POWER_CTL
    (0x200, 0x26f),             // variable and fixed MTRRs
    (0x277, 0x277),             // IA32_PAT
    (0x2ff, 0x2ff),             // IA32_MTRR_DEF_TYPE
    (0x4d0, 0x4d0),             // IA32_MCG_EXT_CTL
    (0x6e0, 0x6e0),             // IA32_TSC_DEADLINE
    (0x4b56_4d05, 0x4b56_4d05), // KVM's poll control
    (0xc000_0080, 0xc000_0080), // EFER
];

/// IA32_APIC_BASE, IA32_FEATURE_CONTROL, EFER.
const READ_ONLY: [u32; 3] = [0x1b, 0x3a, 0xc000_0080];

/// True for an MSR that user space may read, or write.
pub(crate) fn has_emulated_msr(index: u32, write: bool) -> bool {
    let mut ranges = EMULATED.iter();
    ranges.any(|(first, last)| (*first..=*last).contains(&index))
        && !(write && READ_ONLY.contains(&index))
}
