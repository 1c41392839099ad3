//! Pages of a SEV or SEV-ES guest that no slot of its VM shows now.
//!
//! Linux encrypts the caller's memory in place and pins it. Its contents stay at their host address, whichever slot shows
//! them: QEMU encrypts its firmware before that has a slot, and deletes and creates slots when firmware changes the map below
//! 1 MiB. Here the contents are in pages of the host's [`PagePort`](kvm_ops::PagePort), so those are kept by host address.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use kvm_ops::{EncRegion, Gfn, Host, Level, MemSlot, PAGE_SIZE, Result};

use super::{Frame, Memory};
use crate::shared::Shared;
use crate::sp::Held;

/// By the host address of the memory that they stand for.
pub(super) type Parked = BTreeMap<u64, Frame>;

impl Memory {
    /// Keeps a page until a slot shows its host address, for which there is none.
    pub(crate) fn park(&mut self, host: u64, frame: Frame) {
        self.parked.insert(host, frame);
    }

    pub(crate) fn is_parked(&self, host: u64) -> bool {
        self.parked.contains_key(&host)
    }

    /// Takes the pages out whose address is in a range.
    fn unpark(&mut self, first: u64, bytes: u64) -> Vec<(u64, Frame)> {
        let end = first.saturating_add(bytes);
        let addresses: Vec<u64> = self.parked.range(first..end).map(|(at, _)| *at).collect();
        let taken = addresses.into_iter();
        taken
            .filter_map(|at| Some((at, self.parked.remove(&at)?)))
            .collect()
    }
}

/// The frame of a slot that shows a host address.
fn gfn_of(slot: &MemSlot, host: u64) -> Gfn {
    Gfn::new((slot.gpa.get() + (host - slot.host.address())) / PAGE_SIZE)
}

impl<H: Host> Shared<H> {
    /// A slot is about to go: what its memory holds stays where that is pinned, or a slot of a mirror's shows it.
    pub(super) fn park_slot(&self, memory: &mut Memory, slot: &MemSlot) -> Result<()> {
        let group = self.owned_group();
        if self.is_snp() || self.regions().is_empty() && group.is_none() {
            return Ok(());
        }
        let stays = |host| {
            let mirrored = || group.as_ref().is_some_and(|group| group.shows(host));
            self.regions().has(host) || mirrored()
        };
        let first = Gfn::containing(slot.gpa);
        for (gfn, _) in memory.touching(first, slot.bytes() / PAGE_SIZE) {
            self.split(memory, gfn)?;
        }
        for (gfn, _) in memory.touching(first, slot.bytes() / PAGE_SIZE) {
            let host = slot.host.address() + (gfn.get() - first.get()) * PAGE_SIZE;
            if memory.is_parked(host) || !stays(host) {
                continue;
            }
            // Mirrors keep their mappings: the page stays the same.
            let (level, held) = (Level::Size4K, Held::Host);
            self.sev()?.map_encrypted(gfn, level, None)?;
            if let Some(Frame { page, .. }) = memory.remove(gfn) {
                memory.park(host, Frame { page, held });
            }
        }
        Ok(())
    }

    /// A slot came: the pages that stand for its memory are the guest's.
    pub(super) fn show_parked(&self, memory: &mut Memory, slot: &MemSlot) -> Result<()> {
        let mut shown = Ok(());
        for (host, frame) in memory.unpark(slot.host.address(), slot.bytes()) {
            let Frame { page, held } = frame;
            let mapped = match shown {
                Ok(()) => self.map(memory, gfn_of(slot, host), page),
                Err(error) => Err((error, Some(page))),
            };
            shown = mapped.map_err(|(error, page)| {
                if let Some(page) = page {
                    memory.park(host, Frame { page, held });
                }
                error
            });
        }
        shown
    }

    /// A region is not pinned any more: what no slot shows of it is gone, unless another region pins it too, or a slot of
    /// a mirror's shows it.
    pub(crate) fn forget_region(&self, region: EncRegion) {
        let group = self.owned_group();
        self.forget_parked(region, |host| {
            group.as_ref().is_some_and(|group| group.shows(host))
        });
    }

    /// Memory is not the caller's any more: what no slot shows of it is gone, unless a region pins it.
    pub(crate) fn forget_memory(&self, memory: EncRegion) {
        self.forget_parked(memory, |_| false);
    }

    fn forget_parked(&self, region: EncRegion, stays: impl Fn(u64) -> bool) {
        let first = region.address - region.address % PAGE_SIZE;
        let bytes = region.bytes.saturating_add(region.address - first);
        let mut memory = self.memory();
        for (host, frame) in memory.unpark(first, bytes) {
            let views = memory.views.of_page(&frame.page);
            // A mirror that keeps its mapping keeps the page, until the guest ends.
            if self.regions().has(host)
                || stays(host)
                || self.unmap_in_mirrors(&mut memory, &views).is_err()
            {
                memory.park(host, frame);
                continue;
            }
            // The account lists a page that leaks.
            let _ = self.sp().release(frame.page, frame.held);
        }
    }
}
