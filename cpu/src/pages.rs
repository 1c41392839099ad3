//! Frames that hold decoded code, shared by the processors of one machine.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

/// Frames with decoded code. All vCPUs of a machine hold the same one, so that a store of one
/// into code of another drops the other's decoded blocks.
///
/// For each frame there is a map of 128-byte pieces that were decoded, and a version that grows
/// when one of them is written. Processors look at versions when [`Cpu::run`](crate::Cpu::run) is
/// entered, which is exact for vCPUs that take turns on one thread, and at every instruction that serializes, which
/// is what those that run at the same time ([`Cpu::set_parallel`](crate::Cpu::set_parallel)) need: an instruction
/// that was written by another processor is executed after such an instruction at the latest.
#[derive(Debug)]
pub struct CodePages {
    pieces: Box<[AtomicU32]>,
    versions: Box<[AtomicU32]>,
    protected: AtomicU64,
    written: AtomicU64,
}

impl CodePages {
    /// A table for a machine with `frames` frames of memory. A smaller number works too: frames
    /// then share entries, and stores near code are slower.
    pub fn new(frames: usize) -> Arc<Self> {
        let zeros = || (0..frames.max(1)).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self {
            pieces: zeros(),
            versions: zeros(),
            protected: AtomicU64::new(0),
            written: AtomicU64::new(0),
        })
    }

    fn slot(&self, gpa: u64) -> usize {
        ((gpa >> 12) % self.pieces.len() as u64) as usize
    }

    /// Bits of the 128-byte pieces that `len` bytes at `gpa` touch.
    fn bits(gpa: u64, len: usize) -> u32 {
        let first = (gpa & 0xfff) >> 7;
        let last = ((gpa & 0xfff) + len.max(1) as u64 - 1).min(0xfff) >> 7;
        ((1u64 << (last + 1)) - (1u64 << first)) as u32
    }

    /// Marks code; true if the frame had none before, so write tags must go.
    pub(crate) fn protect(&self, gpa: u64, len: usize) -> bool {
        let old = self.pieces[self.slot(gpa)].fetch_or(Self::bits(gpa, len), SeqCst);
        if old == 0 {
            self.protected.fetch_add(1, SeqCst);
        }
        old == 0
    }

    /// Marks more code of a frame that has some. False, and nothing changes, if it has none.
    pub(crate) fn extend(&self, gpa: u64, len: usize) -> bool {
        let bits = Self::bits(gpa, len);
        self.pieces[self.slot(gpa)]
            .fetch_update(SeqCst, SeqCst, |old| (old != 0).then_some(old | bits))
            .is_ok()
    }

    pub(crate) fn has_code(&self, gpa: u64) -> bool {
        self.pieces[self.slot(gpa)].load(SeqCst) != 0
    }

    pub(crate) fn overlaps(&self, gpa: u64, len: usize) -> bool {
        self.pieces[self.slot(gpa)].load(SeqCst) & Self::bits(gpa, len) != 0
    }

    /// Notifies all processors of a write of `len` bytes at `gpa` from outside: a device's DMA, or
    /// a host that loads a program.
    pub fn written(&self, gpa: u64, len: usize) {
        if len == 0 {
            return;
        }
        let last = gpa.saturating_add(len as u64 - 1) >> 12;
        for frame in (gpa >> 12)..=last {
            self.forget(frame << 12);
        }
    }

    /// Drops a frame's marks and makes its blocks stale.
    pub(crate) fn forget(&self, gpa: u64) {
        let slot = self.slot(gpa);
        if self.pieces[slot].swap(0, SeqCst) != 0 {
            self.versions[slot].fetch_add(1, SeqCst);
            self.written.fetch_add(1, SeqCst);
        }
    }

    pub(crate) fn version(&self, gpa: u64) -> u32 {
        self.versions[self.slot(gpa)].load(SeqCst)
    }

    pub(crate) fn protected_count(&self) -> u64 {
        self.protected.load(SeqCst)
    }

    pub(crate) fn written_count(&self) -> u64 {
        self.written.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_frame_with_code_takes_more_of_it() {
        let pages = CodePages::new(16);
        assert!(!pages.extend(0x1080, 1));
        assert!(!pages.has_code(0x1000));
        assert!(pages.protect(0x1000, 1));
        assert!(pages.extend(0x1080, 1));
        assert!(pages.overlaps(0x1080, 1) && pages.overlaps(0x1000, 1));
        assert!(!pages.overlaps(0x1100, 1));
        pages.forget(0x1000);
        assert!(!pages.extend(0x1080, 1));
    }

    #[test]
    fn pieces_of_128_bytes_are_told_apart() {
        let pages = CodePages::new(16);
        assert!(pages.protect(0x1080, 0x80));
        assert!(!pages.overlaps(0x107f, 1));
        assert!(pages.overlaps(0x107f, 2));
        assert!(pages.overlaps(0x10ff, 1));
        assert!(!pages.overlaps(0x1100, 0xf00));
        let version = pages.version(0x1000);
        pages.written(0xfff, 2);
        assert_ne!(pages.version(0x1000), version);
        assert!(!pages.has_code(0x1000));
    }
}
