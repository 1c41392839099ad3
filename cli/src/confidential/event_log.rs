//! The event log in a TD's memory (UEFI 2.10, 38.4.1), found as a system without UEFI finds tables: by ACPI's root pointer.

use kvm_ops_attest::event_log::MAX_LOG;
use soft_tdx_module::Platform;

const PAGE: usize = 4096;

/// The root pointer (ACPI 6.5, 5.2.5.3), and a divisor of where it lies: UEFI has no rule, and OVMF's lies behind an older one.
const ROOT: &[u8; 8] = b"RSD PTR ";
const ROOT_LEN: usize = 36;
const ROOT_STEP: usize = 4;
/// The part of it that the first checksum covers, and the revision from which on there is an XSDT.
const OLD_ROOT: usize = 20;
const REVISION: u8 = 2;

/// The header of a table, and the most bytes of one that are read.
const HEADER: usize = 36;
const MAX_TABLE: usize = 64 << 10;

/// CC type of the table CCEL for a TD.
const TDX: u8 = 2;

/// Reads memory at an address; `None` where there is none.
pub(super) type Read<'a> = dyn Fn(u64, &mut [u8]) -> Option<()> + 'a;

/// The log's area in memory, filling included.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) gpa: u64,
    pub(super) bytes: Vec<u8>,
}

/// Reads a TD's private memory as its guest sees it, which only a software platform can.
pub(super) fn private(module: &Platform, td: u64) -> impl Fn(u64, &mut [u8]) -> Option<()> {
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    move |mut gpa, mut data| {
        while !data.is_empty() {
            let leaf = module.sept(td, gpa, 0)?;
            if !leaf.state.is_guest_readable() {
                return None;
            }
            let offset = gpa & ((1 << (12 + 9 * leaf.level)) - 1);
            // Leaves of any size are read in pieces of a page.
            let piece = (PAGE - (gpa as usize & (PAGE - 1))).min(data.len());
            let (now, later) = data.split_at_mut(piece);
            module
                .peek_memory((leaf.entry & ADDRESS) + offset, now)
                .ok()?;
            gpa += piece as u64;
            data = later;
        }
        Some(())
    }
}

/// Looks for the log below an address, from there downwards: firmware keeps its tables at the top of memory.
pub(super) fn find(read: &Read<'_>, end: u64) -> Option<Area> {
    let mut page = [0; PAGE];
    let pages = end.div_ceil(PAGE as u64);
    (0..pages).rev().map(|n| n * PAGE as u64).find_map(|at| {
        read(at, &mut page)?;
        let mut offsets = (0..PAGE).step_by(ROOT_STEP);
        offsets.find_map(|offset| match page[offset..].starts_with(ROOT) {
            true => log(read, at + offset as u64),
            false => None,
        })
    })
}

/// The log that a root pointer leads to.
fn log(read: &Read<'_>, root: u64) -> Option<Area> {
    let mut pointer = [0; ROOT_LEN];
    read(root, &mut pointer)?;
    let is_whole = sum(&pointer[..OLD_ROOT]) == 0 && sum(&pointer) == 0;
    if !is_whole || pointer[15] < REVISION {
        return None;
    }
    let tables = table(read, word(&pointer, 24)?, b"XSDT")?;
    let tables = tables[HEADER..].chunks_exact(8);
    let mut tables = tables.filter_map(|entry| word(entry, 0));
    let ccel = tables.find_map(|at| table(read, at, b"CCEL"))?;
    if *ccel.get(HEADER)? != TDX {
        return None;
    }
    let (len, gpa) = (word(&ccel, 40)?, word(&ccel, 48)?);
    let len = usize::try_from(len).ok().filter(|len| *len <= MAX_LOG)?;
    let mut bytes = vec![0; len];
    gpa.checked_add(len as u64)?;
    read(gpa, &mut bytes)?;
    Some(Area { gpa, bytes })
}

/// A table with that signature, if it is whole.
fn table(read: &Read<'_>, at: u64, signature: &[u8; 4]) -> Option<Vec<u8>> {
    at.checked_add(MAX_TABLE as u64)?;
    let mut header = [0; HEADER];
    read(at, &mut header)?;
    let len = u32::from_le_bytes(header[4..8].try_into().ok()?) as usize;
    if !header.starts_with(signature) || !(HEADER..=MAX_TABLE).contains(&len) {
        return None;
    }
    let mut table = vec![0; len];
    read(at, &mut table)?;
    (sum(&table) == 0).then_some(table)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*word))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u64 = 0x8000;
    const LOG: u64 = 0x2f00;

    /// Makes the bytes from `start` on add up to zero by that one.
    fn seal(memory: &mut [u8], start: usize, len: usize, at: usize) {
        memory[start + at] = 0;
        memory[start + at] = sum(&memory[start..][..len]).wrapping_neg();
    }

    fn put(memory: &mut [u8], at: usize, bytes: &[u8]) {
        memory[at..][..bytes.len()].copy_from_slice(bytes);
    }

    /// A table with a sum, at an address.
    fn put_table(memory: &mut [u8], at: usize, signature: &[u8; 4], rest: &[u8]) {
        let len = HEADER + rest.len();
        put(memory, at, signature);
        put(memory, at + 4, &(len as u32).to_le_bytes());
        put(memory, at + HEADER, rest);
        seal(memory, at, len, 9);
    }

    fn put_root(memory: &mut [u8], at: usize, tables: u64) {
        put(memory, at, ROOT);
        memory[at + 15] = REVISION;
        put(memory, at + 20, &(ROOT_LEN as u32).to_le_bytes());
        put(memory, at + 24, &tables.to_le_bytes());
        seal(memory, at, OLD_ROOT, 8);
        seal(memory, at, ROOT_LEN, 32);
    }

    fn ccel(kind: u8, len: u64, gpa: u64) -> Vec<u8> {
        let mut rest = vec![kind, 0, 0, 0];
        rest.extend(len.to_le_bytes());
        rest.extend(gpa.to_le_bytes());
        rest
    }

    /// Memory with a log of 0x200 bytes over the end of a page, and another table before CCEL.
    fn memory() -> Vec<u8> {
        let mut memory = vec![0; END as usize];
        memory[LOG as usize..][..0x200].fill(7);
        put_root(&mut memory, 0x1234, 0x4000);
        put_table(&mut memory, 0x4100, b"FACP", &[0; 8]);
        put_table(&mut memory, 0x4ff8, b"CCEL", &ccel(TDX, 0x200, LOG));
        let entries = [0x4100_u64, 0x4ff8].map(u64::to_le_bytes);
        put_table(&mut memory, 0x4000, b"XSDT", entries.as_flattened());
        memory
    }

    fn found(memory: &[u8]) -> Option<Area> {
        let read = |gpa: u64, data: &mut [u8]| {
            let from = memory.get(usize::try_from(gpa).ok()?..)?;
            data.copy_from_slice(from.get(..data.len())?);
            Some(())
        };
        find(&read, memory.len() as u64)
    }

    #[test]
    fn the_log_is_found_by_pointer_and_tables() {
        let bytes = vec![7; 0x200];
        assert_eq!(found(&memory()), Some(Area { gpa: LOG, bytes }));
    }

    #[test]
    fn a_pointer_that_leads_nowhere_does_not_hide_the_one_that_leads_to_the_log() {
        let mut memory = memory();
        put_root(&mut memory, 0x1208, 0x4100);
        put_root(&mut memory, 0x7fd0, 0x4100);
        put_root(&mut memory, 0x7000, u64::MAX);
        memory[0x6000..][..8].copy_from_slice(ROOT);
        assert_eq!(found(&memory).map(|area| area.gpa), Some(LOG));
    }

    #[test]
    fn a_changed_byte_of_pointer_or_table_leads_to_no_log() {
        let whole = memory();
        for start in [0x1234, 0x4000, 0x4ff8] {
            for at in start..start + ROOT_LEN {
                let mut memory = whole.clone();
                memory[at] ^= 0x10;
                assert_eq!(found(&memory), None, "{at:#x}");
            }
        }
    }

    #[test]
    fn an_area_outside_of_memory_or_of_another_technology_is_none() {
        for (kind, len, gpa) in [
            (1, 0x200, LOG),
            (TDX, u64::MAX, LOG),
            (TDX, MAX_LOG as u64 + 1, LOG),
            (TDX, 0x200, END - 0x100),
            (TDX, 0x200, u64::MAX - 0x10),
        ] {
            let mut memory = memory();
            put_table(&mut memory, 0x4ff8, b"CCEL", &ccel(kind, len, gpa));
            assert_eq!(found(&memory), None, "{kind} {len:#x} {gpa:#x}");
        }
    }
}
