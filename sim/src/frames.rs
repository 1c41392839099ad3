//! An allocator of page frames: 4 KiB and 2 MiB, naturally aligned, out of ranges of physical
//! memory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kvm_ops::Level;

/// 4 KiB frames in a chunk of 2 MiB.
const CHUNK: u64 = 512;

/// The free frames of some ranges.
///
/// Frames are counted singly: a 2 MiB page may come back in 4 KiB pieces, as after a demotion, and
/// 4 KiB pages as one of 2 MiB, as after a promotion.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Chunks of which every frame is free.
    whole: BTreeSet<u64>,
    /// Chunks with some frames free and some not.
    partial: BTreeSet<u64>,
    /// The chunks that are not whole.
    used: BTreeMap<u64, Chunk>,
    /// Frames that are given out.
    out: u64,
    /// Frames that were ever given out, each time counted.
    taken: u64,
}

/// One bit for each frame that is not free: given out, or none of the allocator's.
#[derive(Debug)]
struct Chunk {
    taken: [u64; 8],
    /// Those that are none of the allocator's.
    foreign: [u64; 8],
}

impl Chunk {
    const WHOLE: Self = Self {
        taken: [0; 8],
        foreign: [0; 8],
    };

    fn first_free(&self) -> Option<u64> {
        let word = self.taken.iter().position(|w| *w != u64::MAX)?;
        Some(word as u64 * 64 + u64::from(self.taken[word].trailing_ones()))
    }
}

const fn bit(frame: u64) -> (usize, u64) {
    ((frame % CHUNK / 64) as usize, 1 << (frame % 64))
}

impl Frames {
    /// All frames in these ranges of frame numbers.
    pub(crate) fn new(ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut chunks = BTreeMap::<u64, u64>::new();
        let mut frames = Self {
            whole: BTreeSet::new(),
            partial: BTreeSet::new(),
            used: BTreeMap::new(),
            out: 0,
            taken: 0,
        };
        let mut edges = BTreeSet::new();
        for range in ranges {
            for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
                let first = range.start.max(chunk * CHUNK);
                let end = range.end.min((chunk + 1) * CHUNK);
                *chunks.entry(chunk).or_default() += end.saturating_sub(first);
                if end - first != CHUNK {
                    edges.extend(first..end);
                }
            }
        }
        for (chunk, count) in chunks {
            if count >= CHUNK {
                frames.whole.insert(chunk);
                continue;
            }
            let mut foreign = [u64::MAX; 8];
            for frame in edges.range(chunk * CHUNK..(chunk + 1) * CHUNK) {
                let (word, bit) = bit(*frame);
                foreign[word] &= !bit;
            }
            let taken = foreign;
            frames.used.insert(chunk, Chunk { taken, foreign });
            frames.partial.insert(chunk);
        }
        frames
    }

    /// The number of frames that are given out.
    pub(crate) fn out(&self) -> u64 {
        self.out
    }

    /// The number of frames ever given out, each time counted.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes a page out; its first frame. `None` where nothing is left, or for another level than
    /// 4 KiB and 2 MiB.
    pub(crate) fn alloc(&mut self, level: Level) -> Option<u64> {
        let first = self.alloc_page(level)?;
        self.taken += level.frames();
        Some(first)
    }

    fn alloc_page(&mut self, level: Level) -> Option<u64> {
        match level {
            Level::Size4K => self.alloc_4k(),
            Level::Size2M => {
                let chunk = self.whole.pop_first()?;
                let full = Chunk {
                    taken: [u64::MAX; 8],
                    ..Chunk::WHOLE
                };
                self.used.insert(chunk, full);
                self.out += CHUNK;
                Some(chunk * CHUNK)
            }
            _ => None,
        }
    }

    /// From a chunk that is broken already, so that whole ones stay.
    fn alloc_4k(&mut self) -> Option<u64> {
        let chunk = match self.partial.first() {
            Some(chunk) => *chunk,
            None => {
                let chunk = self.whole.pop_first()?;
                self.partial.insert(chunk);
                chunk
            }
        };
        let state = self.used.entry(chunk).or_insert(Chunk::WHOLE);
        let frame = state.first_free()?;
        let (word, bit) = bit(frame);
        state.taken[word] |= bit;
        if state.first_free().is_none() {
            self.partial.remove(&chunk);
        }
        self.out += 1;
        Some(chunk * CHUNK + frame)
    }

    /// Takes a page back. `false`, and nothing changes, unless every frame of it is given out.
    pub(crate) fn free(&mut self, first: u64, level: Level) -> bool {
        let chunk = first / CHUNK;
        let mask = match level {
            Level::Size4K => {
                let (word, bit) = bit(first);
                let mut mask = [0; 8];
                mask[word] = bit;
                mask
            }
            Level::Size2M if first.is_multiple_of(CHUNK) => [u64::MAX; 8],
            _ => return false,
        };
        let Some(state) = self.used.get_mut(&chunk) else {
            return false;
        };
        let words = || mask.iter().enumerate();
        if words().any(|(i, m)| state.taken[i] & !state.foreign[i] & m != *m) {
            return false;
        }
        words().for_each(|(i, m)| state.taken[i] &= !m);
        self.out -= level.frames();
        if state.taken == [0; 8] {
            self.used.remove(&chunk);
            self.partial.remove(&chunk);
            self.whole.insert(chunk);
        } else {
            self.partial.insert(chunk);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Alloc(Level),
        /// The nth page that is out.
        Free(usize),
        /// The nth page that is out, in 4 KiB pieces.
        FreeInPieces(usize),
        /// Any frame, given out or not.
        FreeAny(u64, Level),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let level = prop_oneof![3 => Just(Level::Size4K), 1 => Just(Level::Size2M)];
        let op = prop_oneof![
            6 => level.clone().prop_map(Op::Alloc),
            2 => any::<usize>().prop_map(Op::Free),
            1 => any::<usize>().prop_map(Op::FreeInPieces),
            1 => (500..3200u64, level).prop_map(|(frame, level)| Op::FreeAny(frame, level)),
        ];
        proptest::collection::vec(op, 0..200)
    }

    /// Five chunks, of which two are broken from the start.
    fn ranges() -> [Range<u64>; 3] {
        [512..1024, 1030..1033, 1536..2600]
    }

    /// Takes the frames of a page out of the model; whether all of them were in it.
    fn forget(out: &mut BTreeSet<u64>, first: u64, level: Level) -> bool {
        let page = first..first + level.frames();
        let whole = page.clone().all(|frame| out.contains(&frame));
        if whole && first.is_multiple_of(level.frames()) {
            page.for_each(|frame| assert!(out.remove(&frame)));
            return true;
        }
        false
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pages_are_aligned_lie_in_the_ranges_never_overlap_and_all_come_back(history in ops()) {
            let mut frames = Frames::new(ranges());
            let mut out = BTreeSet::new();
            let mut pages = Vec::new();
            let mut taken = 0;
            for op in history {
                match op {
                    Op::Alloc(level) => {
                        let Some(first) = frames.alloc(level) else {
                            let free = |f: &u64| ranges().iter().any(|r| r.contains(f)) && !out.contains(f);
                            match level {
                                Level::Size4K => prop_assert_eq!((0..3000).filter(free).count(), 0),
                                _ => prop_assert!((0..6).all(|c| !(c * 512..(c + 1) * 512).all(|f| free(&f)))),
                            }
                            continue;
                        };
                        prop_assert_eq!(first % level.frames(), 0);
                        taken += level.frames();
                        for frame in first..first + level.frames() {
                            prop_assert!(ranges().iter().any(|r| r.contains(&frame)));
                            prop_assert!(out.insert(frame), "frame {frame} twice");
                        }
                        pages.push((first, level));
                    }
                    Op::Free(n) if !pages.is_empty() => {
                        let (first, level) = pages.swap_remove(n % pages.len());
                        prop_assert_eq!(frames.free(first, level), forget(&mut out, first, level));
                    }
                    Op::FreeInPieces(n) if !pages.is_empty() => {
                        let (first, level) = pages.swap_remove(n % pages.len());
                        for frame in first..first + level.frames() {
                            prop_assert_eq!(
                                frames.free(frame, Level::Size4K),
                                forget(&mut out, frame, Level::Size4K)
                            );
                        }
                    }
                    Op::FreeAny(frame, level) => {
                        prop_assert_eq!(frames.free(frame, level), forget(&mut out, frame, level));
                    }
                    Op::Free(_) | Op::FreeInPieces(_) => {}
                }
                prop_assert_eq!(frames.out(), out.len() as u64);
            }
            for frame in out {
                prop_assert!(frames.free(frame, Level::Size4K));
            }
            prop_assert_eq!(frames.out(), 0);
            prop_assert_eq!(frames.taken(), taken);
            // Whole again: as many large pages as at the start.
            let large = std::iter::from_fn(|| frames.alloc(Level::Size2M)).count();
            prop_assert_eq!(large, 3);
        }
    }

    #[test]
    fn other_levels_are_not_given_out() {
        let mut frames = Frames::new(std::iter::once(0..1 << 20));
        for level in [Level::Size1G, Level::Size512G, Level::Size256T] {
            assert_eq!(frames.alloc(level), None);
            assert!(!frames.free(0, level));
        }
    }
}
