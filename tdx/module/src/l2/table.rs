//! Tables of L2 VMs' trees: added, removed, merged and split with L1's.

use super::alias::Aliased;
use super::sept::{contents, fill};
use super::{L2Content, L2SeptState, L2Walked, MAX_VMS, NO_PAGE, PAGE_UNUSED};
use crate::call::{Leaf, busy, free_page, lock_target};
use crate::lock::Guard;
use crate::pamt::{Entry, PageRef, PageSize, PageType};
use crate::sept::{self, Table};
use crate::status::{Code, Operand, Status};

/// Operands R9, R10 and R11: a page for each VM's tree.
pub(crate) type Pages = [u64; MAX_VMS];

fn operand(vm: usize) -> Operand {
    const OPERANDS: [Operand; 4] = [Operand::R8, Operand::R9, Operand::R10, Operand::R11];
    OPERANDS[vm & 3]
}

/// Error of a call that names pages for L2 trees; with details, RCX and RDX.
pub(crate) struct Refused {
    pub(crate) status: Status,
    pub(crate) details: Option<(u64, u64)>,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Refused {
            status,
            details: None,
        }
    }
}

fn refused_at(at: &Aliased<'_>, vm: usize, w: &L2Walked<'_>, code: Code) -> Refused {
    let detail = (vm as u32) << 16 | u32::from(w.level);
    Refused {
        status: code.detail(detail),
        details: Some(w.details(vm, at.td.is_debug())),
    }
}

/// The entry of a VM's tree at this level, whether free or not.
fn reach<'p>(at: &Aliased<'p>, vm: usize) -> Result<L2Walked<'p>, Refused> {
    let w = at
        .walk(vm)
        .ok_or(Code::L2_SEPT_WALK_FAILED.detail((vm as u32) << 16))?;
    if w.level == at.level {
        Ok(w)
    } else {
        Err(refused_at(at, vm, &w, Code::L2_SEPT_WALK_FAILED))
    }
}

/// A page about to become a table of a VM's tree.
pub(crate) struct NewTable<'p> {
    pub(crate) vm: usize,
    entry: L2Walked<'p>,
    page: PageRef<'p>,
    pa: u64,
}

impl NewTable<'_> {
    /// Links the page, as a table that `prepare` has filled. Arena slots do not run out before memory does.
    fn link(&self, at: &Aliased<'_>, prepare: impl Fn(&Table)) -> Leaf {
        let full = busy(operand(self.vm));
        let slot = sept::new_table(&at.p.tables, self.pa).ok_or(full)?;
        at.p.tables.get(slot).map(prepare);
        self.entry.set(L2Content::table(slot));
        self.page.entry.set(PageType::Ept, at.td.pa());
        at.td.add_children(1);
        Ok(())
    }

    /// Links the page as an empty table.
    pub(crate) fn add(&self, at: &Aliased<'_>) -> Leaf {
        self.page.entry.set_bepoch(0);
        self.link(at, |_| {})
    }
}

/// TDH.MEM.SEPT.ADD: checks the pages of all VMs in order. What exists already is marked in `shown`, the
/// output registers.
pub(crate) fn check_added<'p>(
    at: &Aliased<'p>,
    pages: Pages,
    allow_existing: bool,
    shown: &mut Pages,
) -> Result<Vec<NewTable<'p>>, Refused> {
    let mut added = Vec::new();
    for (vm, pa) in (1..).zip(pages).filter(|(_, pa)| *pa != NO_PAGE) {
        if vm > at.td.num_l2_vms() {
            return Err(Code::OPERAND_INVALID.on(operand(vm)).into());
        }
        let entry = reach(at, vm)?;
        if entry.content.state() == L2SeptState::Free {
            let page = free_page(at.p, pa, PageSize::Size4K, operand(vm))?;
            added.push(NewTable {
                vm,
                entry,
                page,
                pa,
            });
        } else if allow_existing {
            shown[vm - 1] |= PAGE_UNUSED;
        } else {
            return Err(refused_at(at, vm, &entry, Code::L2_SEPT_ENTRY_NOT_FREE));
        }
    }
    Ok(added)
}

/// TDH.MEM.PAGE.DEMOTE: the pages for the parts of the aliases. With `sparse`, only VMs that have an alias
/// get a table. Pages left over are marked in `shown`.
pub(crate) struct Split<'p> {
    pages: Vec<(usize, PageRef<'p>, u64)>,
}

/// Checks the pages of a demotion in order.
pub(crate) fn check_split<'p>(
    at: &Aliased<'p>,
    pages: Pages,
    sparse: bool,
    shown: &mut Pages,
) -> Leaf<Split<'p>> {
    let mut taken = Vec::new();
    for (vm, pa) in (1..=at.td.num_l2_vms()).zip(pages) {
        let aliased = at.find(vm).is_some();
        if pa == NO_PAGE {
            if aliased {
                return Err(Code::L2_SEPT_PAGE_NOT_PROVIDED.on(operand(vm)));
            }
        } else if aliased || !sparse {
            let pa = pa & !PAGE_UNUSED;
            let page = free_page(at.p, pa, PageSize::Size4K, operand(vm))?;
            taken.push((vm, page, pa));
        } else {
            shown[vm - 1] |= PAGE_UNUSED;
        }
    }
    Ok(Split { pages: taken })
}

impl<'p> Split<'p> {
    /// The entries that the pages go to.
    pub(crate) fn reach(self, at: &Aliased<'p>) -> Result<Vec<NewTable<'p>>, Refused> {
        self.pages
            .into_iter()
            .map(|(vm, page, pa)| {
                Ok(NewTable {
                    vm,
                    entry: reach(at, vm)?,
                    page,
                    pa,
                })
            })
            .collect()
    }
}

impl NewTable<'_> {
    /// Links the page with an alias of each small page, if there was one of the large page.
    pub(crate) fn split(
        &self,
        at: &Aliased<'_>,
        large: u64,
        small: PageSize,
        mapped: bool,
    ) -> Leaf {
        let whole = match mapped {
            true => self.entry.content.unblocked(),
            false => self.entry.content,
        };
        self.link(at, |table| {
            if whole.state().is_leaf() {
                fill(table, |k| whole.with_hpa(large + k * small.bytes()));
            }
        })
    }
}

/// A table of a VM's tree that goes.
pub(crate) struct OldTable<'p> {
    vm: usize,
    entry: L2Walked<'p>,
    pa: u64,
    metadata: &'p Entry,
    _lock: Guard<'p>,
}

fn old_tables<'p>(at: &Aliased<'p>) -> Leaf<Vec<OldTable<'p>>> {
    at.all()
        .map(|(vm, entry)| {
            let slot = entry.content.slot();
            let pa = at.p.tables.get(slot).map_or(0, Table::hpa);
            let (metadata, lock) = lock_target(at.p, pa, PageSize::Size4K)?;
            Ok(OldTable {
                vm,
                entry,
                pa,
                metadata,
                _lock: lock,
            })
        })
        .collect()
}

/// TDH.MEM.SEPT.REMOVE: the tables beside L1's empty one. They are empty too.
pub(crate) fn removed<'p>(at: &Aliased<'p>) -> Leaf<Vec<OldTable<'p>>> {
    old_tables(at)
}

/// TDH.MEM.PAGE.PROMOTE: the tables beside L1's, whose entries must be uniform.
pub(crate) fn merged<'p>(at: &Aliased<'p>) -> Leaf<Vec<OldTable<'p>>> {
    let tables = old_tables(at)?;
    let uniform = |t: &OldTable<'_>| {
        at.p.tables
            .get(t.entry.content.slot())
            .is_some_and(is_uniform)
    };
    if tables.iter().all(uniform) {
        Ok(tables)
    } else {
        Err(Code::EPT_INVALID_PROMOTE_CONDITIONS.on(Operand::RCX))
    }
}

/// All entries free, or all aliases with the same attributes. Their pages are L1's, hence contiguous.
fn is_uniform(table: &Table) -> bool {
    let mut entries = contents(table).map(|c| c.with_hpa(0));
    let Some(first) = entries.next() else {
        return false;
    };
    !first.state().is_table() && entries.all(|c| c == first)
}

impl OldTable<'_> {
    fn release(self, at: &Aliased<'_>, parent: L2Content, shown: &mut Pages) {
        self.entry.set(parent);
        at.p.tables.free(self.entry.content.slot());
        self.metadata.set_nda();
        at.td.remove_children(1);
        shown[self.vm - 1] = self.pa;
    }

    /// Unlinks the table and puts its page into `shown`.
    pub(crate) fn remove(self, at: &Aliased<'_>, shown: &mut Pages) {
        self.release(at, L2Content::FREE, shown);
    }

    /// Puts what the entries have in common in place of the table.
    pub(crate) fn merge(self, at: &Aliased<'_>, shown: &mut Pages) {
        let first =
            at.p.tables
                .get(self.entry.content.slot())
                .and_then(|t| contents(t).next())
                .unwrap_or(L2Content::FREE);
        self.release(at, first, shown);
    }
}
