//! Entries of a GPA list (TDX module ABI, "GPA_LIST_ENTRY").

use kvm_ops::{Gfn, PAGE_SIZE};

/// Bits 1:0 the level, bit 2 pending, 51:12 the address, 53:52 the operation, 60:56 the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(pub(crate) u64);

/// The operation of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Nothing: a page that could not be exported.
    Nop,
    /// The page comes for the first time.
    Migrate,
    /// A page that came takes itself back.
    Cancel,
    /// The page came before, and was written since.
    Remigrate,
}

const PENDING: u64 = 1 << 2;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const MIGRATE: u64 = 1 << 52;

/// An entry of a list of pages that names none.
pub(crate) const NO_PAGE: u64 = 1 << 63;

impl Entry {
    /// Asks for a page's export, its write block or its restoration.
    pub(crate) const fn asking_for(gfn: Gfn) -> Self {
        Self((gfn.get() << PAGE_SIZE.ilog2()) & ADDRESS | MIGRATE)
    }

    pub(crate) const fn gfn(self) -> Gfn {
        Gfn::new((self.0 & ADDRESS) / PAGE_SIZE)
    }

    pub(crate) const fn operation(self) -> Operation {
        match self.0 >> 52 & 3 {
            0 => Operation::Nop,
            1 => Operation::Migrate,
            2 => Operation::Cancel,
            _ => Operation::Remigrate,
        }
    }

    /// Returns whether the module did what the entry asks for.
    pub(crate) const fn succeeded(self) -> bool {
        self.0 >> 56 & 0x1f == 0
    }

    /// Returns whether another thread held the page's entry.
    pub(crate) const fn is_busy(self) -> bool {
        self.0 >> 56 & 0x1f == 3
    }

    /// Returns whether the entry brings the contents of a page. A page that the guest has not accepted has
    /// none.
    pub(crate) const fn has_contents(self) -> bool {
        let brings = matches!(self.operation(), Operation::Migrate | Operation::Remigrate);
        brings && self.succeeded() && self.0 & PENDING == 0
    }
}
