//! The same work for every peer.

use std::hint::black_box;

use crate::limits;
use crate::peers::{BTree, Cursor, Dash, Fx, Multiarch, Offset, Ours, Peer, Ranges, Sip};
use crate::report::Report;
use crate::timing::{bytes, ns, quartile};

/// The measurements of each peer, in ns for each page.
pub const WORK: [&str; 6] = [
    "map in order",
    "build",
    "map at random",
    "look up in order",
    "look up at random",
    "zap",
];

/// Frames in a random order, as a ring: each is mapped to the next.
pub struct Ring {
    pub order: Vec<u32>,
}

impl Ring {
    pub fn new(frames: u64) -> Self {
        let mut order: Vec<u32> = (0..frames as u32).collect();
        let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
        for i in (1..order.len()).rev() {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            order.swap(i, (seed % (i as u64 + 1)) as usize);
        }
        Self { order }
    }

    pub fn steps(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let next = self.order.iter().cycle().skip(1);
        self.order
            .iter()
            .zip(next)
            .map(|(gfn, page)| (u64::from(*gfn), u64::from(*page)))
    }
}

/// Steps of a dependent lookup.
pub const STEPS: u64 = 1 << 20;

fn run<P: Peer>(frames: u64, ring: &Ring) -> [f64; 6] {
    let mut peer = P::new(frames);
    let map = ns(frames, || peer.map_in_order(frames)).0;
    let get = ns(frames, || black_box(peer.get_in_order(frames))).0;
    let zap = ns(frames, || peer.zap(frames)).0;
    drop(peer);
    let mut peer = P::new(frames);
    let build = ns(frames, || peer.build(frames)).0;
    black_box(peer.get(frames - 1));
    drop(peer);
    let mut peer = P::new(frames);
    let random = ns(frames, || {
        ring.steps().for_each(|(gfn, page)| peer.map(gfn, page))
    })
    .0;
    let chase = ns(STEPS, || {
        black_box((0..STEPS).fold(0, |gfn, _| peer.get(gfn)))
    })
    .0;
    [map, build, random, get, chase, zap]
}

type Run = fn(u64, &Ring) -> [f64; 6];
type Bytes = fn(u64) -> u64;

fn size<P: Peer>(frames: u64) -> u64 {
    bytes(|| {
        let mut peer = P::new(frames);
        peer.map_in_order(frames);
        peer
    })
}

pub const PEERS: [(&str, Run, Bytes); 10] = [
    ("mirror", run::<Ours<false>>, size::<Ours<false>>),
    ("mirror, cursor", run::<Cursor>, size::<Cursor>),
    ("mirror, 5 levels", run::<Ours<true>>, size::<Ours<true>>),
    ("x86_64 OffsetPageTable", run::<Offset>, size::<Offset>),
    ("page_table_multiarch", run::<Multiarch>, size::<Multiarch>),
    ("HashMap, Fx", run::<Fx>, size::<Fx>),
    ("HashMap, Sip", run::<Sip>, size::<Sip>),
    ("DashMap", run::<Dash>, size::<Dash>),
    ("BTreeMap", run::<BTree>, size::<BTree>),
    ("rangemap", run::<Ranges>, size::<Ranges>),
];

/// One row of the report.
pub struct Row {
    pub name: &'static str,
    pub ns: [f64; 6],
    pub kib_per_gib: f64,
}

/// Measures everything for a guest of `gib` GiB. Rounds are interleaved, so that a slow moment of
/// the machine meets all alike.
pub fn measure(report: &mut Report, gib: u64, rounds: usize, only: Option<&str>) {
    let frames = gib << 18;
    let ring = Ring::new(frames);
    let mut times = vec![vec![[0.0; 6]; 0]; PEERS.len()];
    let mut limit = Vec::new();
    for _ in 0..rounds {
        limit.push(limits::run(frames, &ring));
        for (peer, times) in PEERS.iter().zip(&mut times) {
            if only.is_some_and(|only| !peer.0.contains(only)) {
                continue;
            }
            times.push((peer.1)(frames, &ring));
        }
    }
    let low = |runs: &[[f64; 6]], what: usize| {
        let column: Vec<f64> = runs.iter().map(|run| run[what]).collect();
        quartile(&column)
    };
    let mut rows: Vec<Row> = PEERS
        .iter()
        .zip(&times)
        .map(|(peer, runs)| Row {
            name: peer.0,
            ns: core::array::from_fn(|what| low(runs, what)),
            kib_per_gib: (peer.2)(frames) as f64 / 1024.0 / gib as f64,
        })
        .collect();
    rows.push(Row {
        name: "*yardstick: one array*",
        ns: core::array::from_fn(|what| low(&limit, what)),
        kib_per_gib: 2048.0,
    });
    report.work(gib, rounds, rows);
}
