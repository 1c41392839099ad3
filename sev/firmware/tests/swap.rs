//! Pages of an SNP guest that leave memory for a disk and come back.

mod common;

use common::guest::{ASID, GCTX, LARGE, POLICY, finish};
use common::*;
use proptest::prelude::*;
use soft_amd_sp::measure::PageType;
use soft_amd_sp::{
    GuestPage, PageSize, PageState, Platform, RmpAdjust, RmpEntry, RmpUpdate, Status,
};
use std::io::{Read, Seek, SeekFrom, Write};

/// Pages of records, and the page that takes what leaves.
const RECORDS: u64 = 0x60_0000;
const OUT: u64 = 0xa0_0000;

/// A page of the guest.
#[derive(Clone, Copy)]
struct GuestPlace {
    spa: u64,
    gpa: u64,
    kind: SwapType,
    size: PageSize,
}

const fn small(spa: u64, gpa: u64) -> GuestPlace {
    GuestPlace {
        spa,
        gpa,
        kind: SwapType::Data,
        size: PageSize::Size4K,
    }
}

/// Its pages: of data, one that it has not validated, register state, and a large one.
const PAGES: [GuestPlace; 5] = [
    small(0x50_0000, 0x9000),
    small(0x50_1000, 0xa000),
    small(0x50_2000, 0xb000),
    GuestPlace {
        kind: SwapType::Vmsa,
        ..small(0x50_3000, 0xc000)
    },
    GuestPlace {
        size: PageSize::Size2M,
        ..small(LARGE, 0x40_0000)
    },
];
const NOT_VALIDATED: usize = 2;

fn fill(p: &Platform, place: &GuestPlace, byte: u8) {
    p.host_write(place.spa, &vec![byte; place.size.bytes() as usize])
        .unwrap();
}

/// A guest that runs, whose second page VMPL1 may read.
fn guest() -> Platform {
    let p = snp(31);
    snp_launch(&p, GCTX, POLICY, ASID);
    for (place, byte) in PAGES.iter().zip(1..) {
        fill(&p, place, byte);
        if place.spa == PAGES[NOT_VALIDATED].spa {
            p.rmpupdate(place.spa, &RmpUpdate::guest(ASID, place.gpa))
                .unwrap();
            continue;
        }
        let assign = RmpUpdate::pre_guest(ASID, place.gpa).size(place.size);
        p.rmpupdate(place.spa, &assign).unwrap();
        let page_type = match place.kind {
            SwapType::Vmsa => PageType::Vmsa,
            _ => PageType::Normal,
        };
        let mut flags = SnpLaunchUpdateFlags::of(page_type);
        if place.size == PageSize::Size2M {
            flags = flags | SnpLaunchUpdateFlags::PAGE_SIZE_2M;
        }
        let update = SnpLaunchUpdate {
            flags,
            ..snp_update(GCTX, place.spa, page_type)
        };
        run(&p, update).ok().unwrap();
    }
    finish(&p).ok().unwrap();
    let adjust = RmpAdjust {
        target_vmpl: 1,
        permissions: 1,
        vmsa: false,
    };
    let second = GuestPage::new(ASID, PAGES[1].gpa, PAGES[1].spa);
    p.rmpadjust(&second, PageSize::Size4K, &adjust).unwrap();
    records(&p, RECORDS);
    for at in (OUT..OUT + 0x20_0000).step_by(0x1000) {
        p.rmpupdate(at, &RmpUpdate::firmware()).unwrap();
    }
    p
}

/// Makes a page for records.
fn records(p: &Platform, at: u64) {
    p.rmpupdate(at, &RmpUpdate::firmware()).unwrap();
    let page_paddr = common::small(at);
    run(p, SnpPageMdInit { page_paddr }).ok().unwrap();
    assert_eq!(p.rmpread(at).unwrap().state, PageState::Metadata);
}

/// Fixes a page and swaps it out.
fn swap_out(p: &Platform, place: &GuestPlace, record: u64) -> Status {
    let fix = RmpUpdate::pre_guest(ASID, place.gpa).size(place.size);
    p.rmpupdate(place.spa, &fix).unwrap();
    run(p, leaving(place, record))
}

fn leaving(place: &GuestPlace, record: u64) -> SnpPageSwapOut {
    SnpPageSwapOut {
        gctx_paddr: page(GCTX),
        src_paddr: page(place.spa),
        dst_paddr: page(OUT),
        mdata_paddr: record.into(),
        software_data: place.gpa.into(),
        flags: SnpPageSwapFlags::of(place.kind, place.size),
        ..Default::default()
    }
}

fn coming(place: &GuestPlace, from: u64, record: u64) -> SnpPageSwapIn {
    SnpPageSwapIn {
        gctx_paddr: page(GCTX),
        src_paddr: page(from),
        dst_paddr: page(place.spa),
        mdata_paddr: record.into(),
        flags: SnpPageSwapFlags::of(place.kind, place.size),
        ..Default::default()
    }
}

/// Gives a page that firmware has let go to the host, which writes over it.
fn free(p: &Platform, spa: u64, size: PageSize) {
    run(
        p,
        SnpPageReclaim {
            page_paddr: SizedPage::new(spa, size).unwrap(),
        },
    )
    .ok()
    .unwrap();
    p.rmpupdate(spa, &RmpUpdate::shared().size(size)).unwrap();
    p.host_write(spa, &vec![0xee; size.bytes() as usize])
        .unwrap();
}

fn contents(p: &Platform, place: &GuestPlace) -> Vec<u8> {
    let mut bytes = vec![0; place.size.bytes() as usize];
    for (at, part) in (0..).step_by(0x1000).zip(bytes.chunks_mut(0x1000)) {
        let from = GuestPage::new(ASID, place.gpa + at, place.spa + at).mapping(place.size);
        p.guest_read(&from, part).unwrap();
    }
    bytes
}

fn entry(p: &Platform, place: &GuestPlace) -> RmpEntry {
    p.rmpread(place.spa).unwrap()
}

#[test]
fn a_guest_goes_to_disk_and_comes_back_elsewhere_as_it_was() {
    let p = guest();
    let before = PAGES.map(|place| entry(&p, &place));
    let mut disk = tempfile();
    for (place, record) in PAGES.iter().zip((RECORDS..).step_by(64)) {
        swap_out(&p, place, record).ok().unwrap();
        let mut bytes = vec![0; place.size.bytes() as usize];
        p.host_read(OUT, &mut bytes).unwrap();
        disk.write_all(&bytes).unwrap();
        free(&p, place.spa, place.size);
    }
    // The records leave last. Theirs is in the guest's context.
    let of_records = GuestPlace {
        kind: SwapType::Metadata,
        ..small(RECORDS, 0)
    };
    let root = SnpPageSwapFlags::ROOT_MDATA_EN;
    let mut leave = leaving(&of_records, 0);
    leave.flags = leave.flags | root;
    run(&p, leave).ok().unwrap();
    let mut kept = [0; 4096];
    p.host_read(OUT, &mut kept).unwrap();
    free(&p, RECORDS, PageSize::Size4K);

    let moved = RECORDS + 0x1000;
    p.host_write(SCRATCH, &kept).unwrap();
    p.rmpupdate(moved, &RmpUpdate::firmware()).unwrap();
    let there = GuestPlace {
        spa: moved,
        ..of_records
    };
    let mut come = coming(&there, SCRATCH, 0);
    come.flags = come.flags | root;
    run(&p, come).ok().unwrap();
    // Each once.
    assert_eq!(run(&p, come), Status::INVALID_MDATA_ENTRY);

    disk.seek(SeekFrom::Start(0)).unwrap();
    let other = 0xc0_0000;
    for (n, (place, record)) in PAGES.iter().zip((moved..).step_by(64)).enumerate() {
        let mut bytes = vec![0; place.size.bytes() as usize];
        disk.read_exact(&mut bytes).unwrap();
        // Only the firmware can read it.
        assert!(bytes.chunks(16).all(|block| block != [n as u8 + 1; 16]));
        let from = 0x100_0000;
        p.host_write(from, &bytes).unwrap();
        let place = GuestPlace {
            spa: match place.size {
                PageSize::Size4K => other + n as u64 * 0x1000,
                PageSize::Size2M => 0x140_0000,
            },
            ..*place
        };
        let fix = RmpUpdate::pre_guest(ASID, place.gpa).size(place.size);
        p.rmpupdate(place.spa, &fix).unwrap();
        run(&p, coming(&place, from, record)).ok().unwrap();
        assert_eq!(entry(&p, &place), before[n]);
        if n != NOT_VALIDATED {
            assert!(contents(&p, &place).iter().all(|byte| *byte == n as u8 + 1));
        }
    }
}

fn tempfile() -> std::fs::File {
    let path = std::env::temp_dir().join(format!("soft-amd-sp-swap-{}", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true);
    let file = file.open(&path).unwrap();
    // It goes with its descriptor.
    std::fs::remove_file(path).unwrap();
    file
}

/// A guest whose first page is swapped out, and a free place for it.
fn without_its_first_page() -> (Platform, [u8; 4096]) {
    let p = guest();
    swap_out(&p, &PAGES[0], RECORDS).ok().unwrap();
    let mut bytes = [0; 4096];
    p.host_read(OUT, &mut bytes).unwrap();
    (p, bytes)
}

#[test]
fn a_page_that_left_is_not_the_guests_until_it_is_back() {
    let (p, _) = without_its_first_page();
    let at = GuestPage::new(ASID, PAGES[0].gpa, PAGES[0].spa);
    assert!(p.guest_read(&at, &mut [0; 8]).is_err());
    assert_eq!(entry(&p, &PAGES[0]).state, PageState::PreGuest);
    // The host can neither write the record nor take its page without the firmware.
    assert!(p.host_write(RECORDS, &[0; 64]).is_err());
    assert!(p.rmpupdate(RECORDS, &RmpUpdate::shared()).is_err());
    let mut record = [0; 64];
    p.host_read(RECORDS, &mut record).unwrap();
    assert_eq!(record[..8], PAGES[0].gpa.to_le_bytes());
    run(&p, coming(&PAGES[0], OUT, RECORDS)).ok().unwrap();
    assert_eq!(contents(&p, &PAGES[0]), [1; 4096]);
    p.host_read(RECORDS, &mut record).unwrap();
    assert_eq!(record, [0; 64]);
}

#[test]
fn an_older_copy_of_a_page_does_not_come_back() {
    let (p, old) = without_its_first_page();
    run(&p, coming(&PAGES[0], OUT, RECORDS)).ok().unwrap();
    let at = GuestPage::new(ASID, PAGES[0].gpa, PAGES[0].spa);
    p.guest_write(&at, &[9; 8]).unwrap();
    p.host_write(SCRATCH, &old).unwrap();
    let again = coming(&PAGES[0], SCRATCH, RECORDS);
    assert_eq!(run(&p, again), Status::INVALID_MDATA_ENTRY);
    swap_out(&p, &PAGES[0], RECORDS).ok().unwrap();
    assert_eq!(run(&p, again), Status::BAD_MEASUREMENT);
    run(&p, coming(&PAGES[0], OUT, RECORDS)).ok().unwrap();
    assert_eq!(contents(&p, &PAGES[0])[..9], [9, 9, 9, 9, 9, 9, 9, 9, 1]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_page_that_was_changed_does_not_come_back(at in 0..4096usize, bit in 0..8u32) {
        let (p, mut bytes) = without_its_first_page();
        bytes[at] ^= 1 << bit;
        p.host_write(SCRATCH, &bytes).unwrap();
        let come = coming(&PAGES[0], SCRATCH, RECORDS);
        prop_assert_eq!(run(&p, come), Status::BAD_MEASUREMENT);
        // Nothing changed, and the right one is taken.
        prop_assert_eq!(run(&p, coming(&PAGES[0], OUT, RECORDS)), Status::SUCCESS);
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let p = guest();
    let first = PAGES[0];
    let out = leaving(&first, RECORDS);
    assert_eq!(run(&p, out), Status::INVALID_PAGE_STATE);
    let fix = RmpUpdate::pre_guest(ASID, first.gpa);
    p.rmpupdate(first.spa, &fix).unwrap();
    let with = |change: fn(&mut SnpPageSwapOut)| {
        let mut out = out;
        change(&mut out);
        run(&p, out)
    };
    let raw = SnpPageSwapFlags::from_raw;
    type Change = fn(&mut SnpPageSwapOut);
    let refused: [(Change, Status); 10] = [
        (
            |o| o.flags = SnpPageSwapFlags::from_raw(0x10),
            Status::INVALID_PARAM,
        ),
        (
            |o| o.flags = SnpPageSwapFlags::from_raw(3 << 1),
            Status::INVALID_PARAM,
        ),
        (
            |o| o.flags = SnpPageSwapFlags::of(SwapType::Vmsa, PageSize::Size4K),
            Status::INVALID_PARAM,
        ),
        (
            |o| o.flags = SnpPageSwapFlags::of(SwapType::Vmsa, PageSize::Size2M),
            Status::INVALID_PAGE_SIZE,
        ),
        (
            |o| o.flags = SnpPageSwapFlags::of(SwapType::Metadata, PageSize::Size4K),
            Status::INVALID_PAGE_STATE,
        ),
        (
            |o| o.mdata_paddr = (RECORDS + 8).into(),
            Status::INVALID_ADDRESS,
        ),
        (|o| o.mdata_paddr = u64::MAX.into(), Status::INVALID_ADDRESS),
        (
            |o| o.mdata_paddr = SCRATCH.into(),
            Status::INVALID_PAGE_STATE,
        ),
        (|o| o.dst_paddr = page(SCRATCH), Status::INVALID_PAGE_STATE),
        (
            |o| o.src_paddr = page(0x50_1000),
            Status::INVALID_PAGE_STATE,
        ),
    ];
    for (n, (change, status)) in refused.into_iter().enumerate() {
        assert_eq!(with(change), status, "change {n}");
    }
    let itself = SnpPageSwapOut {
        src_paddr: page(RECORDS),
        flags: SnpPageSwapFlags::of(SwapType::Metadata, PageSize::Size4K),
        ..out
    };
    assert_eq!(run(&p, itself), Status::INVALID_MDATA_ENTRY);
    run(&p, out).ok().unwrap();
    // The record is in use.
    assert_eq!(
        swap_out(&p, &PAGES[1], RECORDS),
        Status::INVALID_MDATA_ENTRY
    );

    let come = coming(&first, OUT, RECORDS);
    let refused = [
        (
            SnpPageSwapIn {
                flags: raw(0x10),
                ..come
            },
            Status::INVALID_PARAM,
        ),
        (
            SnpPageSwapIn {
                flags: SnpPageSwapFlags::of(SwapType::Vmsa, PageSize::Size4K),
                ..come
            },
            Status::INVALID_MDATA_ENTRY,
        ),
        (
            SnpPageSwapIn {
                mdata_paddr: (RECORDS + 64).into(),
                ..come
            },
            Status::INVALID_MDATA_ENTRY,
        ),
        // A page of the same guest at another of its addresses, and one that is not prepared.
        (
            SnpPageSwapIn {
                dst_paddr: page(0x50_4000),
                ..come
            },
            Status::INVALID_PAGE_OWNER,
        ),
        (
            SnpPageSwapIn {
                dst_paddr: page(PAGES[2].spa),
                ..come
            },
            Status::INVALID_PAGE_STATE,
        ),
    ];
    let elsewhere = RmpUpdate::pre_guest(ASID, 0xd000);
    p.rmpupdate(0x50_4000, &elsewhere).unwrap();
    for (n, (come, status)) in refused.into_iter().enumerate() {
        assert_eq!(run(&p, come), status, "arrival {n}");
    }
    run(&p, come).ok().unwrap();
}

#[test]
fn a_page_of_another_guest_does_not_come_in() {
    let (p, _) = without_its_first_page();
    let (other, asid) = (0x2000, 2);
    snp_launch(&p, other, POLICY, asid);
    snp_finish(&p, other).ok().unwrap();
    let spa = 0x50_5000;
    p.rmpupdate(spa, &RmpUpdate::pre_guest(asid, PAGES[0].gpa))
        .unwrap();
    let mut come = coming(&PAGES[0], OUT, RECORDS);
    come.gctx_paddr = page(other);
    come.dst_paddr = page(spa);
    // It has no swap key yet, and then another.
    assert_eq!(run(&p, come), Status::INVALID_MDATA_ENTRY);
    let second = 0x50_6000;
    p.rmpupdate(second, &RmpUpdate::pre_guest(asid, 0xe000))
        .unwrap();
    let out = SnpPageSwapOut {
        gctx_paddr: page(other),
        src_paddr: page(second),
        dst_paddr: page(OUT + 0x1000),
        mdata_paddr: (RECORDS + 64).into(),
        ..Default::default()
    };
    run(&p, out).ok().unwrap();
    assert_eq!(run(&p, come), Status::BAD_MEASUREMENT);
}

#[test]
fn a_policy_can_forbid_it() {
    let features = soft_amd_sp::Features {
        page_swap_disable: true,
        ..Default::default()
    };
    let p = snp_from(builder(33).features(features));
    snp_launch(&p, GCTX, POLICY | SnpPolicy::PAGE_SWAP_DISABLE, ASID);
    finish(&p).ok().unwrap();
    records(&p, RECORDS);
    let out = leaving(&PAGES[0], RECORDS);
    assert_eq!(run(&p, out), Status::POLICY_FAILURE);
}
