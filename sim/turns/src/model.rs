//! Every schedule of three threads: `RUSTFLAGS="--cfg loom" cargo test --release -p kvm-ops-turns --lib`.

use super::*;
use loom::sync::atomic::{AtomicU32, Ordering::Relaxed};
use loom::thread;

/// Two words that the platform changes alone, one after the other: in a turn, processors see both as one change left them.
#[derive(Default)]
struct Page {
    turns: Arc<Turns>,
    words: [AtomicU32; 2],
}

impl Page {
    fn look(&self) -> u32 {
        let _turn = self.turns.share();
        let [first, second] = [&self.words[0], &self.words[1]].map(|word| word.load(Relaxed));
        assert_eq!(first, second);
        first
    }

    fn add(&self, turn: Turn) {
        let [first, second] =
            [&self.words[0], &self.words[1]].map(|word| word.fetch_add(1, Relaxed));
        assert_eq!(first, second);
        drop(turn);
    }
}

#[test]
fn the_module_writes_alone_and_everybody_gets_a_turn() {
    loom::model(|| {
        let page = Arc::new(Page::default());
        let other = page.clone();
        let processor = thread::spawn(move || (other.look(), other.look()));
        let other = page.clone();
        let module = thread::spawn(move || other.add(other.turns.take()));
        let seen = page.look();
        let (first, second) = processor.join().unwrap();
        module.join().unwrap();
        assert!(first <= second && second <= 1 && seen <= 1);
        assert_eq!(page.look(), 1);
    });
}

#[test]
fn who_takes_a_turn_only_if_it_is_free_disturbs_nobody() {
    loom::model(|| {
        let page = Arc::new(Page::default());
        let other = page.clone();
        let module = thread::spawn(move || match other.turns.try_take() {
            Some(turn) => {
                other.add(turn);
                1
            }
            None => 0,
        });
        page.add(page.turns.take());
        let seen = page.look();
        let added = module.join().unwrap();
        assert!((1..=1 + added).contains(&seen));
        assert_eq!(page.look(), 1 + added);
    });
}
