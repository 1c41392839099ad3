//! The SHA-384 of each page of an image, on all cores.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use kvm_ops_sha384::{Digest, LANES, Page, pages_into};

/// The pages for which a thread is worth its start.
const LEAST: usize = 16 * LANES;

/// The pages that a thread takes at a time.
const PIECE: usize = 4 * LANES;

/// The SHA-384 of each page in order. Equal pages are hashed once: images hold many that are all
/// zeros or all ones.
pub(super) fn digests(pages: &[Page]) -> Vec<Digest> {
    let mut places = BTreeMap::new();
    let mut distinct = Vec::new();
    let place_of: Vec<usize> = pages
        .iter()
        .map(|page| {
            *places.entry(page).or_insert_with(|| {
                distinct.push(page);
                distinct.len() - 1
            })
        })
        .collect();
    let mut digests = vec![[0; 48]; distinct.len()];
    on_threads(&distinct, &mut digests, processors());
    place_of.iter().map(|place| digests[*place]).collect()
}

/// The processors that this process may use. Asking takes reads of several files, so it is done once.
fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// Hashes the pages on at most that many threads, this one included, and on fewer if there are less
/// than [`LEAST`] pages for each. A thread takes a piece at a time, so one that the system starts late,
/// or not at all, leaves its work to the others.
fn on_threads(pages: &[&Page], digests: &mut [Digest], threads: usize) {
    let helpers = (pages.len() / LEAST).min(threads).saturating_sub(1);
    let pieces = Mutex::new(pages.chunks(PIECE).zip(digests.chunks_mut(PIECE)));
    let hash = || {
        // The lock is not held while a piece is hashed.
        let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some((pages, digests)) = next() {
            pages_into(pages, digests);
        }
    };
    thread::scope(|scope| {
        for _ in 0..helpers {
            if thread::Builder::new().spawn_scoped(scope, hash).is_err() {
                break;
            }
        }
        hash();
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::measure::sha384;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Of few contents, so that many pages are equal.
        #[test]
        fn each_page_gets_its_digest_with_any_number_of_threads(
            contents in prop::collection::vec(any::<u8>(), 0..700),
            threads in 0_usize..9,
        ) {
            let pages: Vec<Page> = contents.iter().map(|byte| [byte % 50; 4096]).collect();
            let want: Vec<Digest> = pages.iter().map(|page| sha384(page)).collect();
            prop_assert_eq!(&digests(&pages), &want);
            let each: Vec<&Page> = pages.iter().collect();
            let mut split = vec![[0; 48]; each.len()];
            on_threads(&each, &mut split, threads);
            prop_assert_eq!(&split, &want);
        }
    }
}
