//! Private memory: where it may be, faults, conversions, slots.

use alloc::vec::Vec;

use kvm_ops::{
    Error, Field, Gfn, Host, Level, MemSlot, PAGE_SIZE, Privacy, PrivateSpte, Result, Step, VcpuId,
    VmPort,
};
use kvm_ops_mmu::{EmptyTables, Mapped};

use super::{Private, Td};

/// The most pages of one conversion, 1 GiB: faults wait for it.
const MOST_PAGES: u64 = 1 << 18;

/// Tries of a page before [`Td::pre_fault`] or an import gives up as busy; the waits double.
pub(crate) const PATIENCE: u32 = 16;

/// The result of a private fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The page is mapped; the guest may go on.
    Mapped,
    /// Another thread is at the entry. The guest may go on; it faults again if it must.
    Retry,
    /// The frame is shared, or no slot has it: the embedder's matter.
    NotPrivate,
}

impl Private {
    /// Returns whether the frame lies in a writable slot. Read-only slots have shared memory only, because
    /// a TD has no private memory that it cannot write.
    fn in_slot(&self, gfn: Gfn) -> bool {
        self.slots
            .find(gfn)
            .is_some_and(|slot| !slot.flags.read_only)
    }

    /// Returns whether a private page may be mapped there.
    pub(crate) fn may_be_private(&self, gfn: Gfn) -> bool {
        self.attributes.get(gfn) == Privacy::Private && self.in_slot(gfn)
    }
}

impl<H: Host> Td<H> {
    /// Maps the private page that a vCPU touched. Takes the reader's side of the lock: faults of
    /// several vCPUs go on at once.
    pub(crate) fn fault(&self, vcpu: VcpuId, gfn: Gfn) -> Result<Fault> {
        self.life.require(Step::Runnable)?;
        let found = {
            let private = self.private.read(vcpu.0 as usize, || self.relax());
            // The teardown closes the gate and then waits for every reader.
            self.require_open()?;
            self.fault_in(&private, gfn)?
        };
        match found {
            Found::Fault(fault) => Ok(fault),
            Found::Large => {
                let mut private = self.write_private();
                self.require_open()?;
                match private.mirror.demote(self, gfn) {
                    // Another thread was faster.
                    Ok(()) | Err(Error::NotFound(..) | Error::Busy | Error::Again) => {
                        Ok(Fault::Retry)
                    }
                    Err(error) => Err(error),
                }
            }
            Found::Blocked => {
                // A removal that failed left it behind: the page is still the guest's.
                let mut private = self.write_private();
                self.require_open()?;
                private.mirror.unblock(self, gfn, 1)?;
                Ok(Fault::Retry)
            }
        }
    }

    fn fault_in(&self, private: &Private, gfn: Gfn) -> Result<Found> {
        if gfn.get() >= self.frames() || !private.may_be_private(gfn) {
            return Ok(Found::Fault(Fault::NotPrivate));
        }
        if self.waits_for_page(private, gfn) {
            return Ok(Found::Fault(Fault::Retry));
        }
        let page = || self.take_page(Level::Size4K);
        Ok(match private.mirror.map(self, gfn, Level::Size4K, page) {
            Ok(Mapped::New) => {
                self.page_came(gfn);
                Found::Fault(Fault::Mapped)
            }
            Ok(Mapped::Retry) | Err(Error::Busy | Error::Again) => Found::Fault(Fault::Retry),
            Ok(Mapped::Occupied(lookup)) => match lookup.entry {
                PrivateSpte::Blocked(_) | PrivateSpte::BlockedTable(_) => Found::Blocked,
                // A guest that accepts a part of a large page faults at it until the page is split.
                PrivateSpte::Mapped(_) if lookup.level != Level::Size4K => Found::Large,
                _ => match self.allow_writes(gfn) {
                    Err(Error::Busy | Error::Again) => Found::Fault(Fault::Retry),
                    done => done.map(|()| Found::Fault(Fault::Mapped))?,
                },
            },
            Err(error) => return Err(error),
        })
    }

    /// Maps pages before the guest touches them. Returns the number mapped.
    pub(crate) fn pre_fault(&self, first: Gfn, pages: u64) -> Result<u64> {
        self.life.require(Step::Runnable)?;
        self.check_range(first, pages)?;
        for done in 0..pages {
            let Some(gfn) = first.checked_add(done) else {
                return Ok(done);
            };
            let failed = match self.fault_patiently(gfn) {
                Ok(Fault::Mapped) => continue,
                Ok(Fault::Retry) => Error::Busy,
                Ok(Fault::NotPrivate) => Error::NotFound(Field::Gfn, gfn.get()),
                Err(error) => error,
            };
            // The pages before it are mapped: that is said first, a reason that stays with the next call.
            let stays = matches!(failed, Error::Busy | Error::NotFound(..) | Error::NoMemory);
            return if done > 0 && stays {
                Ok(done)
            } else {
                Err(failed)
            };
        }
        Ok(pages)
    }

    /// Maps a page of 2 MiB before the guest touches it.
    pub(crate) fn map_large(&self, first: Gfn) -> Result<()> {
        self.life.require(Step::Runnable)?;
        let pages = Level::Size2M.frames();
        self.check_range(first, pages)?;
        let private = self.write_private();
        self.require_settled()?;
        let mut frames = (0..pages).filter_map(|n| first.checked_add(n));
        if !first.is_aligned(Level::Size2M) || !frames.all(|gfn| private.may_be_private(gfn)) {
            return Err(Error::Invalid(Field::Gfn, first.get()));
        }
        let page = || self.take_page(Level::Size2M);
        match private.mirror.map(self, first, Level::Size2M, page)? {
            Mapped::New => Ok(()),
            Mapped::Retry => Err(Error::Busy),
            Mapped::Occupied(_) => Err(Error::Exists(Field::Gfn, first.get())),
        }
    }

    /// Splits all pages of 2 MiB, with their guest running. Unlike a fault it has no guest that would try again, so it waits for
    /// locks.
    pub(crate) fn split_large_pages(&self) -> Result<()> {
        let mut large = Vec::new();
        self.read_private().mirror.for_each(|gfn, level, entry| {
            let is_page = matches!(entry, PrivateSpte::Mapped(_) | PrivateSpte::Blocked(_));
            if is_page && level != Level::Size4K {
                large.push(gfn);
            }
        });
        large.into_iter().try_for_each(|gfn| self.split(gfn))
    }

    fn split(&self, gfn: Gfn) -> Result<()> {
        for tries in 0..PATIENCE {
            match self.write_private().mirror.demote(self, gfn) {
                Err(Error::Busy | Error::Again) => {}
                // A fault was faster.
                Err(Error::NotFound(..)) => return Ok(()),
                done => return done,
            }
            (0..1u32 << tries).for_each(|_| self.relax());
        }
        Err(Error::Busy)
    }

    /// A fault without a guest that would fault again.
    fn fault_patiently(&self, gfn: Gfn) -> Result<Fault> {
        let no_vcpu = VcpuId(self.params.vcpus);
        for tries in 0..PATIENCE {
            let fault = self.fault(no_vcpu, gfn)?;
            // A page that comes from another host may come late: only vCPUs wait for it.
            if fault != Fault::Retry || self.journey.awaits_pages() {
                return Ok(fault);
            }
            (0..1u32 << tries).for_each(|_| self.relax());
        }
        Ok(Fault::Retry)
    }

    /// Makes frames private or shared, and removes the private pages of frames that become shared.
    /// Returns the number of frames converted. It stops before the first frame that no slot covers:
    /// the guest chooses the frames, and its memory bounds the attributes that are kept.
    pub(crate) fn set_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        self.require_live()?;
        self.check_range(first, pages)?;
        let mut private = self.write_private();
        self.require_settled()?;
        let pages = private.slots.covered(first, pages.min(MOST_PAGES));
        if pages == 0 {
            return Err(Error::NotFound(Field::Gfn, first.get()));
        }
        if to == Privacy::Shared {
            // No call where the mirror maps nothing.
            private.mirror.zap(self, first, pages, EmptyTables::Keep)?;
        }
        // Last the attributes, which then say what is done.
        self.set_shared(first, pages, to == Privacy::Shared)?;
        private.attributes.set(first, pages, to)?;
        Ok(pages)
    }

    /// The kind of memory that a frame is now.
    pub(crate) fn privacy(&self, gfn: Gfn) -> Privacy {
        self.read_private().attributes.get(gfn)
    }

    /// Opens frames of the VM below to shared accesses of the guest, or closes them.
    pub(crate) fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()> {
        self.on_td_port(|port| port.set_shared(first, pages, shared))
    }

    fn check_range(&self, first: Gfn, pages: u64) -> Result<()> {
        if pages == 0 {
            return Err(Error::Invalid(Field::Size, 0));
        }
        if !self.has_frames(first, pages) {
            return Err(Error::Invalid(Field::Gfn, first.get()));
        }
        Ok(())
    }

    /// Creates a slot or changes its flags. Its memory is what the guest shares with the host.
    pub(crate) fn set_slot(&self, slot: &MemSlot) -> Result<()> {
        self.require_live()?;
        let last = slot.last()?;
        if last.get() >= self.mask.bits() {
            return Err(Error::Invalid(Field::Gpa, last.get()));
        }
        if slot.flags.log_dirty {
            return kvm_ops::not_offered!("a dirty log");
        }
        let mut private = self.write_private();
        self.require_settled()?;
        let new = private.slots.check(slot)?;
        if slot.flags.read_only && !new {
            self.zap_slot(&mut private, slot)?;
        }
        self.on_port(|port| port.set_memory_slot(slot))?;
        private.slots.insert(*slot);
        Ok(())
    }

    /// Deletes a slot, and the private memory in it.
    pub(crate) fn delete_slot(&self, slot: &MemSlot) -> Result<()> {
        self.require_live()?;
        let mut private = self.write_private();
        self.require_settled()?;
        let known = private.slots.known(slot)?;
        self.zap_slot(&mut private, &known)?;
        self.on_port(|port| port.delete_memory_slot(&known))?;
        private.slots.remove(slot.id);
        Ok(())
    }

    fn zap_slot(&self, private: &mut Private, slot: &MemSlot) -> Result<()> {
        let first = Gfn::containing(slot.gpa);
        let pages = slot.bytes() / PAGE_SIZE;
        private
            .mirror
            .zap(self, first, pages, EmptyTables::Free)
            .map(drop)
    }
}

/// The result of a look under the reader's lock.
enum Found {
    Fault(Fault),
    /// A blocked entry, which only a writer may touch.
    Blocked,
    /// A page of 2 MiB that is mapped.
    Large,
}
