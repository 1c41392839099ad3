//! The second-level table: from guest-physical pages to host memory, filled on demand.
//!
//! It works as EPT and nested page tables do: an access that finds no entry, or writes through one
//! that is not writable, is a violation; the VM resolves it from its slots, or it leaves as MMIO.
//! A slot with a dirty log is mapped read-only, in 4 KiB pages, until it is written.

use kvm_ops::{Gfn, Level};

/// Guest-physical addresses have this many bits: four levels of 512 entries.
pub(crate) const GPA_BITS: u32 = 48;

/// Frames below the top of the address space.
pub(crate) const FRAMES: u64 = 1 << (GPA_BITS - 12);

/// The memory behind a 4 KiB page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// The host address of the 4 KiB page.
    pub(crate) host: u64,
    pub(crate) writable: bool,
}

/// Counts of a VM's second-level table.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Accesses that found no usable entry.
    pub violations: u64,
    /// 4 KiB entries that map memory now.
    pub pages_4k: u64,
    /// 2 MiB entries that map memory now.
    pub pages_2m: u64,
    /// Table pages, the root included.
    pub tables: u64,
}

enum Entry {
    Absent,
    Table(Box<Node>),
    Leaf(Mapping),
}

struct Node([Entry; 512]);

impl Node {
    fn new() -> Box<Self> {
        Box::new(Self([const { Entry::Absent }; 512]))
    }
}

pub(crate) struct Table {
    root: Box<Node>,
    pub(crate) stats: TableStats,
}

/// The index of `gfn` in the table whose entries are of that level.
fn index(gfn: Gfn, level: Level) -> usize {
    (gfn.get() / level.frames()) as usize & 511
}

fn below(level: Level) -> Level {
    match level {
        Level::Size512G | Level::Size256T => Level::Size1G,
        Level::Size1G => Level::Size2M,
        Level::Size2M | Level::Size4K => Level::Size4K,
    }
}

impl Default for Table {
    fn default() -> Self {
        Self {
            root: Node::new(),
            stats: TableStats {
                tables: 1,
                ..TableStats::default()
            },
        }
    }
}

impl Table {
    /// Walks to the page. `None` if nothing is mapped.
    pub(crate) fn lookup(&self, gfn: Gfn) -> Option<Mapping> {
        let mut node = &self.root;
        let mut level = Level::Size512G;
        loop {
            match &node.0[index(gfn, level)] {
                Entry::Absent => return None,
                Entry::Table(next) => {
                    node = next;
                    level = below(level);
                }
                Entry::Leaf(leaf) => {
                    let inside = gfn.get() % level.frames() * 4096;
                    return Some(Mapping {
                        host: leaf.host + inside,
                        ..*leaf
                    });
                }
            }
        }
    }

    /// Maps a page of 4 KiB or 2 MiB at `gfn`, aligned to it. A 4 KiB page replaces another 4 KiB
    /// page; a 2 MiB page needs an empty place. Returns `false` if the place is taken.
    pub(crate) fn map(&mut self, gfn: Gfn, page: Level, mapping: Mapping) -> bool {
        let mut node = &mut self.root;
        let mut level = Level::Size512G;
        while level != page {
            let entry = &mut node.0[index(gfn, level)];
            if matches!(entry, Entry::Absent) {
                *entry = Entry::Table(Node::new());
                self.stats.tables += 1;
            }
            match entry {
                Entry::Table(next) => node = next,
                Entry::Leaf(_) | Entry::Absent => return false,
            }
            level = below(level);
        }
        let entry = &mut node.0[index(gfn, level)];
        match (&entry, page) {
            (Entry::Absent, Level::Size2M) => self.stats.pages_2m += 1,
            (Entry::Absent, _) => self.stats.pages_4k += 1,
            (Entry::Leaf(_), Level::Size4K) => {}
            (Entry::Leaf(_) | Entry::Table(_), _) => return false,
        }
        *entry = Entry::Leaf(mapping);
        true
    }

    /// Removes every mapping that touches the `frames` from `first` on, and the tables that are
    /// empty then.
    pub(crate) fn zap(&mut self, first: Gfn, frames: u64) {
        let end = first.get().saturating_add(frames).min(FRAMES);
        zap_node(
            &mut self.root,
            Level::Size512G,
            0,
            first.get(),
            end,
            &mut self.stats,
        );
    }

    /// Makes every 4 KiB page in the range read-only again, for a dirty log that starts anew.
    pub(crate) fn write_protect(&mut self, first: Gfn, frames: u64) {
        let mut gfn = first.get();
        let end = gfn.saturating_add(frames).min(FRAMES);
        while gfn < end {
            match leaf_table(&mut self.root, Gfn::new(gfn)) {
                Some(node) => {
                    if let Entry::Leaf(leaf) = &mut node.0[index(Gfn::new(gfn), Level::Size4K)] {
                        leaf.writable = false;
                    }
                    gfn += 1;
                }
                None => gfn = (gfn / 512 + 1) * 512,
            }
        }
    }
}

/// The table of 4 KiB entries that `gfn` is in.
fn leaf_table(root: &mut Node, gfn: Gfn) -> Option<&mut Node> {
    let mut node = root;
    let mut level = Level::Size512G;
    while level != Level::Size4K {
        match &mut node.0[index(gfn, level)] {
            Entry::Table(next) => node = next,
            Entry::Absent | Entry::Leaf(_) => return None,
        }
        level = below(level);
    }
    Some(node)
}

/// Returns whether the node is empty afterwards.
fn zap_node(
    node: &mut Node,
    level: Level,
    base: u64,
    first: u64,
    end: u64,
    stats: &mut TableStats,
) -> bool {
    let mut empty = true;
    for (i, entry) in node.0.iter_mut().enumerate() {
        let from = base + i as u64 * level.frames();
        let touched = from < end && first < from + level.frames();
        match entry {
            Entry::Absent => continue,
            Entry::Leaf(_) if touched => {
                match level {
                    Level::Size2M => stats.pages_2m -= 1,
                    _ => stats.pages_4k -= 1,
                }
                *entry = Entry::Absent;
            }
            Entry::Table(next) if touched => {
                if zap_node(next, below(level), from, first, end, stats) {
                    stats.tables -= 1;
                    *entry = Entry::Absent;
                } else {
                    empty = false;
                }
            }
            Entry::Leaf(_) | Entry::Table(_) => empty = false,
        }
    }
    empty
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Op {
        Map4K(u64),
        Map2M(u64),
        Zap(u64, u64),
        Protect(u64, u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        // Few frames around table boundaries, so that histories collide.
        let gfn = prop_oneof![
            0..8u64,
            508..516u64,
            (1 << 18) - 4..(1 << 18) + 4u64,
            Just((1 << 36) - 1)
        ];
        let op = prop_oneof![
            gfn.clone().prop_map(Op::Map4K),
            gfn.clone().prop_map(|gfn| Op::Map2M(gfn / 512 * 512)),
            (gfn.clone(), 1..1024u64).prop_map(|(gfn, n)| Op::Zap(gfn, n)),
            (gfn, 1..1024u64).prop_map(|(gfn, n)| Op::Protect(gfn, n)),
        ];
        proptest::collection::vec(op, 0..40)
    }

    /// The same operations on a plain map of frames, with the large pages beside it.
    #[derive(Default)]
    struct Model {
        small: BTreeMap<u64, bool>,
        large: BTreeMap<u64, ()>,
    }

    impl Model {
        fn apply(&mut self, op: &Op) {
            match *op {
                Op::Map4K(gfn) => {
                    if !self.large.contains_key(&(gfn / 512 * 512)) {
                        self.small.insert(gfn, true);
                    }
                }
                Op::Map2M(gfn) => {
                    if self.small.range(gfn..gfn + 512).next().is_none() {
                        self.large.insert(gfn, ());
                    }
                }
                Op::Zap(gfn, n) => {
                    self.small
                        .retain(|&page, _| !(gfn..gfn + n).contains(&page));
                    self.large
                        .retain(|&page, ()| page + 512 <= gfn || gfn + n <= page);
                }
                Op::Protect(gfn, n) => {
                    self.small
                        .range_mut(gfn..gfn + n)
                        .for_each(|(_, writable)| *writable = false);
                }
            }
        }

        fn lookup(&self, gfn: u64) -> Option<Mapping> {
            let large = gfn / 512 * 512;
            if self.large.contains_key(&large) {
                return Some(Mapping {
                    host: host(gfn),
                    writable: true,
                });
            }
            self.small.get(&gfn).map(|&writable| Mapping {
                host: host(gfn),
                writable,
            })
        }
    }

    fn host(gfn: u64) -> u64 {
        0x7000_0000_0000 + gfn * 4096
    }

    proptest! {
        #[test]
        fn any_history_gives_the_mappings_of_a_plain_map_and_keeps_no_empty_table(history in ops()) {
            let (mut table, mut model) = (Table::default(), Model::default());
            for op in &history {
                model.apply(op);
                match *op {
                    Op::Map4K(gfn) => {
                        table.map(Gfn::new(gfn), Level::Size4K, Mapping { host: host(gfn), writable: true });
                    }
                    Op::Map2M(gfn) => {
                        table.map(Gfn::new(gfn), Level::Size2M, Mapping { host: host(gfn), writable: true });
                    }
                    Op::Zap(gfn, n) => table.zap(Gfn::new(gfn), n),
                    Op::Protect(gfn, n) => table.write_protect(Gfn::new(gfn), n),
                }
                prop_assert_eq!(table.stats.pages_4k, model.small.len() as u64);
                prop_assert_eq!(table.stats.pages_2m, model.large.len() as u64);
            }
            for gfn in (0..1100).chain((1 << 18) - 600..(1 << 18) + 600).chain([(1 << 36) - 1]) {
                prop_assert_eq!(table.lookup(Gfn::new(gfn)), model.lookup(gfn), "gfn {:#x}", gfn);
            }
            table.zap(Gfn::new(0), u64::MAX);
            prop_assert_eq!(table.stats, TableStats { tables: 1, ..TableStats::default() });
        }
    }
}
