//! Pages of an owner as its mirrors have them.
//!
//! Linux encrypts the caller's memory in place, so a mirror's guest finds by the mirror's own slots what that memory holds, whether
//! or not a slot of the owner shows it. Here the contents are in pages of the owner's. A mirror's fault therefore asks for the page of
//! a host address. Where a mirror maps a page is noted, so that the page leaves the mirror's tables before it is given back.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use kvm_ops::{Gfn, Host, Level, MemSlot, NestedFaultAnswer, PAGE_SIZE, Page, Result, SevPort};

use super::{Frame, Memory};
use crate::shared::Shared;
use crate::sp::{Held, Sp};

/// Tells a mirror from the others of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MirrorId(usize);

impl MirrorId {
    /// The address of a mirror's state, which no two mirrors share while they live.
    pub(crate) fn of<H: Host>(mirror: &Shared<H>) -> Self {
        Self(core::ptr::from_ref(mirror).addr())
    }
}

/// A mapping of a page in a mirror's tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// The number of the page.
    pfn: u64,
    pub(crate) mirror: MirrorId,
    pub(crate) gfn: Gfn,
    pub(crate) level: Level,
}

/// By page, mirror and frame.
#[derive(Debug, Default)]
pub(crate) struct Views(BTreeMap<(u64, MirrorId, u64), Level>);

impl Views {
    fn note(&mut self, view: View) {
        let key = (view.pfn, view.mirror, view.gfn.get());
        self.0.insert(key, view.level);
    }

    pub(crate) fn forget(&mut self, view: &View) {
        self.0.remove(&(view.pfn, view.mirror, view.gfn.get()));
    }

    /// The views of pages from this one on.
    fn from(&self, pfn: u64) -> impl Iterator<Item = View> {
        let views = self.0.range((pfn, MirrorId(0), 0)..);
        views.map(|((pfn, mirror, gfn), level)| View {
            pfn: *pfn,
            mirror: *mirror,
            gfn: Gfn::new(*gfn),
            level: *level,
        })
    }

    /// The views of a page.
    pub(crate) fn of_page(&self, page: &Page) -> Vec<View> {
        let pfn = page.pfn().get();
        self.from(pfn).take_while(|view| view.pfn == pfn).collect()
    }

    /// The views that a mirror has of a range of its frames.
    pub(crate) fn of_mirror(&self, mirror: MirrorId, first: Gfn, pages: u64) -> Vec<View> {
        let (start, end) = (first.get(), first.get().saturating_add(pages));
        let meets = |view: &View| {
            let at = view.gfn.get();
            view.mirror == mirror && at < end && at + view.level.frames() > start
        };
        self.from(0).filter(meets).collect()
    }

    /// A mirror does not run any more.
    pub(crate) fn forget_mirror(&mut self, gone: MirrorId) {
        self.0.retain(|(_, mirror, _), _| *mirror != gone);
    }
}

/// A frame that a mirror's guest touched, and the mirror's slot there.
#[derive(Clone, Copy)]
pub(crate) struct Touch<'a> {
    pub(crate) mirror: MirrorId,
    pub(crate) port: &'a dyn SevPort,
    pub(crate) gfn: Gfn,
    pub(crate) slot: Option<MemSlot>,
    /// The mirror has slots. One without any sees its owner's addresses.
    pub(crate) has_slots: bool,
}

impl Touch<'_> {
    /// The host address of the frame.
    fn host(&self) -> Option<u64> {
        let slot = self.slot.as_ref()?;
        let offset = (self.gfn.get() - Gfn::containing(slot.gpa).get()) * PAGE_SIZE;
        Some(slot.host.address() + offset)
    }

    /// The mirror's frame that corresponds to the first one of an owner's page, if the page can be mapped there as a whole.
    fn first(&self, (first, gfn): (Gfn, Gfn), level: Level) -> Option<Gfn> {
        let at = Gfn::new(self.gfn.get().checked_sub(gfn.get() - first.get())?);
        let slot = self.slot.as_ref()?;
        let start = Gfn::containing(slot.gpa).get();
        let end = start + slot.bytes() / PAGE_SIZE;
        let fits = start <= at.get() && at.get() + level.frames() <= end;
        (at.is_aligned(level) && fits).then_some(at)
    }
}

/// The place of a page.
enum Place {
    /// In the owner's frames, at this one.
    Frame(Gfn),
    /// No slot of the owner's shows it.
    Parked(u64),
}

impl Memory {
    /// The place of the page that a touch means. `None` where there is no page.
    fn place(&self, touch: &Touch<'_>) -> Option<Place> {
        let host = touch.host();
        if let Some(gpa) = host.and_then(|host| self.gpa_of(host)) {
            let gfn = Gfn::containing(gpa);
            return self.frame(gfn).map(|_| Place::Frame(gfn));
        }
        if let Some(host) = host.filter(|host| self.is_parked(*host)) {
            return Some(Place::Parked(host));
        }
        // A move may have left the owner's pages without slots.
        let by_gfn = match touch.slot {
            Some(_) => !self.has_slot(touch.gfn, 1),
            None => !touch.has_slots,
        };
        let there = by_gfn && self.frame(touch.gfn).is_some();
        there.then_some(Place::Frame(touch.gfn))
    }

    /// Maps the page that a touch means into the mirror's tables. `None` where there is no page, or one that is too large for
    /// the mirror's slot.
    pub(crate) fn map_into_mirror(&mut self, touch: &Touch<'_>) -> Option<NestedFaultAnswer> {
        let (page, first) = match self.place(touch)? {
            Place::Parked(host) => (&self.parked.get(&host)?.page, touch.gfn),
            Place::Frame(gfn) => {
                let (first, frame) = self.frame(gfn)?;
                let at = match touch.slot {
                    Some(_) => touch.first((first, gfn), frame.page.level())?,
                    None => first,
                };
                (&frame.page, at)
            }
        };
        let (pfn, level) = (page.pfn().get(), page.level());
        let mapped = touch.port.map_encrypted(first, level, Some(page));
        if mapped.is_ok() {
            self.views.note(View {
                pfn,
                mirror: touch.mirror,
                gfn: first,
                level,
            });
        }
        Some(mapped.map_or_else(NestedFaultAnswer::Fail, |()| NestedFaultAnswer::Retry))
    }

    /// Gives memory of a mirror's a page that no tables of the owner's have, if it has none.
    pub(crate) fn add_for<H: Host>(&mut self, sp: &Sp<'_, H>, touch: &Touch<'_>) -> Result<()> {
        let Some(host) = touch.host().filter(|_| self.place(touch).is_none()) else {
            return Ok(());
        };
        let gfn = self.gpa_of(host).map(Gfn::containing);
        if gfn.is_some_and(|gfn| self.is_shared(gfn)) {
            return Ok(());
        }
        let page = sp.alloc(Level::Size4K)?;
        let held = Held::Host;
        match gfn {
            Some(gfn) => self.insert(gfn, Frame { page, held }),
            None => self.park(host, Frame { page, held }),
        }
        Ok(())
    }
}

impl<H: Host> Shared<H> {
    /// Maps what a mirror's guest touched into the mirror's tables. The lock is held meanwhile, so that the page is not taken out
    /// between.
    pub(crate) fn map_for_mirror(&self, touch: &Touch<'_>) -> NestedFaultAnswer {
        let mut memory = self.memory();
        if memory.taken {
            return NestedFaultAnswer::Retry;
        }
        match self.prepare_for_mirror(&mut memory, touch) {
            Ok(()) => {
                let mapped = memory.map_into_mirror(touch);
                mapped.unwrap_or(NestedFaultAnswer::Leave)
            }
            Err(error) => NestedFaultAnswer::Fail(error),
        }
    }

    /// The page that a touch means gets a size that fits the mirror, and is made where there is none, as the memory is the caller's.
    fn prepare_for_mirror(&self, memory: &mut Memory, touch: &Touch<'_>) -> Result<()> {
        match memory.place(touch) {
            Some(Place::Parked(_)) => Ok(()),
            Some(Place::Frame(gfn)) => match memory.frame(gfn) {
                Some((first, frame))
                    if touch.slot.is_some()
                        && touch.first((first, gfn), frame.page.level()).is_none() =>
                {
                    self.split(memory, gfn)
                }
                _ => Ok(()),
            },
            None => {
                let gpa = touch.host().and_then(|host| memory.gpa_of(host));
                match gpa.map(Gfn::containing) {
                    Some(gfn) if memory.is_shown(gfn) => self.hide(memory, gfn),
                    Some(gfn) if memory.is_shared(gfn) => Ok(()),
                    Some(gfn) => self.populate(memory, gfn, Level::Size4K),
                    None => memory.add_for(&self.sp(), touch),
                }
            }
        }
    }

    /// Takes a page out of the mirrors' tables. Called before it is given back, split or shown in its slot.
    pub(crate) fn unmap_in_mirrors(&self, memory: &mut Memory, views: &[View]) -> Result<()> {
        if views.is_empty() {
            return Ok(());
        }
        let group = self.membership().group.clone();
        for view in views {
            if let Some(group) = &group {
                group.unmap(view)?;
            }
            memory.views.forget(view);
        }
        Ok(())
    }

    /// The mirror takes its mappings of a range out, whose slot is gone.
    pub(crate) fn forget_views(&self, mirror: MirrorId, first: Gfn, pages: u64) -> Result<()> {
        let mut memory = self.memory();
        let views = memory.views.of_mirror(mirror, first, pages);
        self.unmap_in_mirrors(&mut memory, &views)
    }
}
