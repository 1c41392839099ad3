//! The MSR accesses of a guest that are not the platform's: those that the embedder's filter takes from it, and those that
//! fail and that the embedder wants to see.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

/// RDMSR or WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrAccess {
    /// RDMSR.
    Read,
    /// WRMSR.
    Write,
}

/// The reason for which the platform does not do an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRefusal {
    /// The filter.
    Filtered,
    /// The processor has no such MSR.
    Unknown,
    /// The processor has it, but not now or not with this value.
    Invalid,
}

/// A row of MSRs with a decision for each.
#[derive(Clone, Debug)]
pub struct MsrRange {
    /// The first MSR.
    pub first: u32,
    /// How many there are.
    pub count: u32,
    /// It decides of reads.
    pub reads: bool,
    /// It decides of writes.
    pub writes: bool,
    /// A bit for each MSR, from the lowest on: 1 lets the access through. Bits that are missing are 0.
    pub allowed: Vec<u8>,
}

/// The MSRs that a guest reaches: the first range that has an MSR and decides of the access counts.
#[derive(Clone, Debug)]
pub struct MsrFilter {
    /// What is in no range is let through.
    pub allows_others: bool,
    /// The ranges.
    pub ranges: Vec<MsrRange>,
}

/// The failing accesses that leave to the embedder, by their reason. The others are #GP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsrLeaves {
    /// [`MsrRefusal::Filtered`].
    pub filtered: bool,
    /// [`MsrRefusal::Unknown`].
    pub unknown: bool,
    /// [`MsrRefusal::Invalid`].
    pub invalid: bool,
}

/// What an embedder has said of the MSRs of a guest, and may change while vCPUs run: they see it at their next turn, some
/// 20,000 instructions later at most.
#[derive(Debug, Default)]
pub struct MsrExits {
    /// There is a filter, or something leaves.
    on: AtomicBool,
    wishes: RwLock<Wishes>,
}

#[derive(Debug, Default)]
struct Wishes {
    filter: Option<MsrFilter>,
    leaves: MsrLeaves,
}

impl MsrRange {
    fn decides(&self, index: u32, access: MsrAccess) -> Option<bool> {
        let chosen = match access {
            MsrAccess::Read => self.reads,
            MsrAccess::Write => self.writes,
        };
        let at = index.checked_sub(self.first)?;
        if !chosen || at >= self.count {
            return None;
        }
        let byte = self.allowed.get(at as usize / 8).copied().unwrap_or(0);
        Some(byte >> (at % 8) & 1 != 0)
    }
}

impl MsrFilter {
    /// x2APIC registers are never filtered, as on KVM.
    fn allows(&self, index: u32, access: MsrAccess) -> bool {
        const X2APIC: core::ops::RangeInclusive<u32> = 0x800..=0x8ff;
        let mut decisions = self.ranges.iter().map(|range| range.decides(index, access));
        X2APIC.contains(&index) || decisions.find_map(|it| it).unwrap_or(self.allows_others)
    }
}

impl MsrExits {
    fn change(&self, change: impl FnOnce(&mut Wishes)) {
        let mut wishes = self.wishes.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut wishes);
        let on = wishes.filter.is_some() || wishes.leaves != MsrLeaves::default();
        self.on.store(on, Ordering::Release);
    }

    /// Sets the filter in place of the last one.
    pub fn set_filter(&self, filter: MsrFilter) {
        self.change(|wishes| wishes.filter = Some(filter));
    }

    /// Sets which failing accesses leave.
    pub fn set_leaves(&self, leaves: MsrLeaves) {
        self.change(|wishes| wishes.leaves = leaves);
    }

    /// False as long as the processor does all accesses alone.
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// True if the filter lets the access through.
    pub(crate) fn allows(&self, index: u32, access: MsrAccess) -> bool {
        let wishes = self.wishes.read().unwrap_or_else(PoisonError::into_inner);
        let filter = wishes.filter.as_ref();
        filter.is_none_or(|filter| filter.allows(index, access))
    }

    /// True if an access that is refused leaves.
    pub(crate) fn leaves(&self, refusal: MsrRefusal) -> bool {
        let wishes = self.wishes.read().unwrap_or_else(PoisonError::into_inner);
        match refusal {
            MsrRefusal::Filtered => wishes.leaves.filtered,
            MsrRefusal::Unknown => wishes.leaves.unknown,
            MsrRefusal::Invalid => wishes.leaves.invalid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use MsrAccess::{Read, Write};

    fn range(first: u32, reads: bool, writes: bool, allowed: u8) -> MsrRange {
        MsrRange {
            first,
            count: 8,
            reads,
            writes,
            allowed: vec![allowed],
        }
    }

    #[test]
    fn the_first_range_that_decides_of_the_access_counts() {
        let exits = MsrExits::default();
        assert!(!exits.is_on() && exits.allows(0x10, Read));
        for others in [false, true] {
            exits.set_filter(MsrFilter {
                allows_others: others,
                ranges: vec![
                    range(0x10, true, false, 0b0000_0010),
                    range(0x10, true, true, 0b0000_0001),
                    range(0xffff_fff8, true, true, 0b1000_0000),
                ],
            });
            for (index, access, allowed) in [
                (0x10, Read, false),
                (0x11, Read, true),
                (0x10, Write, true),
                (0x11, Write, false),
                (0x0f, Read, others),
                (0x18, Write, others),
                (u32::MAX, Read, true),
                (u32::MAX - 1, Read, false),
                (0x802, Read, true),
                (0x8ff, Write, true),
            ] {
                let decided = exits.allows(index, access);
                assert_eq!(decided, allowed, "{index:#x} {access:?} {others}");
            }
        }
        assert!(exits.is_on());
    }

    #[test]
    fn bits_that_are_missing_refuse() {
        let exits = MsrExits::default();
        exits.set_filter(MsrFilter {
            allows_others: true,
            ranges: vec![MsrRange {
                count: 9,
                ..range(0, true, true, 0xff)
            }],
        });
        assert!(exits.allows(7, Read) && !exits.allows(8, Read) && exits.allows(9, Read));
    }

    #[test]
    fn only_the_reasons_that_were_asked_for_leave() {
        let exits = MsrExits::default();
        exits.set_leaves(MsrLeaves {
            unknown: true,
            ..MsrLeaves::default()
        });
        assert!(exits.is_on() && exits.leaves(MsrRefusal::Unknown));
        assert!(!exits.leaves(MsrRefusal::Filtered) && !exits.leaves(MsrRefusal::Invalid));
        exits.set_leaves(MsrLeaves::default());
        assert!(!exits.is_on());
    }
}
