//! CPUID values.

/// One CPUID leaf (`struct kvm_cpuid_entry2`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// Leaf (EAX on input).
    pub leaf: u32,
    /// Sub-leaf (ECX on input).
    pub subleaf: u32,
    /// True if the leaf has sub-leaves, so that `subleaf` is compared.
    pub subleaf_significant: bool,
    /// EAX, EBX, ECX, EDX on output.
    pub regs: [u32; 4],
}
