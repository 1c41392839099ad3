//! The attribute map against one entry for each frame.

use kvm_ops_mmu::{Attributes, Gfn, Privacy};
use proptest::prelude::*;

const FRAMES: u64 = 96;

fn privacy() -> impl Strategy<Value = Privacy> {
    prop_oneof![Just(Privacy::Private), Just(Privacy::Shared)]
}

/// Runs of equal values: first, length, value.
fn runs(plain: &[Privacy], first: u64) -> Vec<(Gfn, u64, Privacy)> {
    let mut runs: Vec<(Gfn, u64, Privacy)> = Vec::new();
    for (at, privacy) in (first..).zip(plain) {
        match runs.last_mut() {
            Some(run) if run.2 == *privacy => run.1 += 1,
            _ => runs.push((Gfn::new(at), 1, *privacy)),
        }
    }
    runs
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_answers_as_one_entry_for_each_frame_would(
        default in privacy(),
        sets in prop::collection::vec((0..FRAMES, 1..FRAMES, privacy()), 0..40),
        queries in prop::collection::vec((0..FRAMES, 1..FRAMES), 1..10),
    ) {
        let mut map = Attributes::new(default);
        let mut plain = vec![default; FRAMES as usize];
        for (first, pages, to) in sets {
            let pages = pages.min(FRAMES - first);
            map.set(Gfn::new(first), pages, to).unwrap();
            plain[first as usize..(first + pages) as usize].fill(to);
            for (gfn, privacy) in (0..).zip(&plain) {
                prop_assert_eq!(map.get(Gfn::new(gfn)), *privacy);
            }
            // Merged: as few runs as can be.
            let others: Vec<_> = runs(&plain, 0).into_iter().filter(|run| run.2 != default).collect();
            let kept: Vec<_> = map.exceptions().collect();
            prop_assert_eq!(kept.len(), others.len());
            for (kept, other) in kept.iter().zip(&others) {
                prop_assert_eq!(*kept, (other.0, other.1));
            }
        }
        for (first, pages) in queries {
            let pages = pages.min(FRAMES - first);
            let part = &plain[first as usize..(first + pages) as usize];
            let found: Vec<_> = map.runs(Gfn::new(first), pages).unwrap().collect();
            prop_assert_eq!(&found, &runs(part, first));
            for privacy in [Privacy::Private, Privacy::Shared] {
                prop_assert_eq!(
                    map.all(Gfn::new(first), pages, privacy).unwrap(),
                    part.iter().all(|p| *p == privacy)
                );
            }
        }
    }
}

#[test]
fn a_td_begins_private_and_ranges_that_do_not_exist_are_refused() {
    let mut map = Attributes::default();
    assert_eq!(map.get(Gfn::new(u64::MAX)), Privacy::Private);
    for (first, pages) in [(0, 0), (1, u64::MAX), (u64::MAX, 1)] {
        assert!(map.set(Gfn::new(first), pages, Privacy::Shared).is_err());
        assert!(map.runs(Gfn::new(first), pages).is_err());
        assert!(map.all(Gfn::new(first), pages, Privacy::Shared).is_err());
    }
    assert_eq!(map.exceptions().count(), 0);
    map.set(Gfn::new(0), u64::MAX, Privacy::Shared).unwrap();
    assert_eq!(map.get(Gfn::new(u64::MAX - 1)), Privacy::Shared);
}
