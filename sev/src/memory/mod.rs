//! The guest's memory: slots, private or shared, and the pages that hold what is private.
//!
//! A frame's private page is one of the host's [`PagePort`](kvm_ops::PagePort): for SNP it is
//! assigned in the RMP, for SEV and SEV-ES it is ordinary memory that guest and firmware use with
//! the ASID's key. A frame without a page shows its slot.
//!
//! Attributes and pages exist only where a slot is, so a guest cannot make these tables larger than
//! its memory.

mod change;
mod fault;
mod host;
mod mirrored;
mod parked;
mod shown;
mod slots;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

pub(crate) use change::Assign;
pub(crate) use host::Part;
use kvm_ops::{Gfn, Gpa, Level, NestedFaultAnswer, Page, Pfn, Privacy, SevPort};
use kvm_ops_mmu::{Attributes, Slots};
pub(crate) use mirrored::{MirrorId, Touch, View};

use crate::migrate::FrameSet;
use crate::sp::Held;
use crate::swap::SwapSpace;

/// A private page of the guest.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) page: Page,
    pub(crate) held: Held,
}

/// Slots, attributes and private pages of a guest.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) slots: Slots,
    attributes: Attributes,
    /// By first frame number; frames do not overlap.
    frames: BTreeMap<u64, Frame>,
    parked: parked::Parked,
    shown: shown::Shown,
    /// Its pages went to another VM, or to its mirrors.
    pub(crate) taken: bool,
    /// Where mirrors map the pages.
    pub(crate) views: mirrored::Views,
    /// Frames that changed since they were last read; kept while the guest is being sent.
    dirty: Option<FrameSet>,
    /// Pages that are out of memory.
    pub(crate) swap: SwapSpace,
}

impl Memory {
    /// True if slots back all of these frames.
    pub(crate) fn has_slot(&self, first: Gfn, frames: u64) -> bool {
        self.slots.covered(first, frames) == frames
    }

    /// The guest address of a byte of the host memory that a slot lends.
    pub(crate) fn gpa_of(&self, host: u64) -> Option<Gpa> {
        self.slots.iter().find_map(|slot| {
            let offset = host.checked_sub(slot.host.address())?;
            (offset < slot.bytes()).then(|| Gpa::new(slot.gpa.get() + offset))
        })
    }

    /// The page that covers a frame, with its first frame number.
    pub(crate) fn frame(&self, gfn: Gfn) -> Option<(Gfn, &Frame)> {
        let (first, frame) = self.frames.range(..=gfn.get()).next_back()?;
        (gfn.get() - first < frame.page.level().frames()).then_some((Gfn::new(*first), frame))
    }

    /// The page that covers a frame.
    pub(crate) fn frame_mut(&mut self, gfn: Gfn) -> Option<&mut Frame> {
        let (first, _) = self.frame(gfn)?;
        self.frames.get_mut(&first.get())
    }

    /// The 4 KiB page behind a frame, also inside a large one.
    pub(crate) fn page(&self, gfn: Gfn) -> Option<Pfn> {
        let (first, frame) = self.frame(gfn)?;
        frame.page.pfn().checked_add(gfn.get() - first.get())
    }

    /// First frame and size of the private pages that touch a range, lowest first.
    pub(crate) fn touching(&self, first: Gfn, pages: u64) -> Vec<(Gfn, Level)> {
        let from = self.frame(first).map_or(first, |(gfn, _)| gfn);
        let end = first.get().saturating_add(pages);
        self.frames
            .range(from.get()..end)
            .map(|(gfn, frame)| (Gfn::new(*gfn), frame.page.level()))
            .collect()
    }

    /// Maps the private page that covers a frame into a VM's nested page tables. `None` if there is
    /// none.
    pub(crate) fn map_into(&self, port: &dyn SevPort, gfn: Gfn) -> Option<NestedFaultAnswer> {
        let (first, frame) = self.frame(gfn)?;
        let mapped = port.map_encrypted(first, frame.page.level(), Some(&frame.page));
        Some(mapped.map_or_else(NestedFaultAnswer::Fail, |()| NestedFaultAnswer::Retry))
    }

    /// Takes every page out, also those that no slot shows.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = Frame> + use<> {
        let frames = core::mem::take(&mut self.frames).into_values();
        let parked = core::mem::take(&mut self.parked).into_values();
        let shown = core::mem::take(&mut self.shown).into_values();
        self.views = mirrored::Views::default();
        frames.chain(parked).chain(shown.flatten())
    }

    pub(crate) fn is_shared(&self, gfn: Gfn) -> bool {
        self.attributes.get(gfn) == Privacy::Shared
    }

    /// Takes a frame out of the list.
    pub(crate) fn remove(&mut self, first: Gfn) -> Option<Frame> {
        let frame = self.frames.remove(&first.get())?;
        self.touched(first, frame.page.level().frames());
        Some(frame)
    }

    pub(crate) fn insert(&mut self, gfn: Gfn, frame: Frame) {
        self.touched(gfn, frame.page.level().frames());
        self.frames.insert(gfn.get(), frame);
    }

    /// Records that frames changed, or may.
    pub(crate) fn touched(&mut self, first: Gfn, frames: u64) {
        if let Some(dirty) = &mut self.dirty {
            for gfn in (first.get()..).take(frames as usize) {
                dirty.insert(Gfn::new(gfn));
            }
        }
    }

    /// Every private page with its first frame.
    pub(crate) fn frames(&self) -> impl Iterator<Item = (Gfn, &Frame)> {
        self.frames
            .iter()
            .map(|(gfn, frame)| (Gfn::new(*gfn), frame))
    }

    /// The record of frames that changed.
    pub(crate) fn dirty(&mut self) -> &mut Option<FrameSet> {
        &mut self.dirty
    }

    /// True if all of these frames are private.
    pub(crate) fn is_private(&self, first: Gfn, frames: u64) -> bool {
        let all = self.attributes.all(first, frames, Privacy::Private);
        all.unwrap_or(false)
    }

    /// The frames that are shared with the host: first frame and number.
    pub(crate) fn shared_frames(&self) -> Vec<(Gfn, u64)> {
        self.attributes.exceptions().collect()
    }

    /// True if it holds no page of a guest, in memory or out of it.
    pub(crate) fn has_no_page(&self) -> bool {
        self.frames.is_empty() && self.shown.is_empty() && self.swap.is_empty()
    }

    /// Takes over pages and attributes of another VM. Its slots stay with it.
    pub(crate) fn take_pages(&mut self, from: &mut Self) {
        self.frames = core::mem::take(&mut from.frames);
        self.parked = core::mem::take(&mut from.parked);
        self.shown = core::mem::take(&mut from.shown);
        self.views = core::mem::take(&mut from.views);
        self.attributes = core::mem::take(&mut from.attributes);
        self.swap = core::mem::take(&mut from.swap);
        from.dirty = None;
        from.taken = true;
    }

    /// Everything, slots included, for the mirrors of an owner that goes.
    pub(crate) fn take_all(&mut self) -> Self {
        let gone = Self {
            taken: true,
            ..Self::default()
        };
        core::mem::replace(self, gone)
    }
}
