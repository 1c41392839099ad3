//! Pages that a guest's processor has open, and register state: what the host sees of them, and what it may change.

mod common;

use common::*;
use soft_amd_sp::measure::PageType;
use soft_amd_sp::{
    AccessFault, GuestFrame, GuestPage, GuestTurn, PageSize, Platform, RmpAdjust, RmpUpdate,
    permission,
};

const GCTX: u64 = 0x1000;
const ASID: u32 = 1;
const PAGE: u64 = 0x80_0000;
const OTHER: u64 = 0x80_1000;

/// An SNP guest with two validated pages, at their own addresses.
fn guest() -> Platform {
    let p = snp(1);
    snp_launch(&p, GCTX, SnpPolicy::SMT, ASID);
    snp_finish(&p, GCTX).ok().unwrap();
    for spa in [PAGE, OTHER] {
        p.rmpupdate(spa, &RmpUpdate::guest(ASID, spa)).unwrap();
        let page = mapped(spa);
        assert!(p.pvalidate(&page, PageSize::Size4K, true).unwrap());
    }
    p
}

fn mapped(spa: u64) -> GuestPage {
    GuestPage::new(ASID, spa, spa)
}

fn open(p: &Platform, turn: &GuestTurn, spa: u64) -> Result<GuestFrame, AccessFault> {
    p.guest_frame(turn, &mapped(spa), permission::WRITE)
}

#[test]
fn a_page_that_was_open_is_the_same_to_guest_and_host() {
    let (a, b) = (guest(), guest());
    let contents: [u8; 4096] = std::array::from_fn(|n| (n % 251) as u8);
    for p in [&a, &b] {
        p.guest_write(&mapped(PAGE), &contents).unwrap();
    }
    let turn = a.guest_turn(ASID).unwrap();
    assert!(open(&a, &turn, PAGE).unwrap().is_writable());
    drop(turn);
    let (mut seen, mut expected) = ([0; 4096], [0; 4096]);
    a.host_read(PAGE, &mut seen).unwrap();
    b.host_read(PAGE, &mut expected).unwrap();
    assert_eq!(seen, expected, "the ciphertext");
    a.guest_read(&mapped(PAGE), &mut seen).unwrap();
    assert_eq!(seen, contents);
}

/// An access of somebody to a page.
type Touch = fn(&Platform);

#[test]
fn whoever_touches_a_page_or_its_entry_closes_it_and_only_it() {
    let touches: [(&str, Touch); 6] = [
        ("host read", |p| p.host_read(PAGE, &mut [0; 8]).unwrap()),
        ("guest read", |p| {
            p.guest_read(&mapped(PAGE), &mut [0; 8]).unwrap()
        }),
        ("RMPUPDATE", |p| {
            p.rmpupdate(PAGE, &RmpUpdate::shared()).unwrap()
        }),
        ("PVALIDATE", |p| {
            p.pvalidate(&mapped(PAGE), PageSize::Size4K, false)
                .map(drop)
                .unwrap();
        }),
        ("RMPADJUST", |p| {
            let adjust = RmpAdjust {
                target_vmpl: 1,
                permissions: permission::READ,
                vmsa: false,
            };
            p.rmpadjust(&mapped(PAGE), PageSize::Size4K, &adjust)
                .unwrap();
        }),
        ("a host's write that faults", |p| {
            p.host_write(PAGE, &[0]).unwrap_err();
        }),
    ];
    for (what, touch) in touches {
        let p = guest();
        let (closed, frames) = {
            let turn = p.guest_turn(ASID).unwrap();
            let frames = [PAGE, OTHER].map(|spa| open(&p, &turn, spa).unwrap());
            (turn.closed(), frames)
        };
        touch(&p);
        let turn = p.guest_turn(ASID).unwrap();
        assert_eq!(turn.closed(), closed + 1, "{what}");
        // The other page is open still, in its place.
        let again = open(&p, &turn, OTHER).unwrap();
        assert_eq!(again.bytes(), frames[1].bytes(), "{what}");
    }
}

#[test]
fn a_page_that_is_not_the_guests_or_not_validated_is_not_lent() {
    let p = guest();
    let turn = p.guest_turn(ASID).unwrap();
    assert!(open(&p, &turn, PAGE).is_ok());
    drop(turn);
    p.pvalidate(&mapped(PAGE), PageSize::Size4K, false)
        .map(drop)
        .unwrap();
    p.rmpupdate(OTHER, &RmpUpdate::shared()).unwrap();
    let turn = p.guest_turn(ASID).unwrap();
    assert_eq!(
        open(&p, &turn, PAGE).unwrap_err(),
        AccessFault::NotValidated { gpa: PAGE }
    );
    assert!(matches!(
        open(&p, &turn, OTHER),
        Err(AccessFault::NestedPage { .. })
    ));
    // Another address, another privilege level, another guest.
    let moved = GuestPage::new(ASID, OTHER, PAGE);
    assert!(p.guest_frame(&turn, &moved, permission::READ).is_err());
    let lower = mapped(PAGE).vmpl(1);
    assert!(p.guest_frame(&turn, &lower, permission::READ).is_err());
    let foreign = GuestPage::new(ASID + 1, PAGE, PAGE);
    assert_eq!(
        p.guest_frame(&turn, &foreign, permission::READ)
            .unwrap_err(),
        AccessFault::NotActive(ASID + 1)
    );
}

#[test]
fn a_guest_without_a_key_gets_no_turn() {
    let p = snp(1);
    for asid in [0, ASID, u32::MAX] {
        assert!(matches!(p.guest_turn(asid), Err(AccessFault::NotActive(_))));
    }
}

#[test]
fn no_write_is_lost_beside_threads_that_open_the_page() {
    let p = guest();
    p.guest_write(&mapped(PAGE), &[0; 4096]).unwrap();
    std::thread::scope(|scope| {
        for n in 0..4 {
            let p = &p;
            scope.spawn(move || {
                for round in 0..200 {
                    if n < 2 {
                        let turn = p.guest_turn(ASID).unwrap();
                        open(p, &turn, PAGE).unwrap();
                    } else {
                        let page = GuestPage::new(ASID, PAGE + n, PAGE + n);
                        let mut count = [0];
                        p.guest_read(&page, &mut count).unwrap();
                        assert_eq!(count, [round]);
                        p.guest_write(&page, &[round + 1]).unwrap();
                        p.host_read(PAGE, &mut [0; 64]).unwrap();
                    }
                }
            });
        }
    });
    let mut counts = [0; 4];
    p.guest_read(&mapped(PAGE), &mut counts).unwrap();
    assert_eq!(counts, [0, 0, 200, 200]);
}

#[test]
fn register_state_is_read_and_written_where_the_guest_made_it_and_nowhere_else() {
    let p = snp(1);
    snp_launch(&p, GCTX, SnpPolicy::SMT, ASID);
    snp_add(&p, GCTX, ASID, PAGE, 0xffff_ffff_f000, PageType::Vmsa)
        .ok()
        .unwrap();
    snp_finish(&p, GCTX).ok().unwrap();
    let mut state = p.vmsa_read(ASID, PAGE).unwrap();
    state[0x178] = 0x42;
    p.vmsa_write(ASID, PAGE, &state).unwrap();
    assert_eq!(p.vmsa_read(ASID, PAGE).unwrap(), state);
    let mut seen = [0; 4096];
    p.host_read(PAGE, &mut seen).unwrap();
    assert_ne!(seen[0x170..0x180], state[0x170..0x180]);
    p.host_write(PAGE, &[0]).unwrap_err();
    assert_eq!(
        p.vmsa_read(ASID, OTHER).unwrap_err(),
        AccessFault::NotVmsa(OTHER)
    );
    assert_eq!(
        p.vmsa_read(ASID, PAGE + 8).unwrap_err(),
        AccessFault::NotVmsa(PAGE + 8)
    );
    assert_eq!(
        p.vmsa_read(ASID + 1, PAGE).unwrap_err(),
        AccessFault::NotActive(ASID + 1)
    );
    p.rmpupdate(PAGE, &RmpUpdate::shared()).unwrap();
    assert_eq!(
        p.vmsa_write(ASID, PAGE, &state).unwrap_err(),
        AccessFault::NotVmsa(PAGE)
    );
}
