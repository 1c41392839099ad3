//! Going through a GPA list entry by entry.

use super::lists::{GpaEntry, ListInfo, Operation, Outcome, PageEntry};
use crate::call::{Call, EntryGuard, Leaf, invalid, shared_operand};
use crate::lock::Side;
use crate::platform::Platform;
use crate::sept::{Content, Walked};
use crate::status::{Operand, Status};
use crate::td::Td;

/// A list of 8-byte words in shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words(u64);

impl Words {
    /// A list that fills a page.
    pub(crate) fn page(p: &Platform, pa: u64, operand: Operand) -> Leaf<Self> {
        shared_operand(p, pa, 4096, operand).map(Words)
    }

    pub(crate) fn get(self, p: &Platform, index: u16) -> u64 {
        p.mem.host_read_u64(self.0 + u64::from(index) * 8)
    }

    pub(crate) fn set(self, p: &Platform, index: u16, word: u64) {
        p.mem
            .host_write(self.0 + u64::from(index) * 8, &word.to_le_bytes());
    }

    pub(crate) fn page_entry(self, p: &Platform, index: u16) -> PageEntry {
        PageEntry(self.get(p, index))
    }
}

/// A GPA list in memory and the part of it a call works on.
pub(crate) struct GpaList {
    pub(crate) info: ListInfo,
    words: Words,
}

impl GpaList {
    /// The list a register names.
    pub(crate) fn parse(p: &Platform, register: u64) -> Leaf<Self> {
        let info = ListInfo::parse(register).ok_or(invalid(Operand::RCX))?;
        let words = Words::page(p, info.pa, Operand::RCX)?;
        Ok(GpaList { info, words })
    }

    pub(crate) fn entry(&self, p: &Platform) -> GpaEntry {
        GpaEntry(self.words.get(p, self.info.first))
    }

    /// Writes the entry the list is at.
    pub(crate) fn write(&self, p: &Platform, entry: GpaEntry) {
        self.words.set(p, self.info.first, entry.0);
    }

    pub(crate) fn is_at_last(&self) -> bool {
        self.info.first == self.info.last
    }

    pub(crate) fn advance(&mut self) {
        self.info.first += 1;
    }
}

/// A Secure-EPT entry of a 4 KiB page, locked.
pub(crate) struct LockedLeaf<'p> {
    walked: Walked<'p>,
    pub(crate) content: Content,
    _lock: EntryGuard<'p>,
}

impl LockedLeaf<'_> {
    pub(crate) fn set(&self, content: Content) {
        self.walked.entry.set(content);
    }
}

/// Walks to the 4 KiB entry of a GPA and locks it.
pub(crate) fn lock_leaf<'p>(p: &'p Platform, td: &Td, gpa: u64) -> Result<LockedLeaf<'p>, Outcome> {
    loop {
        let walked = td.walk(&p.tables, gpa, 0).ok_or(Outcome::WalkFailed)?;
        if walked.level != 0 {
            return Err(Outcome::WalkFailed);
        }
        if !walked.entry.word().try_lock(Side::Host) {
            return Err(Outcome::EntryBusy);
        }
        let lock = EntryGuard(walked.entry);
        if walked.is_current() {
            return Ok(LockedLeaf {
                content: walked.entry.get(),
                walked,
                _lock: lock,
            });
        }
    }
}

/// The operand error of a GPA list entry.
pub(crate) fn invalid_entry() -> Status {
    invalid(Operand::GPA_LIST_ENTRY)
}

impl Call<'_, '_> {
    /// Applies `change` to the pages of a GPA list that ask for it; the others are skipped. Used where nothing
    /// is transferred: TDH.EXPORT.BLOCKW and TDH.EXPORT.RESTORE. RCX is left at the entry reached.
    ///
    /// # Errors
    /// A malformed entry; `SUCCESS` with the number of entries that could not be changed as detail.
    pub(crate) fn for_each_page(
        &mut self,
        td: &Td,
        mut list: GpaList,
        mut change: impl FnMut(&LockedLeaf<'_>) -> Result<(), Outcome>,
    ) -> Leaf {
        use crate::status::Code;
        let p = self.p;
        let mut problems = 0;
        loop {
            let entry = list.entry(p);
            let idle = matches!(entry.operation(), Operation::Nop | Operation::Cancel);
            let outcome = if !entry.is_valid_for(td) {
                Outcome::Invalid
            } else if idle {
                Outcome::Skipped
            } else {
                lock_leaf(p, td, entry.gpa())
                    .and_then(|leaf| change(&leaf))
                    .err()
                    .unwrap_or(Outcome::Success)
            };
            list.write(p, entry.with_outcome(outcome));
            match outcome {
                Outcome::Invalid => {
                    self.regs.rcx = list.info.register();
                    return Err(invalid_entry());
                }
                Outcome::Success | Outcome::Skipped => {}
                _ => problems += 1,
            }
            let last = list.is_at_last();
            list.advance();
            self.regs.rcx = list.info.register();
            if last {
                break;
            }
            if self.this.host_event_pending() {
                return Err(Code::INTERRUPTED_RESUMABLE.status());
            }
        }
        match problems {
            0 => Ok(()),
            n => Err(Code::SUCCESS.detail(n)),
        }
    }
}
