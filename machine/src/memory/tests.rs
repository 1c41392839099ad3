//! Regions of any size and order, as one memory.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn region(page: u64, pages: u64) -> MemoryRegion {
    MemoryRegion::anonymous(Gpa::new(page * PAGE_SIZE), pages * PAGE_SIZE).unwrap()
}

fn refusal(regions: impl IntoIterator<Item = MemoryRegion>) -> String {
    GuestRam::from_regions(regions).unwrap_err().to_string()
}

#[test]
fn regions_without_ram_or_at_one_address_are_refused() {
    assert_eq!(refusal([]), "memory of 0x0 bytes is no memory");
    assert_eq!(
        refusal([region(0, 1).read_only()]),
        "memory of 0x0 bytes is no memory"
    );
    assert_eq!(
        refusal([region(2, 2), region(0, 3)]),
        "a region of memory at 0x2000..0x4000 overlaps the region before it"
    );
}

#[test]
fn a_region_is_whole_pages_at_a_whole_page() {
    let describe = |gpa: u64, host: u64, bytes: u64| {
        // SAFETY: the region is dropped before anything uses it.
        let made =
            unsafe { MemoryRegion::new(Gpa::new(gpa), host as *mut u8, bytes, Arc::new(())) };
        made.map(drop).unwrap_err()
    };
    for (gpa, host, bytes) in [
        (1, 0x1000, 0x1000),
        (0, 0x1001, 0x1000),
        (0, 0x1000, 0),
        (0, 0x1000, 0xfff),
        (0, !0xfff, 0x1000),
        (!0xfff, 0x1000, 0x1000),
    ] {
        let error = describe(gpa, host, bytes);
        assert!(matches!(error, MachineError::Region { .. }), "{error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn a_read_only_region_is_read_by_all_and_written_by_none() {
    let ram = GuestRam::from_regions([region(0, 1), region(1, 1).read_only()]).unwrap();
    let flags: Vec<_> = ram.slots(true).iter().map(|slot| slot.flags).collect();
    assert_eq!([false, true], [flags[0].read_only, flags[1].read_only]);
    assert_eq!([true, false], [flags[0].log_dirty, flags[1].log_dirty]);
    ram.read(Gpa::new(0xfff), &mut [0; 2]).unwrap();
    let error = ram.write(Gpa::new(0xfff), &[1; 2]).unwrap_err();
    assert!(matches!(error, MachineError::Access { .. }), "{error}");
    assert_eq!(ram.size(), PAGE_SIZE);
}

#[test]
fn a_rom_is_added_unless_memory_lies_there() {
    let page = FOUR_GIB / PAGE_SIZE - 1;
    let count = |ram: GuestRam| ram.with_rom(PAGE_SIZE, false).unwrap().regions().count();
    assert_eq!(count(GuestRam::from_regions([region(0, 1)]).unwrap()), 2);
    let with = GuestRam::from_regions([region(0, 1), region(page, 1)]).unwrap();
    assert_eq!(count(with), 2);
    let half = GuestRam::from_regions([region(page, 1)]).unwrap();
    let error = half.with_rom(2 * PAGE_SIZE, false).unwrap_err();
    assert!(matches!(error, MachineError::Overlap { .. }), "{error}");
}

#[test]
fn the_owner_lives_as_long_as_the_memory() {
    let owner = Arc::new(());
    let map = region(0, 1);
    // SAFETY: `map` is dropped last.
    let ours = unsafe { MemoryRegion::new(map.gpa(), map.host_address(), 4096, owner.clone()) };
    let ram = GuestRam::from_regions([ours.unwrap()]).unwrap();
    assert_eq!(Arc::strong_count(&owner), 2);
    drop(ram);
    assert_eq!(Arc::strong_count(&owner), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn memory_is_one_array_with_holes_whatever_its_regions(
        pages in prop::collection::vec(any::<bool>(), 1..12),
        cuts in any::<u16>(),
        at in 0..12 * PAGE_SIZE,
        len in 0..3 * PAGE_SIZE as usize,
    ) {
        // Runs of pages as regions, which are cut in two here and there.
        let mut regions: Vec<(u64, u64)> = Vec::new();
        for (page, _) in (0..).zip(&pages).filter(|(_, there)| **there) {
            match regions.last_mut() {
                Some((first, count)) if *first + *count == page && cuts >> page & 1 == 0 => *count += 1,
                _ => regions.push((page, 1)),
            }
        }
        prop_assume!(!regions.is_empty());
        let ram = GuestRam::from_regions(regions.iter().rev().map(|(first, n)| region(*first, *n))).unwrap();
        prop_assert_eq!(ram.regions().count(), regions.len());

        let is_memory = |gpa: u64| pages.get((gpa / PAGE_SIZE) as usize).copied().unwrap_or(false);
        let whole = (at..at + len as u64).all(is_memory);
        prop_assert_eq!(ram.is_memory(Gpa::new(at), len as u64), whole);
        let data: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
        prop_assert_eq!(ram.write(Gpa::new(at), &data).is_ok(), whole);
        let mut read = vec![0; len];
        prop_assert_eq!(ram.read(Gpa::new(at), &mut read).is_ok(), whole);
        if whole {
            prop_assert_eq!(read, data);
            ram.clear(Gpa::new(at), len as u64).unwrap();
            let mut read = vec![1; len];
            ram.read(Gpa::new(at), &mut read).unwrap();
            prop_assert!(read.iter().all(|byte| *byte == 0));
        }
        let listed: u64 = ram.ram_ranges().map(|(_, bytes)| bytes).sum();
        prop_assert_eq!(listed, pages.iter().filter(|there| **there).count() as u64 * PAGE_SIZE);
        let ranges: Vec<_> = ram.ram_ranges().collect();
        prop_assert!(ranges.windows(2).all(|pair| pair[0].0.get() + pair[0].1 < pair[1].0.get()));
        let low = pages.iter().take_while(|there| **there).count() as u64 * PAGE_SIZE;
        prop_assert_eq!(ram.low_end().get(), low);
    }
}
