//! The pages that the host and its devices wrote, which the VM's dirty log does not have.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ops::PAGE_SIZE;

/// One bit for each page of a region.
pub(crate) struct DirtyLog {
    words: Box<[AtomicU64]>,
    bytes: u64,
}

impl DirtyLog {
    pub(crate) fn new(bytes: u64) -> Self {
        let words = bytes.div_ceil(64 * PAGE_SIZE);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            bytes,
        }
    }

    /// Marks the pages of a range. What lies beyond the region is left out.
    pub(crate) fn mark(&self, offset: u64, bytes: usize) {
        let end = offset.saturating_add(bytes as u64).min(self.bytes);
        if offset >= end {
            return;
        }
        for page in offset / PAGE_SIZE..end.div_ceil(PAGE_SIZE) {
            // After the write itself: who takes the bit sees the bytes.
            self.words[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// True if the page at that offset is marked.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn is_marked(&self, offset: u64) -> bool {
        let page = offset / PAGE_SIZE;
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (page % 64) != 0)
    }

    /// Takes the marks, and adds them to a bitmap.
    pub(crate) fn take(&self, bitmap: &mut [u64]) {
        for (word, into) in self.words.iter().zip(bitmap) {
            *into |= word.swap(0, Ordering::Acquire);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_that_a_range_touches_is_marked_once() {
        let log = DirtyLog::new(66 * PAGE_SIZE);
        log.mark(0, 0);
        log.mark(0xfff, 2);
        log.mark(64 * PAGE_SIZE, 1);
        log.mark(1 << 40, 1);
        log.mark(65 * PAGE_SIZE, usize::MAX);
        let mut bitmap = [8, 0];
        log.take(&mut bitmap);
        assert_eq!(bitmap, [0b1011, 0b11]);
        log.take(&mut bitmap);
        assert_eq!(bitmap, [0b1011, 0b11]);
    }
}
