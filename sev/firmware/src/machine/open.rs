//! Open pages: a guest's private memory in plain text, as the caches of a processor hold it.
//!
//! A page is opened through the key of its guest, and stays open until anyone else touches it or its
//! RMP entry changes. Then it is closed: encrypted, as if the caches were written back.

use super::entry::permission;
use super::region::{PAGE, Page};
use super::turn::GuestTurn;
use super::{AccessFault, GuestPage, Machine, Owner};
use crate::cipher::MemoryKey;
use kvm_ops_turns::{Turn, Turns};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const WORD: usize = 8;

/// A page that is open. Its bytes are used in turns only: by one thread alone, or by several that use atomic accesses.
pub(crate) struct OpenPage {
    key: Arc<MemoryKey>,
    turns: Arc<Turns>,
    words: Box<Words>,
}

/// Aligned for the widest atomic access of a processor, which is one of 16 bytes.
#[repr(align(16))]
struct Words([AtomicU64; PAGE / WORD]);

impl OpenPage {
    /// Decrypts the page at `spa`.
    pub(crate) fn of(page: &Page, spa: u64, turn: &GuestTurn) -> Self {
        let mut plain = *page;
        turn.key.decrypt(spa, &mut plain);
        let words = Box::new(Words([const { AtomicU64::new(0) }; PAGE / WORD]));
        for (word, bytes) in words.0.iter().zip(plain.chunks_exact(WORD)) {
            let mut value = [0; WORD];
            value.copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(value), Relaxed);
        }
        Self {
            key: Arc::clone(&turn.key),
            turns: Arc::clone(turn.turn.turns()),
            words,
        }
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// The page as memory holds it. Whoever has a pointer to the open one asks again.
    pub(crate) fn close(&self, spa: u64) -> Box<Page> {
        self.turns.note_closed();
        let mut page = Box::new([0; PAGE]);
        for (word, bytes) in self.words.0.iter().zip(page.chunks_exact_mut(WORD)) {
            bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        self.key.encrypt(spa, &mut page[..]);
        page
    }
}

/// A page of a guest's private memory that a processor may use directly.
///
/// The bytes stay where they are as long as this value lives. They are the guest's until
/// [`GuestTurn::closed`] tells another number; from then on nothing reads what is written to them.
#[derive(Clone)]
pub struct GuestFrame {
    page: Arc<OpenPage>,
    is_writable: bool,
}

impl GuestFrame {
    /// The first of the page's 4096 bytes, aligned to 16. They may be read, and written if
    /// [`is_writable`](Self::is_writable), by a thread that has a [`GuestTurn`] of the guest: by atomic accesses in one
    /// that others share.
    pub fn bytes(&self) -> NonNull<u8> {
        NonNull::from(&self.page.words.0).cast()
    }

    /// Returns true if the guest may write the page.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }
}

impl fmt::Debug for GuestFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestFrame")
            .field("is_writable", &self.is_writable)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Waits for a turn of the guest that runs with an ASID, as `take` does.
    pub(crate) fn guest_turn(
        &self,
        asid: u32,
        take: impl FnOnce(&Arc<Turns>) -> Turn,
    ) -> Result<GuestTurn, AccessFault> {
        let inactive = AccessFault::NotActive(asid);
        let (key, owner, turns) = {
            let guard = self.slot(asid).ok_or(inactive)?;
            let slot = guard.as_ref().ok_or(inactive)?;
            (Arc::clone(&slot.key), slot.owner, Arc::clone(&slot.turns))
        };
        // With no lock held: whoever has the turn may need them.
        Ok(GuestTurn {
            turn: take(&turns),
            asid,
            key,
            owner,
        })
    }

    /// Opens a page for the guest that has the turn. `need` are bits of [`permission`].
    pub(crate) fn guest_frame(
        &self,
        turn: &GuestTurn,
        page: &GuestPage,
        need: u8,
    ) -> Result<GuestFrame, AccessFault> {
        if page.asid != turn.asid || page.vmpl > 3 {
            return Err(AccessFault::NotActive(page.asid));
        }
        let no_memory = AccessFault::NoMemory(page.spa);
        let place = self.memory.place(page.spa).ok_or(no_memory)?;
        let mut region = place.peek();
        let entry = region.entry(place.index);
        let check = |need| super::access::check_private(&entry, turn.owner, page, need);
        check(need)?;
        let is_writable = check(permission::WRITE).is_ok();
        let page = region
            .open(place.index, place.spa, turn)
            .ok_or(AccessFault::InUse(place.spa))?;
        Ok(GuestFrame { page, is_writable })
    }

    /// Reads or writes the register state of a vCPU, as VMRUN and #VMEXIT do.
    fn vmsa(
        &self,
        asid: u32,
        spa: u64,
        access: impl FnOnce(&mut super::region::Region, &MemoryKey, usize, u64),
    ) -> Result<(), AccessFault> {
        let inactive = AccessFault::NotActive(asid);
        let (key, owner) = {
            let guard = self.slot(asid).ok_or(inactive)?;
            let slot = guard.as_ref().ok_or(inactive)?;
            (Arc::clone(&slot.key), slot.owner)
        };
        let place = self.memory.place(spa).ok_or(AccessFault::NoMemory(spa))?;
        if place.spa != spa {
            return Err(AccessFault::NotVmsa(spa));
        }
        let mut region = place.lock();
        let entry = region.entry(place.index);
        let is_vmsa = match owner {
            Owner::Snp => entry.vmsa && entry.asid == asid && entry.state.is_validated(),
            Owner::Legacy => entry.state.host_may_write(),
        };
        if !is_vmsa {
            return Err(AccessFault::NotVmsa(spa));
        }
        access(&mut region, &key, place.index, place.spa);
        Ok(())
    }

    /// The register state that VMRUN loads.
    pub(crate) fn vmsa_read(&self, asid: u32, spa: u64) -> Result<Box<Page>, AccessFault> {
        let mut page = Box::new([0; PAGE]);
        self.vmsa(asid, spa, |region, key, index, spa| {
            region.read_with(key, spa, index, 0, &mut page[..]);
        })?;
        Ok(page)
    }

    /// The register state that #VMEXIT stores.
    pub(crate) fn vmsa_write(&self, asid: u32, spa: u64, page: &Page) -> Result<(), AccessFault> {
        self.vmsa(asid, spa, |region, key, index, spa| {
            region.write_with(key, spa, index, 0, page);
        })
    }
}
