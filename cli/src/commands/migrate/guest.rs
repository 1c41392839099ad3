//! The guest that migrates. Its whole state is in private memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ops::guest::{Action, GuestProgram, MAX_ACCESS, Outcome};
use kvm_ops::{Gfn, Gpa, Level, Privacy, SharedMask};

/// What a guest tells of itself.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Its last count.
    pub(super) count: AtomicU64,
    /// Pages that it found as it had written them, after its arrival.
    pub(super) checked: AtomicU64,
    /// Pages that it found otherwise.
    pub(super) wrong: AtomicU64,
    /// The moment of its first instruction.
    pub(super) first: OnceLock<Instant>,
}

/// The pages that a guest writes, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turns {
    /// Pages, after the one that holds the count.
    pages: u64,
    /// The pages that it writes again and again, once it has written all; at most `pages`.
    set: u64,
}

impl Turns {
    /// Of a guest with `pages` pages, at least 2, that writes `set` of them again and again.
    pub(super) fn new(pages: u64, set: Option<u64>) -> Self {
        let pages = pages.saturating_sub(1).max(1);
        let set = set.unwrap_or(pages).clamp(1, pages);
        Self { pages, set }
    }

    /// The counts after which every page was written.
    pub(super) const fn all(self) -> u64 {
        self.pages
    }

    /// The page that a count is written to.
    const fn page(self, count: u64) -> u64 {
        match count <= self.pages {
            true => count,
            false => 1 + (count - 1) % self.set,
        }
    }

    /// The last count, up to `count`, that was written to a page; 0 if there is none.
    const fn last(self, page: u64, count: u64) -> u64 {
        if page <= self.set && count > self.pages {
            let last = count - (count - page) % self.set;
            if last > self.pages {
                return last;
            }
        }
        if count >= page { page } else { 0 }
    }
}

/// Fills a page so that each of its words depends on the count; zeros for a count of 0.
fn fill(count: u64, page: &mut [u8; MAX_ACCESS]) {
    let mut word = count;
    for bytes in page.as_chunks_mut::<8>().0 {
        *bytes = word.to_le_bytes();
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }
}

/// Reads a count from its first page, fills another page by the next count and then writes that to the first,
/// and so on. Any VM that gets its memory can go on. A guest that arrived looks first whether every page is as
/// it was written last.
pub(super) struct Writer {
    turns: Turns,
    told: Arc<Told>,
    mask: SharedMask,
    doing: Doing,
    count: u64,
    page: Box<[u8; MAX_ACCESS]>,
}

#[derive(Clone, Copy)]
enum Doing {
    /// Accepts its pages, from this one on.
    Accepting(u64),
    /// Reads the count, to go on.
    Reading,
    /// Reads the count, to look at its pages.
    Arriving,
    Checking(u64),
    WritingPage,
    WritingHead,
}

impl Writer {
    /// A guest at its start. `accepts` for a TD or an SNP guest, which accepts its pages before their first
    /// use.
    pub(super) fn new(turns: Turns, accepts: bool, told: Arc<Told>) -> Self {
        let doing = match accepts {
            // The first one was measured.
            true => Doing::Accepting(1),
            false => Doing::Reading,
        };
        Self::doing(turns, told, doing)
    }

    /// A guest that came to another VM with its memory alone.
    pub(super) fn arrived(turns: Turns, told: Arc<Told>) -> Self {
        Self::doing(turns, told, Doing::Arriving)
    }

    fn doing(turns: Turns, told: Arc<Told>, doing: Doing) -> Self {
        Self {
            turns,
            told,
            mask: SharedMask::NONE,
            doing,
            count: 0,
            page: Box::new([0; MAX_ACCESS]),
        }
    }

    fn begin(&mut self) -> Action<'_> {
        match self.doing {
            Doing::Accepting(page) => self.accept(page),
            doing => self.read(0, 8, doing),
        }
    }

    fn accept(&mut self, page: u64) -> Action<'_> {
        if page > self.turns.pages {
            return self.read(0, 8, Doing::Reading);
        }
        self.doing = Doing::Accepting(page + 1);
        Action::Accept {
            gpa: Gpa::new(page << 12),
            level: Level::Size4K,
        }
    }

    fn at(&self, page: u64) -> Gpa {
        let gfn = Gfn::new(page);
        self.mask
            .join(gfn, Privacy::Private)
            .unwrap_or(Gpa::new(page << 12))
    }

    fn read(&mut self, page: u64, len: usize, doing: Doing) -> Action<'_> {
        self.doing = doing;
        let gpa = self.at(page);
        Action::Read { gpa, len }
    }

    fn check(&mut self, page: u64) -> Action<'_> {
        match page > self.turns.pages {
            true => self.write_page(),
            false => self.read(page, MAX_ACCESS, Doing::Checking(page)),
        }
    }

    /// Looks whether a page is as it was written last. The last of all may be one ahead of the count: the
    /// guest left between the two writes.
    fn checked(&mut self, page: u64, data: &[u8]) -> Action<'_> {
        let last = self.turns.last(page, self.count);
        let ahead = self.count + 1;
        let candidates = [
            Some(last),
            (self.turns.page(ahead) == page).then_some(ahead),
        ];
        let is_right = candidates.into_iter().flatten().any(|count| {
            fill(count, &mut self.page);
            data == self.page.as_slice()
        });
        match is_right {
            true => self.told.checked.fetch_add(1, Ordering::Relaxed),
            false => self.told.wrong.fetch_add(1, Ordering::Relaxed),
        };
        self.check(page + 1)
    }

    fn write_page(&mut self) -> Action<'_> {
        self.count += 1;
        self.doing = Doing::WritingPage;
        fill(self.count, &mut self.page);
        Action::Write {
            gpa: self.at(self.turns.page(self.count)),
            data: self.page.as_slice(),
        }
    }
}

impl GuestProgram for Writer {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        self.told.first.get_or_init(Instant::now);
        if let Outcome::Start { mask, .. } = last {
            self.mask = mask;
            return self.begin();
        }
        match (self.doing, last) {
            (Doing::Accepting(page), Outcome::Done) if page > 1 => self.accept(page),
            (Doing::Reading, Outcome::Data(bytes)) if bytes.len() == 8 => {
                self.count = bytes.try_into().map_or(0, u64::from_le_bytes);
                self.write_page()
            }
            (Doing::Arriving, Outcome::Data(bytes)) if bytes.len() == 8 => {
                self.count = bytes.try_into().map_or(0, u64::from_le_bytes);
                self.check(1)
            }
            (Doing::Checking(page), Outcome::Data(data)) => self.checked(page, data),
            (Doing::WritingPage, Outcome::Done) => {
                self.doing = Doing::WritingHead;
                let gpa = self.at(0);
                let (count, _) = self.page.split_at(8);
                Action::Write { gpa, data: count }
            }
            (Doing::WritingHead, Outcome::Done) => {
                self.told.count.store(self.count, Ordering::Release);
                self.write_page()
            }
            // The outcome of what another program did on this vCPU.
            (Doing::Arriving, _) => self.begin(),
            // The memory is gone, so the guest cannot continue.
            _ => Action::Shutdown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_last_count_of_a_page_is_the_last_that_was_written_to_it() {
        for (pages, set) in [
            (2, None),
            (9, None),
            (9, Some(1)),
            (9, Some(4)),
            (9, Some(8)),
        ] {
            let turns = Turns::new(pages, set);
            let mut written = BTreeMap::new();
            for count in 0..100 {
                if count > 0 {
                    written.insert(turns.page(count), count);
                }
                for page in 1..pages {
                    let last = written.get(&page).copied().unwrap_or_default();
                    assert_eq!(turns.last(page, count), last, "{turns:?} {page} {count}");
                }
            }
            assert_eq!(written.len() as u64, turns.all());
        }
    }

    /// Runs a guest over plain memory for so many writes.
    fn run(mut guest: Writer, memory: &mut [[u8; MAX_ACCESS]], writes: u64) {
        let mut last = Vec::new();
        let start = Outcome::Start {
            vcpu: kvm_ops::VcpuId(0),
            mask: SharedMask::NONE,
        };
        let mut outcome = start;
        let mut left = writes;
        while left > 0 {
            let read = match guest.step(outcome) {
                Action::Read { gpa, len } => {
                    let page = &memory[(gpa.get() >> 12) as usize];
                    Some(page[..len].to_vec())
                }
                Action::Write { gpa, data } => {
                    memory[(gpa.get() >> 12) as usize][..data.len()].copy_from_slice(data);
                    left -= 1;
                    None
                }
                other => panic!("{other:?}"),
            };
            outcome = match read {
                Some(read) => {
                    last = read;
                    Outcome::Data(&last)
                }
                None => Outcome::Done,
            };
        }
        drop(last);
    }

    #[test]
    fn an_arrived_guest_finds_each_page_that_differs_and_only_those() {
        let turns = Turns::new(9, Some(3));
        for writes in [1, 2, 7, 16, 17, 18, 40, 41] {
            let mut memory = vec![[0; MAX_ACCESS]; 9];
            let told = Arc::<Told>::default();
            run(Writer::new(turns, false, told), &mut memory, writes);
            let arrive = |memory: &mut [[u8; MAX_ACCESS]]| {
                let told = Arc::<Told>::default();
                run(Writer::arrived(turns, Arc::clone(&told)), memory, 1);
                let [checked, wrong] = [&told.checked, &told.wrong];
                [checked, wrong].map(|n| n.load(Ordering::Relaxed))
            };
            assert_eq!(arrive(&mut memory.clone()), [8, 0], "{writes} writes");
            for (page, at) in [(1, 0), (5, 4095), (8, 100)] {
                let mut changed = memory.clone();
                changed[page][at] ^= 1;
                assert_eq!(arrive(&mut changed), [7, 1], "{writes} writes, page {page}");
            }
        }
    }
}
