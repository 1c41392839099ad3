//! Pages as owned values.

use crate::{Hpa, Level, Pfn, PortId};

/// A page of physical memory that the holder owns: no guest, no firmware and no other VM uses it,
/// or the holder gave it to exactly one of them.
///
/// It can be neither copied nor made up, so one page never has two owners. A dropped page is lost to
/// the host until it restarts, which wastes memory and breaks nothing.
///
/// ```compile_fail,E0382
/// fn free_twice(port: &impl kvm_ops_core::PagePort, page: kvm_ops_core::Page) {
///     let _ = port.free(page);
///     let _ = port.free(page); // used after it moved
/// }
/// ```
///
/// ```compile_fail,E0133
/// # use kvm_ops_core::{Level, Page, Pfn, PortId};
/// let forged = Page::from_raw(Pfn::new(0x1000), Level::Size4K, PortId::new());
/// ```
#[must_use = "a page that is dropped is lost to the host"]
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    pfn: Pfn,
    level: Level,
    port: PortId,
}

impl Page {
    /// Makes the value that owns a page.
    ///
    /// # Safety
    /// * `pfn` is aligned to `level`, and the page is memory of the port `port`.
    /// * No other `Page` covers a part of it. A table entry or list that holds the number of a page
    ///   owns it as [`into_raw`](Self::into_raw) left it, and gives it up with this call.
    #[inline]
    pub const unsafe fn from_raw(pfn: Pfn, level: Level, port: PortId) -> Self {
        Self { pfn, level, port }
    }

    /// Hands the ownership to whoever keeps the number: a table entry, or a list.
    #[inline]
    pub const fn into_raw(self) -> Pfn {
        self.pfn
    }

    /// The first frame.
    #[inline]
    pub const fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The address of the first byte.
    #[inline]
    pub const fn hpa(&self) -> Hpa {
        // A port has no page whose address does not fit.
        Hpa::new(self.pfn.get() << 12)
    }

    /// The size.
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The port that the page came from.
    #[inline]
    pub const fn port(&self) -> PortId {
        self.port
    }
}
