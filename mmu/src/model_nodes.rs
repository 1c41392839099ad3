//! Nodes for the model checker, whose atomics are not plain memory.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::node::{Dir, Leaf, Owned};
use crate::{Level, Result};

pub(crate) struct Nodes {
    all: Vec<Owned>,
    free: Vec<Owned>,
}

impl Nodes {
    pub(crate) fn new() -> Self {
        Self {
            all: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(crate) fn take(&mut self, level: Level) -> Result<Owned> {
        let is_leaf = |node: &Owned| matches!(node, Owned::Leaf(_)) == (level == Level::Size2M);
        if let Some(i) = self.free.iter().position(is_leaf) {
            return Ok(self.free.swap_remove(i));
        }
        let node = if level == Level::Size2M {
            Owned::Leaf(Box::leak(Box::new(Leaf::new())).into())
        } else {
            Owned::Dir(Box::leak(Box::new(Dir::new())).into())
        };
        self.all.push(node);
        Ok(node)
    }

    pub(crate) fn free(&mut self, node: Owned) {
        self.free.push(node);
    }

    pub(crate) fn reserved(&self) -> usize {
        0
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in self.all.drain(..) {
            // SAFETY: each came from `Box::leak` and is in `all` once.
            unsafe {
                match node {
                    Owned::Dir(p) => drop(Box::from_raw(p.as_ptr())),
                    Owned::Leaf(p) => drop(Box::from_raw(p.as_ptr())),
                }
            }
        }
    }
}
