//! Turns on threads.

use super::*;
use std::sync::atomic::AtomicU32;

#[test]
fn who_is_alone_is_alone_and_each_gets_a_turn() {
    let turns = Arc::<Turns>::default();
    let (inside, together) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for n in 0..5 {
            let (turns, inside, together) = (&turns, &inside, &together);
            scope.spawn(move || {
                for _ in 0..500 {
                    if n > 1 {
                        let turn = turns.share();
                        together.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(inside.load(Ordering::SeqCst), 0);
                        together.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                        continue;
                    }
                    let taken = if n == 0 { turns.try_take() } else { None };
                    let turn = taken.unwrap_or_else(|| turns.take());
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    assert_eq!(together.load(Ordering::SeqCst), 0);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                }
            });
        }
    });
    assert!(turns.try_take().is_some());
}

#[test]
fn processors_have_turns_together_and_nobody_else_has_one_then() {
    let turns = Arc::<Turns>::default();
    let (one, other) = (turns.share(), turns.share());
    assert!(turns.try_take().is_none());
    drop(one);
    assert!(turns.try_take().is_none());
    drop(other);
    let alone = turns.try_take().unwrap();
    assert!(turns.try_take().is_none());
    assert!(alone.is_alone_at(&turns) && !alone.is_alone_at(&Arc::default()));
    drop(alone);
    assert!(turns.try_take().is_some());
}

#[test]
fn who_wants_to_be_alone_comes_before_processors_that_come_later() {
    let turns = Arc::<Turns>::default();
    let order = Mutex::new(Vec::new());
    let first = turns.share();
    std::thread::scope(|scope| {
        let (turns, order) = (&turns, &order);
        scope.spawn(|| {
            let _alone = turns.take();
            order.lock().unwrap().push("alone");
        });
        while turns.lock().next != 2 {
            std::thread::yield_now();
        }
        scope.spawn(|| {
            let _shared = turns.share();
            order.lock().unwrap().push("shared");
        });
        while turns.lock().next != 3 {
            std::thread::yield_now();
        }
        drop(first);
    });
    assert_eq!(*order.lock().unwrap(), ["alone", "shared"]);
}
