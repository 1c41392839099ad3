//! The guest that migrates. Its whole state is in private memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ops::guest::{Action, GuestProgram, Outcome};
use kvm_ops::{Gfn, Gpa, Privacy, SharedMask};

/// Reads a count from its first page, writes the next count to another page and then to the first,
/// and so on. Any VM that gets its memory can continue.
pub(super) struct Walker {
    pages: u64,
    counted: Arc<AtomicU64>,
    mask: SharedMask,
    doing: Doing,
    count: [u8; 8],
}

#[derive(Clone, Copy)]
enum Doing {
    Reading,
    WritingPage,
    WritingHead,
}

impl Walker {
    /// Creates a guest that walks `pages` pages and stores each count that it has written into
    /// `counted`.
    pub(super) fn new(pages: u64, counted: Arc<AtomicU64>) -> Self {
        Self {
            pages,
            counted,
            mask: SharedMask::NONE,
            doing: Doing::Reading,
            count: [0; 8],
        }
    }

    fn at(&self, page: u64) -> Gpa {
        let gfn = Gfn::new(page);
        self.mask
            .join(gfn, Privacy::Private)
            .unwrap_or(Gpa::new(page << 12))
    }
}

impl GuestProgram for Walker {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if let Outcome::Start { mask, .. } = last {
            self.mask = mask;
            self.doing = Doing::Reading;
            return Action::Read {
                gpa: self.at(0),
                len: 8,
            };
        }
        match (self.doing, last) {
            (Doing::Reading, Outcome::Data(bytes)) if bytes.len() == 8 => {
                self.count.copy_from_slice(bytes);
                let count = u64::from_le_bytes(self.count) + 1;
                self.count = count.to_le_bytes();
                self.doing = Doing::WritingPage;
                let gpa = self.at(1 + count % self.pages.saturating_sub(1).max(1));
                Action::Write {
                    gpa,
                    data: &self.count,
                }
            }
            (Doing::WritingPage, Outcome::Done) => {
                self.doing = Doing::WritingHead;
                Action::Write {
                    gpa: self.at(0),
                    data: &self.count,
                }
            }
            (Doing::WritingHead, Outcome::Done) => {
                let count = u64::from_le_bytes(self.count);
                self.counted.store(count, Ordering::Release);
                self.doing = Doing::Reading;
                Action::Read {
                    gpa: self.at(0),
                    len: 8,
                }
            }
            // The memory is gone, so the guest cannot continue.
            _ => Action::Shutdown,
        }
    }
}
