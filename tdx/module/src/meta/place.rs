//! Finding an element by its identifier, and the identifier after it.

use super::table::{Agent, Field, Key, Table, id, key_of};
use crate::virt;

/// Object that the identifiers describe. A TD with fewer than three L2 VMs lacks the rows of the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Context {
    /// The module and the platform.
    Sys,
    /// A TD.
    Td { l2_vms: u8 },
    /// A vCPU.
    Vcpu { l2_vms: u8 },
}

/// An element of a context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) table: Table,
    /// The L2 VM whose VMCS the table is; 0 for all other tables.
    pub(crate) vm: u8,
    pub(crate) row: usize,
    /// Index of the element in the row.
    pub(crate) element: u32,
}

/// Class of the L2 VMCS of VM 1, and the distance to the next VM's.
const L2_VMCS_CLASS: u8 = 0x24;
const L2_CLASS_STEP: u8 = 8;
const MAX_L2_VMS: u8 = crate::config::MAX_L2_VMS;
/// Rows an L2 VM adds at the end of the tables.
const TD_ROWS_PER_L2: usize = 1;
const VCPU_ROWS_PER_L2: usize = 3;

/// The class of the rows with CPUID values, whose codes name leaf and sub-leaf.
pub(crate) const CPUID_CLASS: u8 = 0x14;

/// An identifier that is all ones asks for the first one; its context does not matter.
pub(crate) fn is_null(id: u64) -> bool {
    id | id::CONTEXT == u64::MAX
}

const fn l2_vmcs_class(vm: u8) -> u8 {
    L2_VMCS_CLASS + L2_CLASS_STEP * (vm - 1)
}

fn vm_of_l2_vmcs(class: u8) -> Option<u8> {
    (1..=MAX_L2_VMS).find(|vm| l2_vmcs_class(*vm) == class)
}

impl Place {
    pub(crate) fn field(&self) -> &'static Field {
        &self.table.rows()[self.row]
    }

    /// Position among the elements of the table.
    pub(crate) fn position(&self) -> usize {
        self.field().first + self.element as usize
    }

    /// Class and code of the row.
    pub(crate) fn row_key(&self) -> Key {
        (self.field().class, self.field().code)
    }

    /// The identifier in the table's spelling.
    pub(crate) fn id(&self) -> u64 {
        let f = self.field();
        let class = match self.table {
            Table::L2Vmcs => u64::from(l2_vmcs_class(self.vm)) << id::CLASS_SHIFT,
            _ => 0,
        };
        let code = if f.class == CPUID_CLASS && self.table == Table::Td {
            u64::from(cpuid_code(self.element))
        } else {
            u64::from(f.code + self.element * self.table.stride())
        };
        f.id & !id::CODE | class | code
    }

    /// Row of the CPUID table and which half of the registers, for CPUID values.
    pub(crate) fn cpuid(&self) -> Option<(usize, usize)> {
        let is_cpuid = self.table == Table::Td && self.field().class == CPUID_CLASS;
        is_cpuid.then_some((self.element as usize / 2, self.element as usize % 2))
    }
}

/// The code of a CPUID value: element, sub-leaf, no sub-leaf, leaf.
fn cpuid_code(element: u32) -> u32 {
    let Some(row) = virt::tables::CPUID.get(element as usize / 2) else {
        return 0;
    };
    let any = row.subleaf == virt::tables::ANY;
    let subleaf = if any { 0x7F } else { row.subleaf & 0x7F } << 1;
    let any = u32::from(any) << 8;
    element & 1 | subleaf | any | (row.leaf & 0x7F) << 9 | row.leaf >> 31 << 16
}

/// The element a CPUID code names.
fn cpuid_element(code: u32) -> Option<u32> {
    if code >> 17 != 0 {
        return None;
    }
    let leaf = code >> 9 & 0x7F | (code >> 16 & 1) << 31;
    let subleaf = match code >> 8 & 1 {
        0 => code >> 1 & 0x7F,
        _ => virt::tables::ANY,
    };
    let row = virt::tables::cpuid_index(leaf, subleaf)?;
    Some((row as u32 * 2) | code & 1)
}

impl Context {
    /// The number identifiers carry in their context bits.
    pub(crate) const fn number(self) -> u64 {
        match self {
            Context::Sys => 0,
            Context::Td { .. } => 1,
            Context::Vcpu { .. } => 2,
        }
    }

    /// The identifier as a leaf of this context takes it.
    pub(crate) const fn adopt(self, id: u64) -> u64 {
        id & !id::CONTEXT | self.number() << id::CONTEXT_SHIFT
    }

    const fn l2_vms(self) -> u8 {
        match self {
            Context::Sys => 0,
            Context::Td { l2_vms } | Context::Vcpu { l2_vms } => l2_vms,
        }
    }

    /// Rows a table has in this context.
    fn rows(self, table: Table) -> usize {
        let all = table.rows().len();
        let absent = usize::from(MAX_L2_VMS.saturating_sub(self.l2_vms()));
        match table {
            Table::Td => all - TD_ROWS_PER_L2 * absent,
            Table::Vcpu => all - VCPU_ROWS_PER_L2 * absent,
            _ => all,
        }
    }

    /// The element of an identifier without reserved bits; `None` if there is none.
    pub(crate) fn find(self, id: u64) -> Option<Place> {
        let (class, code) = key_of(id);
        let (table, vm) = match (self, class) {
            (Context::Sys, _) => (Table::Sys, 0),
            (Context::Td { .. }, _) => (Table::Td, 0),
            (Context::Vcpu { .. }, 0) => (Table::Vmcs, 0),
            (Context::Vcpu { l2_vms }, class) => match vm_of_l2_vmcs(class) {
                Some(vm) if vm > l2_vms => return None,
                Some(vm) => (Table::L2Vmcs, vm),
                None => (Table::Vcpu, 0),
            },
        };
        let (row, element) = match (table, class) {
            (Table::Td, CPUID_CLASS) => {
                let (row, _) = table.find((CPUID_CLASS, 0))?;
                (row, cpuid_element(code)?)
            }
            (Table::L2Vmcs, _) => table.find((0, code))?,
            _ => table.find((class, code))?,
        };
        (row < self.rows(table)).then_some(Place {
            table,
            vm,
            row,
            element,
        })
    }

    /// The first of the rows from `row` on that `mask` gives a bit of, in the order of identifiers.
    fn first_from(
        self,
        (table, vm, row): (Table, u8, usize),
        mask: &impl Fn(&Field) -> u64,
    ) -> Option<Place> {
        let place = |row| Place {
            table,
            vm,
            row,
            element: 0,
        };
        for row in row..self.rows(table) {
            let field = &table.rows()[row];
            match vm_of_l2_vmcs(field.class).filter(|_| table == Table::Vcpu) {
                // This row represents the L2 VM's whole VMCS, after which the table goes on.
                Some(vm) => return self.first_from((Table::L2Vmcs, vm, 0), mask),
                None if mask(field) != 0 => return Some(place(row)),
                None => {}
            }
        }
        match table {
            Table::Vmcs => self.first_from((Table::Vcpu, 0, 0), mask),
            Table::L2Vmcs => {
                let (parent, _) = Table::Vcpu.find((l2_vmcs_class(vm), 0))?;
                self.first_from((Table::Vcpu, 0, parent + 1), mask)
            }
            _ => None,
        }
    }

    /// The first element of the first row that `mask` gives a bit of.
    pub(crate) fn first(self, mask: impl Fn(&Field) -> u64) -> Option<Place> {
        let table = match self {
            Context::Sys => Table::Sys,
            Context::Td { .. } => Table::Td,
            Context::Vcpu { .. } => Table::Vmcs,
        };
        self.first_from((table, 0, 0), &mask)
    }

    /// The first element of the next row that `mask` gives a bit of.
    pub(crate) fn next_row(self, place: &Place, mask: impl Fn(&Field) -> u64) -> Option<Place> {
        self.first_from((place.table, place.vm, place.row + 1), &mask)
    }

    /// The element after another.
    pub(crate) fn next(self, place: &Place, mask: impl Fn(&Field) -> u64) -> Option<Place> {
        let elements = match place.cpuid() {
            Some(_) => 2 * virt::tables::CPUID.len() as u32,
            None => place.field().len(),
        };
        if place.element + 1 < elements {
            return Some(Place {
                element: place.element + 1,
                ..*place
            });
        }
        self.next_row(place, mask)
    }

    /// The identifier a read of `place` under the name `id` returns for the next one.
    ///
    /// Inside a row it is spelled like the one given.
    pub(crate) fn next_id(self, id: u64, place: &Place, agent: Agent) -> u64 {
        let Some(next) = self.next(place, |f| f.read_mask(agent)) else {
            return u64::MAX;
        };
        let same_row = (next.table, next.vm, next.row) == (place.table, place.vm, place.row);
        match (same_row, next.cpuid()) {
            (true, None) => self.adopt(id) + u64::from(place.table.stride()),
            (true, Some((_, 1))) => self.adopt(id) + 1,
            _ => next.id(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXTS: [Context; 6] = [
        Context::Sys,
        Context::Td { l2_vms: 0 },
        Context::Td { l2_vms: 3 },
        Context::Vcpu { l2_vms: 0 },
        Context::Vcpu { l2_vms: 1 },
        Context::Vcpu { l2_vms: 3 },
    ];

    #[test]
    fn every_element_of_the_chain_is_found_under_its_identifier() {
        for context in CONTEXTS {
            let mut place = context.first(|_| 1);
            let mut seen = 0;
            while let Some(p) = place {
                assert_eq!(context.find(p.id()), Some(p), "{context:?} {:#x}", p.id());
                seen += 1;
                place = context.next(&p, |_| 1);
            }
            assert!(seen > 100, "{context:?} has {seen} elements");
        }
    }

    #[test]
    fn the_rows_of_absent_l2_vms_are_not_found() {
        for class in [0x24_u64, 0x25, 0x26] {
            let id = class << id::CLASS_SHIFT;
            assert!(Context::Vcpu { l2_vms: 1 }.find(id).is_some(), "{class:#x}");
            assert_eq!(Context::Vcpu { l2_vms: 0 }.find(id), None);
            let of_vm_2 = (class + 8) << id::CLASS_SHIFT;
            assert_eq!(Context::Vcpu { l2_vms: 1 }.find(of_vm_2), None);
        }
    }

    #[test]
    fn a_null_identifier_is_one_whatever_its_context() {
        for context in 0..8 {
            assert!(is_null(!id::CONTEXT | context << id::CONTEXT_SHIFT));
        }
        assert!(!is_null(u64::MAX >> 1));
    }
}
