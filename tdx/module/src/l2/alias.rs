//! Aliases, as the leaves that work on L1's entry change them.

use super::{Attributes, L2Content, L2SeptState, L2Walked, Packed};
use crate::platform::Platform;
use crate::td::Td;

/// L1's entry, locked by the caller.
#[derive(Clone, Copy)]
pub(crate) struct Aliased<'p> {
    pub(crate) p: &'p Platform,
    pub(crate) td: &'p Td,
    pub(crate) gpa: u64,
    pub(crate) level: u8,
}

impl<'p> Aliased<'p> {
    /// A VM's entry of this GPA and level, or where the walk to it ends.
    pub(crate) fn walk(&self, vm: usize) -> Option<L2Walked<'p>> {
        self.td.walk_l2(&self.p.tables, vm, self.gpa, self.level)
    }

    /// The entry in a VM's tree, if it is not free.
    pub(crate) fn find(&self, vm: usize) -> Option<L2Walked<'p>> {
        self.walk(vm)
            .filter(|w| w.level == self.level && w.content.state() != L2SeptState::Free)
    }

    /// The VMs that have an alias (or a table, if L1's entry is a table).
    pub(crate) fn all(self) -> impl Iterator<Item = (usize, L2Walked<'p>)> {
        (1..=self.td.num_l2_vms()).filter_map(move |vm| Some((vm, self.find(vm)?)))
    }

    /// Attributes of all VMs.
    pub(crate) fn attributes(self) -> Packed {
        self.all().fold(Packed::default(), |packed, (vm, w)| {
            packed.with(vm, w.content.attributes())
        })
    }

    pub(crate) fn block(self) {
        self.all().for_each(|(_, w)| w.set(w.content.blocked()));
    }

    pub(crate) fn unblock(self) {
        self.all().for_each(|(_, w)| w.set(w.content.unblocked()));
    }

    /// Takes the page from all VMs.
    pub(crate) fn free(self) {
        self.all().for_each(|(_, w)| w.set(L2Content::FREE));
    }

    /// The page lies elsewhere now; a mapped one can be used again.
    pub(crate) fn relocate(self, hpa: u64, mapped: bool) {
        for (_, w) in self.all() {
            let content = w.content.with_hpa(hpa);
            w.set(if mapped { content.unblocked() } else { content });
        }
    }

    /// Gives an alias other attributes; without permissions it goes.
    pub(crate) fn update(w: &L2Walked<'_>, attributes: Attributes) {
        if attributes.is_present() {
            w.set(w.content.with_attributes(attributes));
        } else {
            w.set(L2Content::FREE);
        }
    }
}
