//! The pages through which contents pass: firmware writes one, or the host does.

use kvm_ops::{Error, Host, Level, Page, Result};

use crate::sp::{Held, Sp};

/// A page of each size, taken when it is needed and given back at the end.
pub(super) struct Stage<'a, H: Host> {
    sp: Sp<'a, H>,
    /// Immutable if firmware writes it.
    held: Held,
    pages: [Option<Page>; 2],
}

impl<'a, H: Host> Stage<'a, H> {
    pub(super) fn new(sp: Sp<'a, H>, held: Held) -> Self {
        Self {
            sp,
            held,
            pages: [None, None],
        }
    }

    /// The page of that size.
    pub(super) fn page(&mut self, level: Level) -> Result<&Page> {
        let place = &mut self.pages[usize::from(level == Level::Size2M)];
        if place.is_none() {
            let page = match self.held {
                Held::Immutable => self.sp.firmware_page(level)?,
                Held::Host | Held::Assigned => self.sp.alloc(level)?,
            };
            *place = Some(page);
        }
        place.as_ref().ok_or(Error::NoMemory)
    }
}

impl<H: Host> Drop for Stage<'_, H> {
    fn drop(&mut self) {
        for page in self.pages.iter_mut().filter_map(Option::take) {
            // The account lists a page that leaks.
            let _ = self.sp.release(page, self.held);
        }
    }
}
