//! Sets of frames: a bit for each, in words that exist only where a bit was set.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use kvm_ops::Gfn;

#[derive(Debug, Default)]
pub(crate) struct Frames {
    words: BTreeMap<u64, u64>,
    count: u64,
}

const fn place(gfn: Gfn) -> (u64, u64) {
    (gfn.get() / 64, 1 << (gfn.get() % 64))
}

impl Frames {
    pub(crate) fn insert(&mut self, gfn: Gfn) {
        let (at, bit) = place(gfn);
        let word = self.words.entry(at).or_default();
        self.count += u64::from(*word & bit == 0);
        *word |= bit;
    }

    /// Takes a frame out. Returns whether it was in the set.
    pub(crate) fn remove(&mut self, gfn: Gfn) -> bool {
        let (at, bit) = place(gfn);
        let Some(word) = self.words.get_mut(&at).filter(|word| **word & bit != 0) else {
            return false;
        };
        *word &= !bit;
        if *word == 0 {
            self.words.remove(&at);
        }
        self.count -= 1;
        true
    }

    pub(crate) fn contains(&self, gfn: Gfn) -> bool {
        let (at, bit) = place(gfn);
        self.words.get(&at).is_some_and(|word| word & bit != 0)
    }

    /// Takes the lowest frame out.
    pub(crate) fn pop_first(&mut self) -> Option<Gfn> {
        let (at, word) = self.words.first_key_value()?;
        let gfn = Gfn::new(at * 64 + u64::from(word.trailing_zeros()));
        self.remove(gfn).then_some(gfn)
    }

    /// Takes out as many frames, the lowest first.
    pub(crate) fn take_first(&mut self, most: usize) -> Vec<Gfn> {
        let next = core::iter::from_fn(|| self.pop_first());
        next.take(most).collect()
    }

    /// Adds all frames of another set.
    pub(crate) fn append(&mut self, other: Self) {
        if self.is_empty() {
            *self = other;
            return;
        }
        for (at, bits) in other.words {
            let word = self.words.entry(at).or_default();
            self.count += u64::from((bits & !*word).count_ones());
            *word |= bits;
        }
    }

    /// Takes out the frames that another set has not.
    pub(crate) fn take_all_but(&mut self, other: &Self) -> Self {
        let mut taken = Self::default();
        self.words.retain(|at, word| {
            let kept = *word & other.words.get(at).copied().unwrap_or_default();
            let out = *word & !kept;
            if out != 0 {
                taken.words.insert(*at, out);
                taken.count += u64::from(out.count_ones());
            }
            *word = kept;
            kept != 0
        });
        self.count -= taken.count;
        taken
    }

    /// The lowest frame.
    pub(crate) fn first(&self) -> Option<Gfn> {
        let (at, word) = self.words.first_key_value()?;
        Some(Gfn::new(at * 64 + u64::from(word.trailing_zeros())))
    }

    pub(crate) fn len(&self) -> u64 {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn sets_are_joined_and_split(
            own in proptest::collection::btree_set(0..300u64, 0..300),
            other in proptest::collection::btree_set(0..300u64, 0..300),
        ) {
            let set = |frames: &BTreeSet<u64>| {
                let mut set = Frames::default();
                frames.iter().for_each(|gfn| set.insert(Gfn::new(*gfn)));
                set
            };
            let all = |mut set: Frames| {
                let len = set.len();
                let all = set.take_first(usize::MAX);
                assert_eq!(len, all.len() as u64);
                all.into_iter().map(Gfn::get).collect::<BTreeSet<_>>()
            };
            let mut joined = set(&own);
            joined.append(set(&other));
            prop_assert_eq!(all(joined), &own | &other);
            let mut kept = set(&own);
            let taken = kept.take_all_but(&set(&other));
            prop_assert_eq!(all(taken), &own - &other);
            prop_assert_eq!(all(kept), &own & &other);
        }

        #[test]
        fn a_set_of_frames_is_a_set(ops in proptest::collection::vec((0..3u8, 0..300u64), 0..300)) {
            let (mut set, mut model) = (Frames::default(), BTreeSet::new());
            for (op, gfn) in ops {
                let gfn = Gfn::new(gfn);
                match op {
                    0 => {
                        set.insert(gfn);
                        model.insert(gfn);
                    }
                    1 => prop_assert_eq!(set.remove(gfn), model.remove(&gfn)),
                    _ => prop_assert_eq!(set.pop_first(), model.pop_first()),
                }
                prop_assert_eq!(set.contains(gfn), model.contains(&gfn));
                prop_assert_eq!(set.first(), model.first().copied());
                prop_assert_eq!((set.len(), set.is_empty()), (model.len() as u64, model.is_empty()));
            }
            let rest = set.take_first(usize::MAX);
            prop_assert!(rest.into_iter().eq(model));
        }
    }
}
