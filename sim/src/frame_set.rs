//! A set of guest frames, kept as ranges.

use std::collections::BTreeMap;

/// Disjoint ranges of frames that do not touch, by their first frame.
#[derive(Debug, Default)]
pub(crate) struct FrameSet(BTreeMap<u64, u64>);

impl FrameSet {
    pub(crate) fn contains(&self, frame: u64) -> bool {
        let before = self.0.range(..=frame).next_back();
        before.is_some_and(|(_, end)| frame < *end)
    }

    pub(crate) fn insert(&mut self, first: u64, frames: u64) {
        if frames == 0 {
            return;
        }
        let (mut first, mut end) = (first, first.saturating_add(frames));
        while let Some((start, until)) = self.0.range(..=end).next_back() {
            let (start, until) = (*start, *until);
            if until < first {
                break;
            }
            self.0.remove(&start);
            first = first.min(start);
            end = end.max(until);
        }
        self.0.insert(first, end);
    }

    pub(crate) fn remove(&mut self, first: u64, frames: u64) {
        if frames == 0 {
            return;
        }
        let end = first.saturating_add(frames);
        while let Some((start, until)) = self.0.range(..end).next_back() {
            let (start, until) = (*start, *until);
            if until <= first {
                break;
            }
            self.0.remove(&start);
            if start < first {
                self.0.insert(start, first);
            }
            if end < until {
                self.0.insert(end, until);
                // The rest that begins at `end` is not looked at again.
            }
        }
    }
}

#[cfg(test)]
impl FrameSet {
    /// The number of ranges that hold the set.
    pub(crate) fn ranges(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn any_history_gives_the_set_and_the_fewest_ranges(
            history in proptest::collection::vec((any::<bool>(), 0..64u64, 0..20u64), 0..60)
        ) {
            let (mut set, mut model) = (FrameSet::default(), BTreeSet::new());
            for (insert, first, frames) in history {
                if insert {
                    set.insert(first, frames);
                    model.extend(first..first + frames);
                } else {
                    set.remove(first, frames);
                    model.retain(|frame| !(first..first + frames).contains(frame));
                }
                for frame in 0..90 {
                    prop_assert_eq!(set.contains(frame), model.contains(&frame), "frame {}", frame);
                }
                let starts = model.iter().filter(|f| **f == 0 || !model.contains(&(**f - 1)));
                prop_assert_eq!(set.0.len(), starts.count());
            }
        }
    }

    #[test]
    fn a_range_may_reach_the_last_frame() {
        let mut set = FrameSet::default();
        set.insert(5, u64::MAX);
        assert!(set.contains(u64::MAX - 1) && !set.contains(4));
        set.remove(0, u64::MAX);
        assert!(!set.contains(5));
    }
}
