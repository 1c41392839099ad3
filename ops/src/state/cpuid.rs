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

impl CpuidEntry {
    /// The first entry of a list that answers for this leaf and sub-leaf, as `kvm_find_cpuid_entry2` looks it up.
    ///
    /// ```
    /// use kvm_ops::CpuidEntry;
    ///
    /// let row = |leaf, subleaf, subleaf_significant| CpuidEntry { leaf, subleaf, subleaf_significant, regs: [leaf; 4] };
    /// let list = [row(1, 0, false), row(4, 1, true)];
    /// assert_eq!(CpuidEntry::find(&list, 1, 7), Some(&list[0]));
    /// assert_eq!(CpuidEntry::find(&list, 4, 1), Some(&list[1]));
    /// assert_eq!(CpuidEntry::find(&list, 4, 0), None);
    /// ```
    pub fn find(list: &[Self], leaf: u32, subleaf: u32) -> Option<&Self> {
        list.iter().find(|entry| {
            entry.leaf == leaf && (!entry.subleaf_significant || entry.subleaf == subleaf)
        })
    }
}
