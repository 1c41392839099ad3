//! The pages of a memory bundle: first import, import again, cancelled import.

use super::mem::is_in_order;
use crate::call::{busy, invalid, lock_target, private_operand, walk_page};
use crate::lock::LockMode;
use crate::migrate::cipher::Tag;
use crate::migrate::entries::{LockedLeaf, lock_leaf};
use crate::migrate::lists::{GpaEntry, Operation, Outcome, PageEntry};
use crate::migrate::transfer::{Transfer, buffer_page};
use crate::pamt::{Entry, PageRef, PageSize, PageType};
use crate::platform::Platform;
use crate::sept::{Content, SeptState as S};
use crate::status::{Code, Operand, Status};
use crate::td::Td;
use aes_gcm::aead::inout::InOutBuf;

const PAGE: u64 = 4096;

/// Reason for which an entry was not imported.
pub(super) struct Refusal {
    pub(super) outcome: Outcome,
    pub(super) status: Status,
    /// The leaf ends in every phase. Other failures end it in order only: later, pages come in an order that
    /// the importer cannot foresee.
    pub(super) always_ends: bool,
}

fn ends(outcome: Outcome, status: Status) -> Refusal {
    Refusal {
        outcome,
        status,
        always_ends: true,
    }
}

fn ends_in_order(outcome: Outcome, status: Status) -> Refusal {
    Refusal {
        outcome,
        status,
        always_ends: false,
    }
}

fn on_entry(code: Code) -> Status {
    code.on(Operand::GPA_LIST_ENTRY)
}

fn wrong_state() -> Status {
    on_entry(Code::EPT_ENTRY_STATE_INCORRECT)
}

/// Imports the page an entry of the list describes; its message has this IV counter.
pub(super) fn import_page(
    p: &Platform,
    t: &Transfer<'_>,
    entry: GpaEntry,
    counter: u64,
) -> Result<Outcome, Refusal> {
    Entering {
        p,
        t,
        entry,
        counter,
    }
    .import()
}

/// An entry on its way in.
struct Entering<'a, 'p> {
    p: &'a Platform,
    t: &'a Transfer<'p>,
    entry: GpaEntry,
    counter: u64,
}

impl Entering<'_, '_> {
    fn import(&self) -> Result<Outcome, Refusal> {
        let (p, td, entry) = (self.p, self.t.td, self.entry);
        let operation = entry.operation();
        if operation == Operation::Nop {
            self.check()?;
        }
        if !entry.is_valid_for(td) {
            let status = on_entry(Code::OPERAND_INVALID);
            return Err(ends(Outcome::Invalid, status));
        }
        if operation == Operation::Nop {
            return Ok(Outcome::Skipped);
        }
        let leaf = lock_leaf(p, td, entry.gpa()).map_err(|outcome| {
            let code = match outcome {
                Outcome::EntryBusy => Code::OPERAND_BUSY,
                _ => Code::EPT_WALK_FAILED,
            };
            ends_in_order(outcome, on_entry(code))
        })?;
        let state = leaf.content.state();
        if !state.is_empty() && !state.is_open_leaf() {
            return Err(ends_in_order(Outcome::StateIncorrect, wrong_state()));
        }
        if operation != Operation::Migrate && !is_in_order(td) {
            let status = Code::OP_STATE_INCORRECT.status();
            return Err(ends(Outcome::OpStateIncorrect, status));
        }
        let carries_page = operation != Operation::Cancel && !entry.is_pending();
        let buffer = carries_page.then(|| self.buffer()).transpose()?;
        match operation {
            Operation::Migrate => self.migrate(&leaf, buffer)?,
            Operation::Remigrate => self.remigrate(&leaf, buffer)?,
            Operation::Cancel | Operation::Nop => self.cancel(&leaf)?,
        }
        Ok(Outcome::Success)
    }

    /// The buffer of a page.
    fn buffer(&self) -> Result<u64, Refusal> {
        let entry = self.t.buffer(self.p);
        if entry.is_invalid() {
            return Err(no_buffer());
        }
        buffer_page(self.p, entry).map_err(|_| no_buffer())
    }

    /// Decrypts the entry's message if it is authentic, and otherwise writes nothing.
    fn open(&self, mac: &Tag, text: InOutBuf<'_, '_, u8>) -> Option<()> {
        let t = self.t;
        let aad = self.entry.0.to_le_bytes();
        let key = t.stream.key()?;
        key.open_to(self.counter, t.operand.index, &aad, text, mac)
            .then_some(())
    }

    /// Checks the message of an entry without a page.
    fn check(&self) -> Result<(), Refusal> {
        let mac = self.t.read_mac(self.p);
        self.open(&mac, (&mut [][..]).into()).ok_or_else(wrong_mac)
    }

    /// Decrypts the buffer, if the entry has one, into the page at `hpa`.
    fn receive(&self, buffer: Option<u64>, hpa: u64) -> Result<(), Refusal> {
        let Some(buffer) = buffer else {
            return self.check();
        };
        // Memory is not read again while a page of it is in use.
        let (mac, of_td) = (self.t.read_mac(self.p), self.t.td.key());
        // A buffer is the host's, and read as it is.
        let (from, to) = ((buffer, None), (hpa, of_td.as_deref()));
        let received = self.p.mem.make_page(from, to, |text, out| {
            self.open(&mac, InOutBuf::new(text, out).ok()?)
        });
        received.ok().flatten().ok_or_else(wrong_mac)
    }

    fn state(&self) -> S {
        if self.entry.is_pending() {
            S::Pending
        } else {
            S::Mapped
        }
    }

    fn migrate(&self, leaf: &LockedLeaf<'_>, buffer: Option<u64>) -> Result<(), Refusal> {
        let (td, epoch) = (self.t.td, self.t.epoch);
        let content = leaf.content;
        if !content.state().is_empty() {
            return Err(ends_in_order(Outcome::StateIncorrect, wrong_state()));
        }
        if content.state() == S::Removed && content.removed_in() >= epoch {
            let status = on_entry(Code::DISALLOWED_IMPORT_OVER_REMOVED);
            return Err(ends(Outcome::ImportOverRemoved, status));
        }
        let (hpa, page) = self.target()?;
        self.receive(buffer, hpa)?;
        page.entry.set(PageType::Reg, td.pa());
        page.entry.set_bepoch(imported_in(td, epoch));
        td.add_children(1);
        leaf.set(Content::leaf(self.state(), hpa));
        Ok(())
    }

    /// The page the TD gets: a new one, or in place the buffer itself.
    fn target(&self) -> Result<(u64, PageRef<'_>), Refusal> {
        const OPERAND: Operand = Operand::NEW_PAGE_LIST_ENTRY;
        let (p, t) = (self.p, self.t);
        let new_page = t
            .new_pages
            .map(|list| list.page_entry(p, t.list.info.first))
            .filter(|entry| !entry.is_invalid());
        let hpa = match new_page {
            Some(PageEntry(hpa)) => private_operand(p, hpa, PAGE, OPERAND)
                .map(|()| hpa)
                .map_err(|status| ends(Outcome::NoNewPage, status))?,
            None => {
                let entry = t.buffer(p);
                if entry.is_invalid() {
                    return Err(no_buffer());
                }
                p.cfg.strip(entry.0)
            }
        };
        let page = walk_page(p, hpa, PageSize::Size4K, LockMode::Exclusive, OPERAND)
            .map_err(|status| ends_in_order(Outcome::NoNewPage, status))?;
        if !page.is_free(PageSize::Size4K) {
            let status = Code::PAGE_METADATA_INCORRECT.on(OPERAND);
            return Err(ends_in_order(Outcome::NoNewPage, status));
        }
        Ok((hpa, page))
    }

    fn page_of(&self, leaf: &LockedLeaf<'_>) -> Result<&Entry, Refusal> {
        self.p
            .known_entry(leaf.content.hpa(), PageSize::Size4K)
            .map_err(|status| ends(Outcome::StateIncorrect, status))
    }

    /// Each page may come once in an epoch, so that an older copy cannot replace a newer one.
    fn check_epoch(&self, page: &Entry) -> Result<(), Refusal> {
        if page.bepoch() as u32 >= self.t.epoch {
            let status = on_entry(Code::MIGRATED_IN_CURRENT_EPOCH);
            return Err(ends(Outcome::MigratedInEpoch, status));
        }
        Ok(())
    }

    fn remigrate(&self, leaf: &LockedLeaf<'_>, buffer: Option<u64>) -> Result<(), Refusal> {
        let content = leaf.content;
        if !content.state().is_open_leaf() {
            return Err(ends(Outcome::StateIncorrect, wrong_state()));
        }
        let page = self.page_of(leaf)?;
        self.check_epoch(page)?;
        if self.entry.is_pending() && content.state() == S::Mapped {
            let status = on_entry(Code::IMPORT_MISMATCH);
            return Err(ends(Outcome::StateIncorrect, status));
        }
        self.receive(buffer, content.hpa())?;
        page.set_bepoch(imported_in(self.t.td, self.t.epoch));
        leaf.set(content.with_state(self.state()));
        Ok(())
    }

    fn cancel(&self, leaf: &LockedLeaf<'_>) -> Result<(), Refusal> {
        let (p, td) = (self.p, self.t.td);
        let content = leaf.content;
        if !content.state().is_open_leaf() {
            return Err(ends(Outcome::StateIncorrect, wrong_state()));
        }
        self.check()?;
        let (page, _lock) = lock_target(p, content.hpa(), PageSize::Size4K)
            .map_err(|_| ends(Outcome::PageBusy, busy(Operand::GPA_LIST_ENTRY)))?;
        self.check_epoch(page)?;
        leaf.set(Content::removed(self.t.epoch));
        page.set_nda();
        td.remove_children(1);
        Ok(())
    }
}

fn wrong_mac() -> Refusal {
    let status = on_entry(Code::INVALID_PAGE_MAC);
    ends(Outcome::MacIncorrect, status)
}

fn no_buffer() -> Refusal {
    ends(Outcome::NoBuffer, invalid(Operand::MIG_BUFF_LIST_ENTRY))
}

/// BEPOCH of an imported page: session and epoch, marked as such.
fn imported_in(td: &Td, epoch: u32) -> u64 {
    let session = td.migration().export_count;
    1 << 63 | u64::from(session) << 32 | u64::from(epoch)
}
