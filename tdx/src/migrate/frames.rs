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
