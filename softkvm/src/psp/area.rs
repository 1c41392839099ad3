//! Memory of the machine for blobs that firmware reads and writes.

use kvm_ops::sim::SimHost;
use kvm_ops::{Host, Hpa, Level, Page, PagePort};
use kvm_ops_uapi::Errno;
use soft_amd_sp::command::{SizedPage, SnpPageReclaim};
use soft_amd_sp::{PageSize, Platform, RmpUpdate};

use crate::refusal::Result;

/// The longest blob, in bytes.
pub(super) const BLOB_MAX: u32 = 16384;
const PAGE: u64 = 4096;
/// Where blobs are: two that firmware reads, and two that it writes.
const IN: [u64; 2] = [0, 0x8000];
const OUT: [u64; 2] = [0x10_0000, 0x10_8000];
/// Pages from the first blob that firmware writes to the end of the second.
const OUT_PAGES: u64 = 12;

/// 2 MiB, because a blob must not be scattered. With SNP firmware writes only pages in its own state, and the
/// blobs that it writes are in them as long as this lives.
pub(super) struct Area<'a> {
    host: &'a SimHost,
    platform: &'a Platform,
    /// Taken by the drop.
    page: Option<Page>,
    /// Pages in firmware's state.
    lent: u64,
}

impl<'a> Area<'a> {
    pub(super) fn new(host: &'a SimHost, platform: &'a Platform) -> Result<Self> {
        let pages = host.pages().ok_or(Errno::ENODEV)?;
        let mut area = Self {
            host,
            platform,
            page: Some(pages.alloc(Level::Size2M)?),
            lent: 0,
        };
        for n in 0..OUT_PAGES {
            let at = area.at(OUT[0] + n * PAGE)?;
            // Without SNP there is nothing to change.
            if platform.rmpupdate(at, &RmpUpdate::firmware()).is_ok() {
                area.lent += 1;
            }
        }
        Ok(area)
    }

    fn at(&self, offset: u64) -> Result<u64> {
        let page = self.page.as_ref().ok_or(Errno::ENOMEM)?;
        Ok(page.hpa().get() + offset)
    }

    /// The address of the blob that firmware writes.
    pub(super) fn out(&self, n: usize) -> Result<u64> {
        self.at(OUT[n])
    }

    /// What firmware wrote.
    pub(super) fn read(&self, n: usize, len: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len.min(BLOB_MAX) as usize];
        let pages = self.host.pages().ok_or(Errno::ENODEV)?;
        pages.read(Hpa::new(self.out(n)?), &mut bytes)?;
        Ok(bytes)
    }

    /// Puts a blob where firmware reads it, and returns its address.
    pub(super) fn put(&self, n: usize, bytes: &[u8]) -> Result<u64> {
        let at = self.at(IN[n])?;
        let pages = self.host.pages().ok_or(Errno::ENODEV)?;
        pages.write(Hpa::new(at), bytes)?;
        Ok(at)
    }

    fn take_back(&self, offset: u64) -> bool {
        let Ok(at) = self.at(offset) else {
            return false;
        };
        let Ok(page_paddr) = SizedPage::new(at, PageSize::Size4K) else {
            return false;
        };
        let mut reclaim = SnpPageReclaim { page_paddr };
        self.platform.run(&mut reclaim).ok().is_ok()
            && self.platform.rmpupdate(at, &RmpUpdate::shared()).is_ok()
    }
}

impl Drop for Area<'_> {
    fn drop(&mut self) {
        let mut all = 0..self.lent;
        let back = all.all(|n| self.take_back(OUT[0] + n * PAGE));
        let (Some(page), Some(pages)) = (self.page.take(), self.host.pages()) else {
            return;
        };
        if !back {
            tracing::error!(page = %page.hpa(), "firmware keeps the memory of a command");
        } else if pages.free(page).is_err() {
            tracing::error!("the memory of a command is of another machine");
        }
    }
}

const _: () = {
    assert!(BLOB_MAX as u64 <= IN[1] - IN[0] && BLOB_MAX as u64 <= OUT[1] - OUT[0]);
    assert!(OUT[1] + BLOB_MAX as u64 <= OUT[0] + OUT_PAGES * PAGE);
};
