//! The guest's page tables: from a linear address to a guest-physical one (SDM vol. 3, chapter 5).

use kvm_ops::{Gpa, Sregs, cr0};

use crate::GuestRam;

const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits 51:12 of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest-physical address of a linear one. `None` where the guest has mapped nothing, or its
/// tables are not in memory.
pub(crate) fn translate(memory: &GuestRam, sregs: &Sregs, linear: u64) -> Option<Gpa> {
    if sregs.cr0 & cr0::PG == 0 {
        return Some(Gpa::new(linear));
    }
    if sregs.cr4 & CR4_PAE == 0 {
        return two_levels(memory, sregs, linear as u32);
    }
    let long = sregs.efer & EFER_LMA != 0;
    let levels = match (long, sregs.cr4 & CR4_LA57 != 0) {
        (false, _) => 3,
        (true, false) => 4,
        (true, true) => 5,
    };
    // The table of PAE's four directory pointers is aligned to 32 bytes, not to a page.
    let mut table = if long {
        sregs.cr3 & ADDRESS
    } else {
        sregs.cr3 & 0xffff_ffe0
    };
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = linear >> shift & if levels == 3 && level == 2 { 3 } else { 511 };
        let entry = u64::from_le_bytes(entry(memory, table + index * 8)?);
        if entry & PRESENT == 0 {
            return None;
        }
        let leaf = level == 0 || (entry & LARGE != 0 && level <= 2 && !(levels == 3 && level == 2));
        if leaf {
            let inside = (1 << shift) - 1;
            return Some(Gpa::new(entry & ADDRESS & !inside | linear & inside));
        }
        table = entry & ADDRESS;
    }
    None
}

/// 32-bit paging: 1024 entries of four bytes a table.
fn two_levels(memory: &GuestRam, sregs: &Sregs, linear: u32) -> Option<Gpa> {
    let read = |table: u32, index: u32| {
        let entry = entry(memory, u64::from(table & !0xfff) + u64::from(index) * 4)?;
        Some(u32::from_le_bytes(entry)).filter(|entry| u64::from(*entry) & PRESENT != 0)
    };
    let directory = read(sregs.cr3 as u32, linear >> 22)?;
    if sregs.cr4 & CR4_PSE != 0 && u64::from(directory) & LARGE != 0 {
        // PSE-36: bits 20:13 are bits 39:32 of the address.
        let high = u64::from(directory >> 13 & 0xff) << 32;
        let low = u64::from(directory & 0xffc0_0000 | linear & 0x3f_ffff);
        return Some(Gpa::new(high | low));
    }
    let page = read(directory, linear >> 12 & 1023)?;
    Some(Gpa::new(u64::from(page & !0xfff | linear & 0xfff)))
}

fn entry<const N: usize>(memory: &GuestRam, at: u64) -> Option<[u8; N]> {
    let mut entry = [0; N];
    memory.read(Gpa::new(at), &mut entry).ok()?;
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 0x1000;

    /// Memory with 8-byte entries at these addresses.
    fn memory(entries: &[(u64, u64)]) -> GuestRam {
        let ram = GuestRam::new(1 << 20, 0, false).unwrap();
        for (at, entry) in entries {
            ram.write(Gpa::new(*at), &entry.to_le_bytes()).unwrap();
        }
        ram
    }

    fn paging(cr4: u64, efer: u64) -> Sregs {
        Sregs {
            cr0: cr0::PG | cr0::PE,
            cr3: ROOT,
            cr4,
            efer,
            ..Sregs::default()
        }
    }

    fn at(memory: &GuestRam, sregs: &Sregs, linear: u64) -> Option<u64> {
        translate(memory, sregs, linear).map(Gpa::get)
    }

    #[test]
    fn without_paging_addresses_are_physical() {
        let sregs = Sregs::default();
        assert_eq!(at(&memory(&[]), &sregs, 0x1234), Some(0x1234));
    }

    #[test]
    fn four_and_five_levels_lead_to_pages_of_each_size() {
        // Entry 1 of each table leads on; entry 2 is a large page, and absent at the root.
        let tables = [
            (ROOT + 8, 0x2000 | PRESENT),
            (0x2000 + 8, 0x3000 | PRESENT),
            (0x2000 + 16, 0x4000_0000 | LARGE | PRESENT),
            (0x3000 + 8, 0x4000 | PRESENT),
            (0x3000 + 16, 0x60_0000 | LARGE | PRESENT),
            (0x4000 + 8, 0x7000 | PRESENT),
        ];
        let memory_of_4 = memory(&tables);
        let long = paging(CR4_PAE, EFER_LMA);
        let base = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;
        assert_eq!(at(&memory_of_4, &long, base | 0x123), Some(0x7123));
        let of_2m = 1 << 39 | 1 << 30 | 2 << 21 | 0x1_2345;
        assert_eq!(at(&memory_of_4, &long, of_2m), Some(0x61_2345));
        let of_1g = 1 << 39 | 2 << 30 | 0x123_4567;
        assert_eq!(at(&memory_of_4, &long, of_1g), Some(0x4123_4567));
        assert_eq!(at(&memory_of_4, &long, 2 << 39), None);

        let mut tables = tables.to_vec();
        tables.push((0x5000 + 8, ROOT | PRESENT));
        let five = Sregs {
            cr3: 0x5000,
            ..paging(CR4_PAE | CR4_LA57, EFER_LMA)
        };
        assert_eq!(at(&memory(&tables), &five, 1 << 48 | base), Some(0x7000));
    }

    #[test]
    fn pae_has_four_directory_pointers() {
        let memory = memory(&[
            (ROOT + 0x20 + 8, 0x2000 | PRESENT),
            (0x2000 + 8, 0x3000 | PRESENT),
            (0x3000 + 8, 0x7000 | PRESENT),
        ]);
        let pae = Sregs {
            cr3: ROOT + 0x20,
            ..paging(CR4_PAE, 0)
        };
        assert_eq!(at(&memory, &pae, 1 << 30 | 1 << 21 | 0x1456), Some(0x7456));
        assert_eq!(at(&memory, &pae, 2 << 30), None);
    }

    #[test]
    fn two_levels_lead_to_4_kib_and_4_mib() {
        let memory = memory(&[
            // Entries 0 and 1 of the directory, then entry 1 of the table.
            (
                ROOT,
                (0x2000 | PRESENT) | (0x40_2000 | LARGE | PRESENT) << 32,
            ),
            (0x2000, (0x7000 | PRESENT) << 32),
        ]);
        assert_eq!(at(&memory, &paging(0, 0), 0x1456), Some(0x7456));
        let large = paging(CR4_PSE, 0);
        // Bit 13 of the entry is bit 32 of the address.
        assert_eq!(at(&memory, &large, 0x40_0042), Some(0x1_0040_0042));
        assert_eq!(at(&memory, &large, 0x80_0000), None);
    }

    #[test]
    fn tables_outside_of_memory_lead_nowhere() {
        let beyond = Sregs {
            cr3: 1 << 40,
            ..paging(CR4_PAE, EFER_LMA)
        };
        assert_eq!(at(&memory(&[]), &beyond, 0), None);
        let last = memory(&[(ROOT, ADDRESS | PRESENT)]);
        assert_eq!(at(&last, &paging(CR4_PAE, EFER_LMA), 0), None);
    }
}
