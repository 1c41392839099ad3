//! TDH.MEM.*: private memory and the Secure-EPT.

use kvm_ops::{Gfn, Hpa, Level, SeamPort, SeamRegs};

use super::{Calls, Leaf, Outcome, regs};

/// The GPA operand: the address in bits 51:12, the level of the entry in bits 2:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryAt(u64);

impl EntryAt {
    /// `None` for a frame beyond 52-bit addresses.
    pub(crate) fn new(gfn: Gfn, level: Level) -> Option<Self> {
        let base = gfn.base()?.get();
        (base >> 52 == 0).then_some(Self(base | level as u64))
    }
}

impl<S: SeamPort> Calls<'_, S> {
    pub(super) fn entry(&self, leaf: Leaf, at: EntryAt, tdr: Hpa) -> Outcome {
        self.here(leaf, regs(at.0, tdr.get())).map(drop)
    }

    fn entry_with(&self, leaf: Leaf, at: EntryAt, tdr: Hpa, page: Hpa) -> Outcome {
        let regs = SeamRegs {
            r8: page.get(),
            ..regs(at.0, tdr.get())
        };
        self.here(leaf, regs).map(drop)
    }

    /// Makes `table` the Secure-EPT page below the entry.
    pub(crate) fn mem_sept_add(&self, at: EntryAt, tdr: Hpa, table: Hpa) -> Outcome {
        self.entry_with(Leaf::MemSeptAdd, at, tdr, table)
    }

    /// Takes an empty Secure-EPT page away.
    pub(crate) fn mem_sept_remove(&self, at: EntryAt, tdr: Hpa) -> Outcome {
        self.entry(Leaf::MemSeptRemove, at, tdr)
    }

    /// Copies the host's page at `source` into `page` and maps it; before finalisation.
    pub(crate) fn mem_page_add(&self, at: EntryAt, tdr: Hpa, page: Hpa, source: Hpa) -> Outcome {
        let regs = SeamRegs {
            r8: page.get(),
            r9: source.get(),
            ..regs(at.0, tdr.get())
        };
        self.here(Leaf::MemPageAdd, regs).map(drop)
    }

    /// Maps a page that the guest must accept.
    pub(crate) fn mem_page_aug(&self, at: EntryAt, tdr: Hpa, page: Hpa) -> Outcome {
        self.entry_with(Leaf::MemPageAug, at, tdr, page)
    }

    /// Takes a blocked page away.
    pub(crate) fn mem_page_remove(&self, at: EntryAt, tdr: Hpa) -> Outcome {
        self.entry(Leaf::MemPageRemove, at, tdr)
    }

    /// Lets no new translation through the entry.
    pub(crate) fn mem_range_block(&self, at: EntryAt, tdr: Hpa) -> Outcome {
        self.entry(Leaf::MemRangeBlock, at, tdr)
    }

    /// Takes a block back.
    pub(crate) fn mem_range_unblock(&self, at: EntryAt, tdr: Hpa) -> Outcome {
        self.entry(Leaf::MemRangeUnblock, at, tdr)
    }

    /// Splits a blocked large page; `table` becomes the Secure-EPT page below it.
    pub(crate) fn mem_page_demote(&self, at: EntryAt, tdr: Hpa, table: Hpa) -> Outcome {
        self.entry_with(Leaf::MemPageDemote, at, tdr, table)
    }

    /// Merges what the blocked table maps into one large page.
    pub(crate) fn mem_page_promote(&self, at: EntryAt, tdr: Hpa) -> Outcome {
        self.entry(Leaf::MemPagePromote, at, tdr)
    }

    /// Begins a new TLB epoch.
    pub(crate) fn mem_track(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::MemTrack, regs(tdr.get(), 0)).map(drop)
    }
}
