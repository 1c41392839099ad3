//! The lock protocol under every interleaving.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --lib lock`

use super::{AtomicU64, EntryWord, LockMode, Ordering, Sharex, Side};
use loom::sync::Arc;
use loom::thread;

/// Two words an exclusive holder changes together and everyone else must see equal.
#[derive(Default)]
struct Protected {
    lock: Sharex,
    a: AtomicU64,
    b: AtomicU64,
    exclusive: AtomicU64,
}

impl Protected {
    fn write(&self, side: Side) {
        if self.lock.try_lock(LockMode::Exclusive, side) {
            assert_eq!(self.exclusive.fetch_add(1, Ordering::Relaxed), 0, "alone");
            self.a
                .store(1 + self.a.load(Ordering::Relaxed), Ordering::Relaxed);
            self.b
                .store(1 + self.b.load(Ordering::Relaxed), Ordering::Relaxed);
            self.exclusive.fetch_sub(1, Ordering::Relaxed);
            self.lock.unlock(LockMode::Exclusive);
        }
    }

    fn read(&self) {
        if self.lock.try_lock(LockMode::Shared, Side::Host) {
            assert_eq!(self.exclusive.load(Ordering::Relaxed), 0);
            let a = self.a.load(Ordering::Relaxed);
            assert_eq!(
                a,
                self.b.load(Ordering::Relaxed),
                "no half-made change is seen"
            );
            self.lock.unlock(LockMode::Shared);
        }
    }
}

#[test]
fn exclusive_holders_are_alone_and_what_they_wrote_is_seen_whole() {
    loom::model(|| {
        let p = Arc::new(Protected::default());
        let threads: Vec<_> = [Side::Host, Side::Guest]
            .map(|side| {
                let p = p.clone();
                thread::spawn(move || p.write(side))
            })
            .into();
        p.read();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(p.a.load(Ordering::Relaxed), p.b.load(Ordering::Relaxed));
    });
}

#[test]
fn of_two_sharers_that_promote_at_most_one_succeeds() {
    loom::model(|| {
        let lock = Arc::new(Sharex::default());
        let promote = |lock: &Sharex| {
            if !lock.try_lock(LockMode::Shared, Side::Host) {
                return false;
            }
            let promoted = lock.try_promote();
            // Kept if exclusive, so that the other cannot have it later.
            if !promoted {
                lock.unlock(LockMode::Shared);
            }
            promoted
        };
        let other = {
            let lock = lock.clone();
            thread::spawn(move || promote(&lock))
        };
        let (mine, theirs) = (promote(&lock), other.join().unwrap());
        assert!(!(mine && theirs));
        assert_eq!(
            lock.try_lock(LockMode::Shared, Side::Host),
            !mine && !theirs
        );
    });
}

#[test]
fn a_host_that_failed_leaves_its_mark_and_one_that_succeeded_leaves_none() {
    loom::model(|| {
        let word = Arc::new(EntryWord::default());
        let guest = {
            let word = word.clone();
            thread::spawn(move || {
                if word.try_lock(Side::Guest) {
                    word.unlock();
                }
            })
        };
        let got = word.try_lock(Side::Host);
        if got {
            word.unlock();
        }
        guest.join().unwrap();
        assert_eq!(word.is_free_but_marked(), !got);
        assert_eq!(word.try_lock(Side::Guest), got, "a mark keeps guests out");
    });
}

#[test]
fn the_payload_survives_failing_attempts_of_others() {
    loom::model(|| {
        let lock = Arc::new(Sharex::with_payload(1));
        let other = {
            let lock = lock.clone();
            thread::spawn(move || {
                if lock.try_lock(LockMode::Shared, Side::Host) {
                    let seen = lock.payload();
                    assert!(seen == 1 || seen == 2);
                    lock.unlock(LockMode::Shared);
                }
            })
        };
        if lock.try_lock(LockMode::Exclusive, Side::Host) {
            lock.set_payload(2);
            lock.unlock(LockMode::Exclusive);
            assert_eq!(lock.payload(), 2);
        }
        other.join().unwrap();
        assert!(
            lock.try_lock(LockMode::Exclusive, Side::Host),
            "everything was given back"
        );
    });
}

/// TDH.MEM.PAGE.PROMOTE frees a table while a guest, without the tree lock, walks into it. The walker locks
/// the entry, then looks whether the parent still points to the table.
#[test]
fn a_walker_never_changes_an_entry_of_a_table_that_was_freed() {
    const TABLE: u64 = 6 << 2;
    const LEAF: u64 = 4 << 2;
    const PENDING: u64 = 2 << 2;
    const REUSED: u64 = 9 << 12;
    loom::model(|| {
        let parent = Arc::new(EntryWord::default());
        let child = Arc::new(EntryWord::default());
        parent.store(TABLE);
        child.store(PENDING);
        let promoter = {
            let (parent, child) = (parent.clone(), child.clone());
            thread::spawn(move || {
                if !child.try_lock(Side::Host) {
                    return;
                }
                parent.store(LEAF);
                child.unlock();
                // The slot is reset and taken by another TD.
                child.reset();
                child.store(REUSED);
            })
        };
        if parent.load() == TABLE && child.try_lock(Side::Guest) {
            if parent.load() == TABLE {
                assert_eq!(child.load(), PENDING);
                child.store(LEAF);
            }
            child.unlock();
        }
        promoter.join().unwrap();
        if parent.load() == LEAF {
            assert_eq!(child.load(), REUSED, "the new owner's entry is untouched");
        }
    });
}
