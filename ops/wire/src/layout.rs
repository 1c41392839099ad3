//! The guest's memory as frames, and sets of frames.

use alloc::vec;
use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Result};

/// The most ranges that a guest's memory may have, as many as KVM has slots for users on x86.
pub const MAX_RANGES: usize = 512;
/// Frames below this only: 52-bit addresses.
const FRAME_LIMIT: u64 = 1 << 40;

/// The memory of a guest: ranges of frames, in order and without overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout(Vec<(u64, u64)>);

impl Layout {
    /// Ranges given as first frame and number of frames, in any order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty, wraps, lies beyond 52-bit addresses or
    /// overlaps another, or for more than 512 ranges.
    pub fn new(ranges: impl IntoIterator<Item = (Gfn, u64)>) -> Result<Self> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for (first, pages) in ranges {
            if all.len() == MAX_RANGES {
                return Err(Error::Invalid(Field::Size, MAX_RANGES as u64 + 1));
            }
            all.push((first.get(), pages));
        }
        all.sort_unstable();
        let mut end = 0;
        for (first, pages) in &all {
            let past = first
                .checked_add(*pages)
                .filter(|past| *past <= FRAME_LIMIT);
            match past {
                Some(past) if *first >= end && *pages > 0 => end = past,
                _ => return Err(Error::Invalid(Field::Gfn, *first)),
            }
        }
        Ok(Self(all))
    }

    /// The ranges in order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = (Gfn, u64)> + '_ {
        self.0
            .iter()
            .map(|(first, pages)| (Gfn::new(*first), *pages))
    }

    /// The number of frames.
    pub fn frames(&self) -> u64 {
        self.0.iter().map(|(_, pages)| pages).sum()
    }

    /// True for a frame of the guest's memory.
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.position(gfn).is_some()
    }

    /// The number of the frame, counted over all ranges.
    fn position(&self, gfn: Gfn) -> Option<u64> {
        let mut before = 0;
        for (first, pages) in &self.0 {
            match gfn.get().checked_sub(*first) {
                Some(offset) if offset < *pages => return Some(before + offset),
                Some(_) => before += pages,
                None => return None,
            }
        }
        None
    }

    /// The frame of that number.
    fn frame(&self, mut position: u64) -> Option<Gfn> {
        for (first, pages) in &self.0 {
            if position < *pages {
                return Some(Gfn::new(first + position));
            }
            position -= pages;
        }
        None
    }
}

/// A set of frames of one guest: a bit for each.
#[derive(Clone, Debug)]
pub struct FrameSet {
    layout: Layout,
    words: Vec<u64>,
    count: u64,
    /// No bit is set in the words before this one.
    low: usize,
}

impl FrameSet {
    /// An empty set.
    pub fn new(layout: &Layout) -> Self {
        let words = layout.frames().div_ceil(64) as usize;
        Self {
            layout: layout.clone(),
            words: vec![0; words],
            count: 0,
            low: words,
        }
    }

    /// The guest's memory.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Adds a frame. Returns `false` for a frame outside of the guest's memory, which is left out.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        let Some(position) = self.layout.position(gfn) else {
            return false;
        };
        let (word, bit) = (position as usize / 64, 1 << (position % 64));
        if self.words[word] & bit == 0 {
            self.words[word] |= bit;
            self.count += 1;
            self.low = self.low.min(word);
        }
        true
    }

    /// Adds every frame.
    pub fn insert_all(&mut self) {
        let frames = self.layout.frames();
        self.words.fill(u64::MAX);
        if let (Some(last), rest @ 1..) = (self.words.last_mut(), frames % 64) {
            *last = (1 << rest) - 1;
        }
        self.count = frames;
        self.low = 0;
    }

    /// Takes a frame out. Returns whether it was in the set.
    pub fn remove(&mut self, gfn: Gfn) -> bool {
        let there = self.contains(gfn);
        if let (true, Some(position)) = (there, self.layout.position(gfn)) {
            self.words[position as usize / 64] &= !(1 << (position % 64));
            self.count -= 1;
        }
        there
    }

    /// Takes the lowest frame out.
    pub fn pop_first(&mut self) -> Option<Gfn> {
        while let Some(word) = self.words.get_mut(self.low) {
            if *word != 0 {
                let bit = word.trailing_zeros();
                *word &= *word - 1;
                self.count -= 1;
                return self.layout.frame(self.low as u64 * 64 + u64::from(bit));
            }
            self.low += 1;
        }
        None
    }

    /// True if the frame is in the set.
    pub fn contains(&self, gfn: Gfn) -> bool {
        let position = self.layout.position(gfn);
        position.is_some_and(|at| self.words[at as usize / 64] & (1 << (at % 64)) != 0)
    }

    /// The number of frames in the set.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// True for an empty set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_set_of_frames_is_a_set(
            ranges in proptest::collection::vec((0..40u64, 1..90u64), 1..4),
            ops in proptest::collection::vec((0..3u8, 0..400u64), 0..200),
        ) {
            let mut at = 0;
            let ranges: Vec<_> = ranges.into_iter().map(|(gap, pages)| {
                let first = at + gap;
                at = first + pages;
                (Gfn::new(first), pages)
            }).collect();
            let layout = Layout::new(ranges.iter().copied().rev()).unwrap();
            let (mut set, mut model) = (FrameSet::new(&layout), BTreeSet::new());
            for (op, gfn) in ops {
                let gfn = Gfn::new(gfn);
                let inside = ranges.iter().any(|(f, n)| gfn >= *f && gfn.get() < f.get() + n);
                prop_assert_eq!(layout.contains(gfn), inside);
                if op == 0 {
                    prop_assert_eq!(set.insert(gfn), inside);
                    if inside { model.insert(gfn); }
                } else if op == 1 {
                    prop_assert_eq!(set.remove(gfn), model.remove(&gfn));
                } else {
                    prop_assert_eq!(set.pop_first(), model.pop_first());
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert_eq!(set.contains(gfn), model.contains(&gfn));
            }
            set.insert_all();
            let all: Vec<_> = core::iter::from_fn(|| set.pop_first()).collect();
            let frames = ranges.iter().flat_map(|(f, n)| (f.get()..f.get() + n).map(Gfn::new));
            prop_assert!(all.into_iter().eq(frames));
        }
    }

    #[test]
    fn ranges_that_overlap_wrap_or_are_empty_are_refused() {
        let layout = |ranges: &[(u64, u64)]| {
            Layout::new(
                ranges
                    .iter()
                    .map(|(first, pages)| (Gfn::new(*first), *pages)),
            )
        };
        assert!(layout(&[(0, 1), (1, 1)]).is_ok());
        for bad in [
            &[(0, 0)][..],
            &[(0, 2), (1, 1)],
            &[(u64::MAX, 2)],
            &[(1 << 40, 1)],
            &[((1 << 40) - 1, 2)],
            &[(5, u64::MAX)],
        ] {
            assert!(layout(bad).is_err(), "{bad:?}");
        }
        let many: Vec<_> = (0..513).map(|i| (i * 2, 1)).collect();
        assert!(layout(&many[..512]).is_ok());
        assert!(layout(&many).is_err());
    }
}
