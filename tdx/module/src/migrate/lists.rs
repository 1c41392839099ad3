//! GPA lists, page lists and MAC lists: what the host passes by address.

use crate::td::Td;

/// Entries of a full list page.
pub(crate) const ENTRIES: u16 = 512;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const BITS_54_52: u64 = 7 << 52;

/// The register that names a GPA list and the part of it still to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ListInfo {
    /// PA of the list's page, with its key id.
    pub(crate) pa: u64,
    /// Entry to go on with.
    pub(crate) first: u16,
    /// Last entry.
    pub(crate) last: u16,
}

impl ListInfo {
    /// `None` for a format other than 0, a first entry behind the last, or a reserved bit.
    pub(crate) fn parse(register: u64) -> Option<Self> {
        let info = ListInfo {
            pa: register & ADDRESS,
            first: (register >> 3 & 0x1FF) as u16,
            last: (register >> 55) as u16,
        };
        let fits = register & (7 | BITS_54_52) == 0 && info.first <= info.last;
        fits.then_some(info)
    }

    /// The register with another first entry; behind the last of a full list follows entry 0.
    pub(crate) fn register(self) -> u64 {
        self.pa | u64::from(self.first % ENTRIES) << 3 | u64::from(self.last) << 55
    }
}

/// The register that names a list of pages for a state bundle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageListInfo {
    pub(crate) pa: u64,
    pub(crate) last: u16,
}

impl PageListInfo {
    /// `None` if a reserved bit is set.
    pub(crate) fn parse(register: u64) -> Option<Self> {
        (register & (0xFFF | BITS_54_52) == 0).then_some(PageListInfo {
            pa: register & ADDRESS,
            last: (register >> 55) as u16,
        })
    }
}

/// Operation that an entry of a GPA list requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Operation {
    Nop = 0,
    Migrate = 1,
    Cancel = 2,
    Remigrate = 3,
}

/// Result of an entry of a GPA list (bits 60:56).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Outcome {
    Success = 0,
    Skipped = 1,
    WalkFailed = 2,
    EntryBusy = 3,
    StateIncorrect = 4,
    NotTracked = 5,
    OpStateIncorrect = 6,
    MigratedInEpoch = 7,
    NoBuffer = 8,
    NoNewPage = 9,
    MacIncorrect = 10,
    ImportOverRemoved = 11,
    PageBusy = 12,
    Invalid = 15,
}

/// An entry of a GPA list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct GpaEntry(pub(crate) u64);

const LEVEL: u64 = 3;
const PENDING: u64 = 1 << 2;
const RESERVED: u64 = 0xF << 3 | 3 << 54 | 7 << 61;
const L2_MAP: u64 = 7 << 7;
const OPERATION: u64 = 3 << 52;
const OUTCOME: u64 = 0x1F << 56;

impl GpaEntry {
    pub(crate) fn operation(self) -> Operation {
        match self.0 >> 52 & 3 {
            0 => Operation::Nop,
            1 => Operation::Migrate,
            2 => Operation::Cancel,
            _ => Operation::Remigrate,
        }
    }

    pub(crate) fn gpa(self) -> u64 {
        self.0 & ADDRESS
    }

    pub(crate) fn is_pending(self) -> bool {
        self.0 & PENDING != 0
    }

    /// The parts that hold for every operation: level 0, reserved bits 0.
    pub(crate) fn is_well_formed(self) -> bool {
        self.0 & (LEVEL | RESERVED) == 0
    }

    /// Well formed, with a private GPA of the TD.
    pub(crate) fn is_valid_for(self, td: &Td) -> bool {
        self.is_well_formed() && td.is_valid_private_gpa(self.gpa())
    }

    /// The entry with an outcome; one that did not succeed asks for nothing any more.
    pub(crate) fn with_outcome(self, outcome: Outcome) -> Self {
        let operation = match outcome {
            Outcome::Success => self.0 & OPERATION,
            _ => 0,
        };
        GpaEntry(self.0 & !(OUTCOME | OPERATION) | operation | (outcome as u64) << 56)
    }

    /// The entry as an export describes the page it found.
    pub(crate) fn describing(self, operation: Operation, pending: bool) -> Self {
        let rest = self.0 & !(OPERATION | PENDING | L2_MAP);
        GpaEntry(rest | (operation as u64) << 52 | if pending { PENDING } else { 0 })
    }
}

/// An entry of a buffer list or new-page list: a page, or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageEntry(pub(crate) u64);

impl PageEntry {
    const INVALID: u64 = 1 << 63;

    pub(crate) fn is_invalid(self) -> bool {
        self.0 & Self::INVALID != 0
    }

    pub(crate) fn invalidated(self) -> Self {
        PageEntry(self.0 | Self::INVALID)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_list_register_is_rebuilt_from_its_parts(register: u64) {
            if let Some(info) = ListInfo::parse(register) {
                prop_assert_eq!(info.register(), register);
            }
        }

        #[test]
        fn an_outcome_changes_only_outcome_and_operation(word: u64) {
            for outcome in [Outcome::Success, Outcome::Skipped, Outcome::Invalid] {
                let entry = GpaEntry(word).with_outcome(outcome);
                prop_assert_eq!(entry.0 & !(OUTCOME | OPERATION), word & !(OUTCOME | OPERATION));
                prop_assert_eq!(entry.0 >> 56 & 0x1F, outcome as u64);
                let kept = outcome == Outcome::Success;
                prop_assert_eq!(entry.operation() == GpaEntry(word).operation(), kept || word & OPERATION == 0);
            }
        }
    }

    #[test]
    fn reserved_bits_and_empty_ranges_are_refused() {
        let good = 2 << 55 | 0x0200_0000 | 1 << 3;
        assert!(ListInfo::parse(good).is_some());
        for bad in [good | 1, good | 1 << 52, good | 1 << 54, good + (2 << 3)] {
            assert_eq!(ListInfo::parse(bad), None, "{bad:#x}");
        }
        assert!(PageListInfo::parse(2 << 55 | 0x0200_0000).is_some());
        for bit in [0, 11, 52, 54] {
            assert_eq!(PageListInfo::parse(1 << bit), None);
        }
    }

    #[test]
    fn behind_the_last_entry_of_a_full_list_follows_entry_0() {
        let info = ListInfo {
            pa: 0x1000,
            first: 512,
            last: 511,
        };
        assert_eq!(info.register(), 0x1000 | 511 << 55);
    }
}
