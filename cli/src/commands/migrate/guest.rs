//! The guest that migrates. Its whole state is in private memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ops::guest::{Action, GuestProgram, Outcome};
use kvm_ops::{Gfn, Gpa, Level, Privacy, SharedMask};

/// Reads a count from its first page, writes the next count to another page and then to the first,
/// and so on. Any VM that gets its memory can continue.
pub(super) struct Walker {
    pages: u64,
    /// The next page to accept, up to `pages`; the first one was measured.
    unaccepted: u64,
    counted: Arc<AtomicU64>,
    mask: SharedMask,
    doing: Doing,
    count: [u8; 8],
}

#[derive(Clone, Copy)]
enum Doing {
    Accepting,
    Reading,
    WritingPage,
    WritingHead,
}

impl Walker {
    /// Creates a guest that walks `pages` pages and stores each count that it has written into
    /// `counted`. `accepts` for a TD or an SNP guest, which accepts its pages before their first use.
    pub(super) fn new(pages: u64, accepts: bool, counted: Arc<AtomicU64>) -> Self {
        Self {
            pages,
            unaccepted: if accepts { 1 } else { pages },
            counted,
            mask: SharedMask::NONE,
            doing: Doing::Reading,
            count: [0; 8],
        }
    }

    /// Accepts the next page, or begins to count.
    fn accept(&mut self) -> Action<'_> {
        if self.unaccepted < self.pages {
            let gpa = Gpa::new(self.unaccepted << 12);
            self.unaccepted += 1;
            return Action::Accept {
                gpa,
                level: Level::Size4K,
            };
        }
        self.doing = Doing::Reading;
        Action::Read {
            gpa: self.at(0),
            len: 8,
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
            self.doing = Doing::Accepting;
            return self.accept();
        }
        match (self.doing, last) {
            (Doing::Accepting, Outcome::Done) => self.accept(),
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
