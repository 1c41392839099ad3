//! A guest that writes all the time, and notices what is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_core::{Gfn, Gpa};

/// The port that it writes after each step.
pub const TICK: u16 = 0x71;

/// Page 0 holds the count, counted from its first frame. Count `n` is written to page `1 + n % pages`, then to page 0. So after any
/// count each page holds the last count that is its own, or one more where the guest stopped between the
/// two writes. At its start the program checks every page against the count, and shuts down if one differs.
/// It keeps nothing itself: on any VM that has the memory it goes on.
pub struct Writer {
    first: Gfn,
    pages: u64,
    counted: Arc<AtomicU64>,
    doing: Doing,
    count: u64,
    data: [u8; 8],
}

#[derive(Clone, Copy)]
enum Doing {
    ReadingCount,
    Checking(u64),
    WritingPage,
    WritingCount,
    Telling,
}

impl Writer {
    pub fn new(first: Gfn, pages: u64, counted: Arc<AtomicU64>) -> Self {
        Self {
            first,
            pages,
            counted,
            doing: Doing::ReadingCount,
            count: 0,
            data: [0; 8],
        }
    }

    fn at(&self, page: u64) -> Gpa {
        Gpa::new((self.first.get() + page) << 12)
    }

    fn read(&mut self, page: u64, doing: Doing) -> Action<'_> {
        self.doing = doing;
        Action::Read {
            gpa: self.at(page),
            len: 8,
        }
    }

    fn write(&mut self, page: u64, doing: Doing) -> Action<'_> {
        self.doing = doing;
        self.data = self.count.to_le_bytes();
        Action::Write {
            gpa: self.at(page),
            data: &self.data,
        }
    }

    /// The last count up to `count` that belongs to a page; 0 if there is none.
    fn last_of(&self, page: u64, count: u64) -> u64 {
        let back = (count % self.pages + self.pages - (page - 1)) % self.pages;
        count.saturating_sub(back)
    }

    fn next(&mut self) -> Action<'_> {
        self.count += 1;
        self.write(1 + self.count % self.pages, Doing::WritingPage)
    }
}

impl GuestProgram for Writer {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        match (self.doing, last) {
            (Doing::ReadingCount, Outcome::Data(data)) => {
                self.count = u64::from_le_bytes(data.try_into().unwrap());
                self.read(1, Doing::Checking(1))
            }
            (Doing::Checking(page), Outcome::Data(data)) => {
                let found = u64::from_le_bytes(data.try_into().unwrap());
                let expected = self.last_of(page, self.count);
                let ahead = found == self.count + 1 && page == 1 + found % self.pages;
                if found != expected && !ahead {
                    return Action::Shutdown;
                }
                match page == self.pages {
                    true => self.next(),
                    false => self.read(page + 1, Doing::Checking(page + 1)),
                }
            }
            (Doing::WritingPage, Outcome::Done) => self.write(0, Doing::WritingCount),
            (Doing::WritingCount, Outcome::Done) => {
                self.counted.store(self.count, Ordering::SeqCst);
                self.doing = Doing::Telling;
                Action::Out {
                    port: TICK,
                    data: &[0],
                }
            }
            (Doing::Telling, _) => self.next(),
            // The start, or the end of what another program did on this vCPU.
            (Doing::ReadingCount, _) => self.read(0, Doing::ReadingCount),
            _ => Action::Shutdown,
        }
    }
}
