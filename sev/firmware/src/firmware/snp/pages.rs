//! Commands that change the state of pages.

use super::super::{Firmware, Outcome};
use crate::command::{SizedPage, SnpPageMove, SnpPolicy};
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::machine::region::{PAGE, PAGES, Region};
use crate::status::Status;
use std::sync::Arc;

impl Firmware<'_> {
    pub(super) fn page_reclaim(&mut self, page: SizedPage) -> Outcome {
        let size = page.size();
        let address = self.aligned_page(page.address(), size)?;
        self.with_entry(address, |entry| {
            let state = match entry.state {
                PageState::Firmware | PageState::Metadata | PageState::Reclaim => {
                    PageState::Reclaim
                }
                PageState::PreGuest => PageState::GuestInvalid,
                PageState::PreSwap => PageState::GuestValid,
                _ => return Err(Status::INVALID_PAGE_STATE),
            };
            if entry.size != size {
                return Err(Status::INVALID_PAGE_SIZE);
            }
            Ok(entry.with_state(state))
        })
    }

    /// The page is large whatever PAGE_SIZE says.
    pub(super) fn page_unsmash(&mut self, page: SizedPage) -> Outcome {
        let address = self.aligned_page(page.address(), PageSize::Size2M)?;
        let place = self.place(address)?;
        let mut region = place.lock_all();
        if region.is_large() {
            return Err(Status::INVALID_PAGE_SIZE);
        }
        if !is_joinable(&region) {
            return Err(Status::INVALID_PAGE_STATE);
        }
        let head = region.entry(0);
        region.set_large(head);
        Ok(())
    }

    /// Moves a page that the host has fixed to one that the host has prepared at the same guest
    /// address. The old page goes back to the host, the new one to the guest.
    pub(super) fn page_move(&mut self, context: u64, buffer: &SnpPageMove) -> Outcome {
        if buffer.flags.reserved() != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let size = buffer.flags.page_size();
        let src = self.aligned_page(buffer.src_paddr.get(), size)?;
        let dst = self.aligned_page(buffer.dst_paddr.get(), size)?;
        let guest = self.snp_guest(context)?;
        if guest.policy.contains(SnpPolicy::PAGE_SWAP_DISABLE) {
            return Err(Status::POLICY_FAILURE);
        }
        let (asid, key) = (guest.asid.ok_or(Status::INACTIVE)?, Arc::clone(&guest.key));
        let from = self.owned_entry(src, asid, PageState::PreSwap, size)?;
        let to = self.owned_entry(dst, asid, PageState::PreGuest, size)?;
        if from.gpa != to.gpa {
            return Err(Status::INVALID_PAGE_OWNER);
        }
        // Both entries are immutable, so neither changes while only one region is locked.
        let mut page = [0; PAGE];
        for at in (0..size.bytes()).step_by(PAGE) {
            self.guest_read(&key, src + at, &mut page)?;
            self.guest_write(&key, dst + at, &page)?;
        }
        self.with_entry(dst, |_| Ok(from.with_state(PageState::GuestValid)))?;
        self.with_entry(src, |_| {
            Ok(RmpEntry {
                size,
                asid,
                gpa: from.gpa,
                ..RmpEntry::of(PageState::PreGuest)
            })
        })
    }

    /// The entry of a guest's page in a wanted state.
    pub(super) fn owned_entry(
        &self,
        address: u64,
        asid: u32,
        state: PageState,
        size: PageSize,
    ) -> Outcome<RmpEntry> {
        let place = self.place(address)?;
        let entry = place.peek().entry(place.index);
        if entry.state != state {
            Err(Status::INVALID_PAGE_STATE)
        } else if entry.asid != asid {
            Err(Status::INVALID_PAGE_OWNER)
        } else if entry.size != size {
            Err(Status::INVALID_PAGE_SIZE)
        } else {
            Ok(entry)
        }
    }
}

/// Returns true if 512 small entries describe one large guest page that the host has fixed.
fn is_joinable(region: &Region) -> bool {
    let head = region.entry(0);
    let fixed = matches!(head.state, PageState::PreGuest | PageState::PreSwap);
    fixed
        && !head.vmsa
        && PageSize::Size2M.aligns(head.gpa)
        && (0..PAGES).all(|i| {
            let expected = RmpEntry {
                gpa: head.gpa + (i * PAGE) as u64,
                ..head
            };
            region.entry(i) == expected
        })
}
