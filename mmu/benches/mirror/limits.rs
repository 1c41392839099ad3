//! The machine's best for the same number of pages: an array of words, one for each
//! frame, which is what any mapping must write and read at least.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::timing::ns;
use crate::work::{Ring, STEPS};

/// Zeroed pages that are not touched yet.
struct Words(Vec<u64>);

impl Words {
    fn new(frames: u64) -> Self {
        Self(vec![0; frames as usize])
    }

    fn atomic(&mut self) -> &[AtomicU64] {
        let (words, len) = (self.0.as_mut_ptr().cast::<AtomicU64>(), self.0.len());
        // SAFETY: the words are borrowed mutably and have the layout of atomics (x86-64).
        unsafe { std::slice::from_raw_parts(words, len) }
    }
}

#[inline]
fn freeze_and_publish(word: &AtomicU64, value: u64) {
    let taken = word.compare_exchange(0, 5, Ordering::Acquire, Ordering::Relaxed);
    black_box(taken.is_ok());
    word.store(value, Ordering::Release);
}

/// In the order of [`WORK`](crate::work::WORK): lock cmpxchg and a store in order; first touch; lock
/// cmpxchg and a store at random; a load in order; a dependent load at random; a load and a store.
pub fn run(frames: u64, ring: &Ring) -> [f64; 6] {
    let mut fresh = Words::new(frames);
    let array = fresh.atomic();
    let cas = ns(frames, || {
        for (value, word) in (1..).zip(array) {
            freeze_and_publish(word, value);
        }
    })
    .0;
    let load = ns(frames, || {
        black_box(
            array
                .iter()
                .fold(0, |sum, word| sum ^ word.load(Ordering::Acquire)),
        )
    })
    .0;
    let zap = ns(frames, || {
        for word in array {
            black_box(word.load(Ordering::Relaxed));
            word.store(0, Ordering::Relaxed);
        }
    })
    .0;
    drop(fresh);
    let (touch, array) = ns(frames, || {
        let mut array: Vec<u64> = vec![0; frames as usize];
        for (value, word) in (1..).zip(&mut array) {
            *word = value;
        }
        black_box(array)
    });
    drop(array);
    let mut fresh = Words::new(frames);
    let array = fresh.atomic();
    let random = ns(frames, || {
        for (gfn, page) in ring.steps() {
            freeze_and_publish(&array[gfn as usize], page);
        }
    })
    .0;
    let chase = ns(STEPS, || {
        black_box((0..STEPS).fold(0, |gfn, _| array[gfn as usize].load(Ordering::Acquire)))
    })
    .0;
    [cas, touch, random, load, chase, zap]
}
