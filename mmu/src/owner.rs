//! The ownership of pages: [`Page`] values outside of the mirror, numbers in its entries.

use kvm_ops_core::Field;

use crate::entry::{MAX_PFN, encode};
use crate::mirror::Mirror;
use crate::{Error, Gfn, Level, MirrorHooks, Page, Pfn, PrivateSpte, Removal, Result, SpteChange};

/// Names a change of an entry of a mirror.
#[inline]
pub(crate) fn change_of(gfn: Gfn, level: Level, old: PrivateSpte, new: PrivateSpte) -> SpteChange {
    // SAFETY: the callers pass the entry's value as `old`, and in `new` a page that the mirror owns
    // or that its caller just handed over. The page stays the mirror's until a later change.
    unsafe { SpteChange::new(gfn, level, old, new) }
}

impl Mirror {
    /// Checks that an entry can hold the page; else the page goes back.
    #[inline]
    pub(crate) fn check_page(
        &self,
        hooks: &impl MirrorHooks,
        page: Page,
        size: Level,
    ) -> Result<Page> {
        let fits = page.pfn().get() <= MAX_PFN && page.port() == self.port && page.level() == size;
        if fits {
            return Ok(page);
        }
        let error = Error::Invalid(Field::Page, page.hpa().get());
        hooks.free_page(page);
        Err(error)
    }

    /// Fills an empty entry of level `at` with a page of level `size` by the hook; if that fails the
    /// page goes back. Returns the word of the entry, which owns the page from then on.
    #[inline]
    pub(crate) fn add(
        &self,
        hooks: &impl MirrorHooks,
        (gfn, at): (Gfn, Level),
        (page, size): (Page, Level),
        kind: impl Fn(Pfn) -> PrivateSpte,
    ) -> Result<u64> {
        let page = self.check_page(hooks, page, size)?;
        let new = kind(page.pfn());
        match hooks.set_private_spte(&change_of(gfn, at, PrivateSpte::Absent, new)) {
            Ok(()) => {
                let _ = page.into_raw();
                Ok(encode(new))
            }
            Err(error) => {
                hooks.free_page(page);
                Err(error)
            }
        }
    }

    /// Makes a change by the hook that takes `page` out of its entry, and calls `store` once the
    /// firmware has changed the entry. After `Ok` the page belongs to the host.
    pub(crate) fn remove_page(
        &self,
        hooks: &impl MirrorHooks,
        change: &SpteChange,
        (page, size): (Pfn, Level),
        store: impl FnOnce(),
    ) -> Result<Page> {
        let removal = hooks.remove_private_spte(change);
        if let Removal::Failed(error) = removal {
            return Err(error);
        }
        store();
        // SAFETY: the entry named the page, and `store` has just overwritten it. By the contract of
        // the hooks the firmware has let the page go.
        let page = unsafe { self.take_page(page, size) };
        if let Removal::Dirty(error) = removal {
            hooks.leak(page, error);
            return Err(error);
        }
        Ok(page)
    }

    /// The owner of a page that an entry named.
    ///
    /// # Safety
    /// The entry named the page, and names it no more or is never read again.
    pub(crate) unsafe fn take_page(&self, page: Pfn, size: Level) -> Page {
        // SAFETY: an entry holds the number of a page only as `into_raw` left it, with the level and
        // port that `check_page` saw. `demote` splits a page into the 512 that cover it, `promote`
        // joins them. The caller gives the entry's ownership up.
        unsafe { Page::from_raw(page, size, self.port) }
    }
}
