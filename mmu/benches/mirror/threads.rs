//! One and two threads: faults of two vCPUs, each in its half of the guest's memory.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::sync::{Barrier, Mutex, RwLock};
use std::thread;
use std::time::Instant;

use crossbeam_utils::sync::ShardedLock;
use dashmap::DashMap;
use kvm_ops_mmu::{Gfn, Level, Mirror, ReaderLock};
use rustc_hash::FxBuildHasher;

use crate::peers::{Offset, Peer, Quiet, page};
use crate::report::Report;

/// Few, and often: on a busy machine both processors are ours at once for a millisecond or two.
const FRAMES: u64 = 1 << 16;
/// Rounds, the best of which counts.
pub const ROUNDS: usize = 120;

/// A mapping that threads share; `slot` is the thread's number.
trait SharedMap: Sync {
    fn map(&self, slot: usize, gfn: u64);
    fn get(&self, slot: usize, gfn: u64);
}

fn map(mirror: &Mirror, gfn: u64) {
    let done = mirror.map(&Quiet, Gfn::new(gfn), Level::Size4K, || {
        Ok(page(mirror.port(), gfn))
    });
    black_box(done.is_ok());
}

fn get(mirror: &Mirror, gfn: u64) {
    black_box(mirror.lookup(Gfn::new(gfn)));
}

impl SharedMap for Mirror {
    fn map(&self, _: usize, gfn: u64) {
        map(self, gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        get(self, gfn);
    }
}

impl SharedMap for ReaderLock<Mirror> {
    fn map(&self, slot: usize, gfn: u64) {
        map(&self.read(slot, std::hint::spin_loop), gfn);
    }
    fn get(&self, slot: usize, gfn: u64) {
        get(&self.read(slot, std::hint::spin_loop), gfn);
    }
}

impl SharedMap for RwLock<Mirror> {
    fn map(&self, _: usize, gfn: u64) {
        map(&self.read().unwrap(), gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        get(&self.read().unwrap(), gfn);
    }
}

impl SharedMap for ShardedLock<Mirror> {
    fn map(&self, _: usize, gfn: u64) {
        map(&self.read().unwrap(), gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        get(&self.read().unwrap(), gfn);
    }
}

impl SharedMap for Mutex<Offset> {
    fn map(&self, _: usize, gfn: u64) {
        self.lock().unwrap().map(gfn, gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        black_box(self.lock().unwrap().get(gfn));
    }
}

impl SharedMap for Mutex<HashMap<u64, u64, FxBuildHasher>> {
    fn map(&self, _: usize, gfn: u64) {
        self.lock().unwrap().insert(gfn, gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        black_box(self.lock().unwrap().get(&gfn));
    }
}

impl SharedMap for RwLock<BTreeMap<u64, u64>> {
    fn map(&self, _: usize, gfn: u64) {
        self.write().unwrap().insert(gfn, gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        black_box(self.read().unwrap().get(&gfn));
    }
}

impl SharedMap for DashMap<u64, u64> {
    fn map(&self, _: usize, gfn: u64) {
        self.insert(gfn, gfn);
    }
    fn get(&self, _: usize, gfn: u64) {
        black_box(DashMap::get(self, &gfn).map(|page| *page));
    }
}

/// Millions of operations a second, of `threads` threads together, from when the first begins to
/// when the last ends.
fn rate(threads: u64, ops: u64, op: impl Fn(usize, u64) + Sync) -> f64 {
    let barrier = Barrier::new(threads as usize);
    let each = ops / threads;
    let times: Vec<(Instant, Instant)> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|t| {
                let (barrier, op) = (&barrier, &op);
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    (t * each..(t + 1) * each).for_each(|gfn| op(t as usize, gfn));
                    (start, Instant::now())
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    let start = times.iter().map(|t| t.0).min();
    let end = times.iter().map(|t| t.1).max();
    let time = end
        .zip(start)
        .map_or(f64::NAN, |(end, start)| (end - start).as_secs_f64());
    ops as f64 / time / 1e6
}

/// Map with 1 and 2 threads, look up with 1 and 2.
fn run<S: SharedMap>(new: impl Fn() -> S) -> [f64; 4] {
    let mut rates = [0.0; 4];
    for (i, threads) in [1, 2].into_iter().enumerate() {
        let shared = new();
        rates[i] = rate(threads, FRAMES, |slot, gfn| shared.map(slot, gfn));
        rates[2 + i] = rate(threads, FRAMES, |slot, gfn| shared.get(slot, gfn));
    }
    rates
}

fn mirror() -> Mirror {
    crate::peers::mirror(Level::Size512G)
}

type Run = fn() -> [f64; 4];

const SHARED: [(&str, Run); 8] = [
    ("mirror, lock held throughout", || run(mirror)),
    ("mirror, `ReaderLock` for each fault", || {
        run(|| ReaderLock::new(2, mirror()))
    }),
    ("mirror, std `RwLock` for each fault", || {
        run(|| RwLock::new(mirror()))
    }),
    ("mirror, crossbeam `ShardedLock`", || {
        run(|| ShardedLock::new(mirror()))
    }),
    ("DashMap", || run(DashMap::new)),
    ("`Mutex` of HashMap, Fx", || {
        run(|| Mutex::new(HashMap::default()))
    }),
    ("`Mutex` of OffsetPageTable", || {
        run(|| Mutex::new(Offset::new(0)))
    }),
    ("`RwLock` of BTreeMap", || {
        run(|| RwLock::new(BTreeMap::new()))
    }),
];

/// The locks alone: nanoseconds for taking and releasing the reader side, 1 and 2 threads.
fn locks() -> [(&'static str, [f64; 2]); 3] {
    let ours = ReaderLock::new(2, 0u64);
    let std = RwLock::new(0u64);
    let sharded = ShardedLock::new(0u64);
    let pair = |op: &(dyn Fn(usize) + Sync)| {
        [1, 2].map(|threads| {
            let rate = rate(threads, 2 * FRAMES, |slot, _| op(slot));
            threads as f64 * 1e3 / rate
        })
    };
    [
        (
            "`ReaderLock`",
            pair(&|slot| {
                black_box(*ours.read(slot, std::hint::spin_loop));
            }),
        ),
        (
            "std `RwLock`",
            pair(&|_| {
                black_box(*std.read().unwrap());
            }),
        ),
        (
            "crossbeam `ShardedLock`",
            pair(&|_| {
                black_box(*sharded.read().unwrap());
            }),
        ),
    ]
}

/// Measures all, interleaved.
pub fn measure(report: &mut Report) {
    let mut rates = vec![Vec::new(); SHARED.len()];
    let mut lock_times: [(&str, Vec<[f64; 2]>); 3] = locks().map(|(name, _)| (name, Vec::new()));
    for _ in 0..ROUNDS {
        for ((_, run), rates) in SHARED.iter().zip(&mut rates) {
            rates.push(run());
        }
        for ((_, times), (_, pair)) in lock_times.iter_mut().zip(locks()) {
            times.push(pair);
        }
    }
    let rows = SHARED
        .iter()
        .zip(&rates)
        .map(|((name, _), runs)| {
            let high = |i: usize| runs.iter().map(|run| run[i]).fold(0.0, f64::max);
            (*name, [high(0), high(1), high(2), high(3)])
        })
        .collect();
    let locks = lock_times
        .iter()
        .map(|(name, runs)| {
            let low = |i: usize| runs.iter().map(|run| run[i]).fold(f64::INFINITY, f64::min);
            (*name, [low(0), low(1)])
        })
        .collect();
    report.threads(rows, locks);
}
