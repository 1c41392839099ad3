//! The mirror's requests to a back end.

use crate::{Error, Page, Result, SpteChange};

/// The back end's side of the mirror: it makes in the Secure-EPT what the mirror is about to record.
///
/// The mirror knows no rule of any technology. It names the old and the new value of an entry, and
/// the back end derives the firmware calls:
///
/// | old | new | TDX |
/// |---|---|---|
/// | `Absent` | `Table(p)` | TDH.MEM.SEPT.ADD |
/// | `Absent` | `Mapped(p)` | TDH.MEM.PAGE.AUG, or TDH.MEM.PAGE.ADD before the measurement is final |
/// | `Mapped(p)` | `Blocked(p)` | TDH.MEM.RANGE.BLOCK |
/// | `Blocked(p)` | `Mapped(p)` | TDH.MEM.RANGE.UNBLOCK |
/// | `Blocked(p)`, 2 MiB | `Table(t)` | TDH.MEM.PAGE.DEMOTE; the 512 entries below are mapped |
/// | `Table(t)` | `BlockedTable(t)` | TDH.MEM.RANGE.BLOCK |
/// | `BlockedTable(t)` | `Table(t)` | TDH.MEM.RANGE.UNBLOCK |
/// | `Blocked(p)` | `Absent` | TDH.MEM.PAGE.REMOVE, TDH.PHYMEM.PAGE.WBINVD of `p` |
/// | `BlockedTable(t)` | `Absent` | TDH.MEM.SEPT.REMOVE, TDH.PHYMEM.PAGE.WBINVD of `t` |
/// | `BlockedTable(t)` | `Mapped(p)`, 2 MiB | TDH.MEM.PAGE.PROMOTE, TDH.PHYMEM.PAGE.WBINVD of `t` |
///
/// The last three give a page back to the host and come as
/// [`remove_private_spte`](Self::remove_private_spte); all others as
/// [`set_private_spte`](Self::set_private_spte).
///
/// Rules: a hook must not call the mirror; those of the shared side ([`Mirror::map`](crate::Mirror::map))
/// run in many threads at once, but never twice at the same entry.
///
/// # Safety
/// The mirror turns the number in an entry into an owned [`Page`] again when a hook says that the
/// firmware has let it go. So [`remove_private_spte`](Self::remove_private_spte) answers
/// [`Removal::Done`] only when neither the firmware nor the guest reaches the page any more, and
/// [`set_private_spte`](Self::set_private_spte) succeeds only when the change is made, and fails only
/// when nothing changed.
/// [`flush_private_tlb`](Self::flush_private_tlb) succeeds only when no processor holds a translation
/// through a blocked entry.
pub unsafe trait MirrorHooks {
    /// Makes one change. While it runs, other threads see the entry as being changed.
    ///
    /// # Errors
    /// Any error means that nothing changed; the mirror keeps the old entry and returns the error.
    fn set_private_spte(&self, change: &SpteChange) -> Result<()>;

    /// Makes a change that gives a page back to the host.
    ///
    /// The default is for back ends without caches to write back: done, or not done.
    fn remove_private_spte(&self, change: &SpteChange) -> Removal {
        match self.set_private_spte(change) {
            Ok(()) => Removal::Done,
            Err(error) => Removal::Failed(error),
        }
    }

    /// Makes all processors forget translations through what was blocked before (TDH.MEM.TRACK, and
    /// a kick of every vCPU inside).
    ///
    /// # Errors
    /// Any error: what is blocked stays so, and nothing of it is removed.
    fn flush_private_tlb(&self) -> Result<()>;

    /// Takes a 4 KiB page out of the host's use, to become a page of the Secure-EPT.
    ///
    /// # Errors
    /// [`Error::NoMemory`] or another error of the host; the mirror returns it to its caller.
    fn alloc_table(&self) -> Result<Page>;

    /// Takes back a page that the firmware does not have: a guest page or a table that is removed or
    /// was never added.
    fn free_page(&self, page: Page);

    /// Takes a page that must never be used again: it is in no table any more, but not clean.
    fn leak(&self, page: Page, error: Error);
}

/// The result of a change that gives a page back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The entry is changed and the page is the host's.
    Done,
    /// The entry is changed, but the page could not be made clean (TDH.PHYMEM.PAGE.WBINVD failed): the
    /// mirror follows and [leaks](MirrorHooks::leak) the page.
    Dirty(Error),
    /// Nothing changed: the entry stays blocked.
    Failed(Error),
}
