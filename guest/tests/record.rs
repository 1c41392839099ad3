//! The record of private pages against a plain set.

use kvm_ops_guest::{GpaRange, Privacy, Record, RecordError};
use proptest::prelude::*;
use std::collections::BTreeSet;

const START: u64 = 0x4000_0000;
const WORDS: usize = 3;

proptest! {
    #[test]
    fn it_answers_as_a_set_of_pages_does(
        steps in prop::collection::vec((any::<bool>(), 0u64..200, 1u64..20), 1..60),
    ) {
        let mut bits = [0; WORDS];
        let mut record = Record::new(&mut bits, START).expect("fits");
        let mut set = BTreeSet::new();
        for (private, first, count) in steps {
            let range = GpaRange::pages(START + first * 0x1000, count).expect("a range");
            let pages: BTreeSet<u64> = (first..first + count).collect();
            let covered = first + count <= 64 * WORDS as u64;
            let before = set.clone();
            let result = if private {
                if covered && set.is_disjoint(&pages) {
                    set.extend(&pages);
                }
                record.claim(range)
            } else {
                if covered && set.is_superset(&pages) {
                    set.retain(|page| !pages.contains(page));
                }
                record.release(range)
            };
            prop_assert_eq!(result.is_ok(), set != before);
            for page in 0..220 {
                let gpa = START + page * 0x1000 + 0x123;
                prop_assert_eq!(record.is_private(gpa), set.contains(&page));
            }
        }
    }
}

#[test]
fn what_it_does_not_cover_is_an_error_and_not_private() {
    let mut bits = [u64::MAX; WORDS];
    let mut record = Record::new(&mut bits, START).expect("fits");
    let end = START + 64 * WORDS as u64 * 0x1000;
    for gpa in [0, START - 0x1000, end, !0xFFF] {
        assert!(!record.is_private(gpa));
        if let Ok(range) = GpaRange::pages(gpa, 1) {
            assert_eq!(record.release(range), Err(RecordError::Outside { gpa }));
        }
    }
    let beyond = GpaRange::pages(end - 0x1000, 2).expect("a range");
    assert_eq!(
        record.release(beyond),
        Err(RecordError::Outside { gpa: end })
    );
    assert!(record.is_private(end - 1), "nothing was noted");
}

#[test]
fn a_record_that_cannot_be_is_refused() {
    assert!(Record::new(&mut [0], 0x800).is_none());
    assert!(Record::new(&mut [0], !0xFFF).is_none());
    assert!(Record::new(&mut [], START).is_some());
    let mut bits = [0];
    let mut one = Record::new(&mut bits, 0).expect("fits");
    let page = GpaRange::pages(0, 1).expect("a range");
    let shared = RecordError::Already {
        gpa: 0,
        is: Privacy::Shared,
    };
    assert_eq!(one.release(page), Err(shared));
}
