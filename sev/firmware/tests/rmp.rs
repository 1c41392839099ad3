//! RMP instructions and what they protect.

mod common;

use common::*;
use soft_amd_sp::{
    AccessFault, GuestPage, GuestRmpError, PageSize, PageState, Platform, RmpAdjust, RmpError,
    RmpUpdate, Status, permission,
};

const GCTX: u64 = 0x1000;
const ASID: u32 = 1;
const LARGE: u64 = 0x80_0000;

/// An SNP guest that runs.
fn guest(p: &Platform) {
    snp_launch(p, GCTX, SnpPolicy::SMT, ASID);
    snp_finish(p, GCTX).ok().unwrap();
}

fn state(p: &Platform, spa: u64) -> PageState {
    p.rmpread(spa).unwrap().state
}

/// Brings a page into a state with the operations that lead there.
fn reach(p: &Platform, spa: u64, wanted: PageState) {
    let page = GuestPage::new(ASID, spa, spa);
    match wanted {
        PageState::Hypervisor => {}
        PageState::Firmware => p.rmpupdate(spa, &RmpUpdate::firmware()).unwrap(),
        PageState::Reclaim => {
            reach(p, spa, PageState::Firmware);
            reclaim(p, spa).ok().unwrap();
        }
        PageState::Context => {
            reach(p, spa, PageState::Firmware);
            let gctx_paddr = common::page(spa);
            run(p, SnpGctxCreate { gctx_paddr }).ok().unwrap();
        }
        PageState::PreGuest => p.rmpupdate(spa, &RmpUpdate::pre_guest(ASID, spa)).unwrap(),
        PageState::GuestInvalid => p.rmpupdate(spa, &RmpUpdate::guest(ASID, spa)).unwrap(),
        PageState::GuestValid => {
            reach(p, spa, PageState::GuestInvalid);
            assert!(p.pvalidate(&page, PageSize::Size4K, true).unwrap());
        }
        PageState::PreSwap => {
            reach(p, spa, PageState::GuestValid);
            p.rmpupdate(spa, &RmpUpdate::pre_guest(ASID, spa)).unwrap();
        }
        PageState::HvFixed => {
            let mut list = [0; 24];
            list[0] = 1;
            list[8..16].copy_from_slice(&spa.to_le_bytes());
            list[16] = 1;
            p.host_write(SCRATCH, &list).unwrap();
            let fix = SnpPageSetState {
                list_paddr: SCRATCH.into(),
                ..Default::default()
            };
            run(p, fix).ok().unwrap();
        }
        PageState::Metadata => unreachable!("swap records are not modelled"),
    }
    assert_eq!(state(p, spa), wanted);
}

fn reachable() -> impl Iterator<Item = PageState> {
    PageState::ALL
        .into_iter()
        .filter(|s| *s != PageState::Metadata)
}

#[test]
fn rmpupdate_from_every_state_to_every_state() {
    const OWN: u64 = u64::MAX;
    let p = snp(1);
    guest(&p);
    let mut spa = 0x50_0000;
    for from in reachable() {
        for (update, to) in [
            (RmpUpdate::shared(), PageState::Hypervisor),
            (RmpUpdate::firmware(), PageState::Firmware),
            (
                RmpUpdate {
                    immutable: false,
                    ..RmpUpdate::firmware()
                },
                PageState::Reclaim,
            ),
            (RmpUpdate::guest(ASID, 0x1000), PageState::GuestInvalid),
            (RmpUpdate::guest(ASID + 1, 0x1000), PageState::GuestInvalid),
            (RmpUpdate::pre_guest(ASID, 0x1000), PageState::PreGuest),
            // The page's own guest address: fixing an accepted page keeps the acceptance.
            (RmpUpdate::pre_guest(ASID, OWN), PageState::PreSwap),
        ] {
            spa += 0x1000;
            let own = update.gpa == OWN;
            let update = if own {
                RmpUpdate::pre_guest(ASID, spa)
            } else {
                update
            };
            let accepted = from == PageState::GuestValid;
            let to = if own && !accepted {
                PageState::PreGuest
            } else {
                to
            };
            reach(&p, spa, from);
            let fixed = from.is_immutable() || from == PageState::HvFixed;
            let (result, after) = if fixed {
                (Err(RmpError::Permission), from)
            } else {
                (Ok(()), to)
            };
            assert_eq!(p.rmpupdate(spa, &update), result, "{from} -> {to}");
            assert_eq!(state(&p, spa), after, "{from} -> {to}");
        }
    }
}

#[test]
fn reclaim_of_every_state() {
    let p = snp(2);
    guest(&p);
    for (i, from) in reachable().enumerate() {
        let spa = 0x50_0000 + i as u64 * 0x1000;
        reach(&p, spa, from);
        let to = match from {
            PageState::Firmware | PageState::Reclaim => Some(PageState::Reclaim),
            PageState::PreGuest => Some(PageState::GuestInvalid),
            PageState::PreSwap => Some(PageState::GuestValid),
            _ => None,
        };
        let expected = if to.is_some() {
            Status::SUCCESS
        } else {
            Status::INVALID_PAGE_STATE
        };
        assert_eq!(reclaim(&p, spa), expected, "{from}");
        assert_eq!(state(&p, spa), to.unwrap_or(from));
    }
    for word in [0x50_0800, 0x50_0001, p.memory_len()] {
        let page_paddr = SizedPage::from_raw(word);
        let status = run(&p, SnpPageReclaim { page_paddr });
        assert_eq!(status, Status::INVALID_ADDRESS, "{word:#x}");
    }
}

#[test]
fn the_host_writes_only_what_it_owns_and_reads_everything() {
    let p = snp(3);
    guest(&p);
    for (i, state) in reachable().enumerate() {
        let spa = 0x50_0000 + i as u64 * 0x1000;
        p.host_write(spa, &[1; 16]).unwrap();
        reach(&p, spa, state);
        let owned = matches!(state, PageState::Hypervisor | PageState::HvFixed);
        let expected = if owned {
            Ok(())
        } else {
            Err(AccessFault::HostWrite { spa, state })
        };
        assert_eq!(p.host_write(spa, &[2; 16]), expected);
        p.host_read(spa, &mut [0; 16]).unwrap();
    }
    // A write that runs into such a page stops there.
    reach(&p, 0x60_1000, PageState::Firmware);
    let fault = AccessFault::HostWrite {
        spa: 0x60_1000,
        state: PageState::Firmware,
    };
    assert_eq!(p.host_write(0x60_0ff0, &[7; 32]), Err(fault));
}

#[test]
fn rmpupdate_refuses_operands_that_make_no_entry() {
    let p = snp(4);
    let guest = RmpUpdate::guest(ASID, 0x1000);
    let large = |update: RmpUpdate| update.size(PageSize::Size2M);
    for (spa, update) in [
        (0x50_0800, RmpUpdate::firmware()),
        (
            0x50_0000,
            RmpUpdate {
                gpa: 0x123,
                ..guest
            },
        ),
        (
            0x50_0000,
            RmpUpdate {
                gpa: 1 << 52,
                ..guest
            },
        ),
        (0x50_0000, RmpUpdate { asid: 13, ..guest }),
        (
            0x50_0000,
            RmpUpdate {
                assigned: false,
                ..guest
            },
        ),
        (
            0x50_0000,
            RmpUpdate {
                immutable: true,
                ..RmpUpdate::shared()
            },
        ),
        (
            0x50_0000,
            RmpUpdate {
                gpa: 0x1000,
                ..RmpUpdate::firmware()
            },
        ),
        (0x50_0000, large(RmpUpdate::guest(ASID, 0))),
        (LARGE, large(guest)),
        (p.memory_len(), RmpUpdate::shared()),
    ] {
        assert_eq!(
            p.rmpupdate(spa, &update),
            Err(RmpError::Input),
            "{spa:#x} {update:?}"
        );
    }
    let q = builder(4).build().unwrap();
    assert_eq!(
        q.rmpupdate(0, &RmpUpdate::firmware()),
        Err(RmpError::NotEnabled)
    );
    assert_eq!(q.psmash(0), Err(RmpError::NotEnabled));
}

#[test]
fn large_and_small_entries_do_not_overlap() {
    let p = snp(5);
    guest(&p);
    let large = RmpUpdate::guest(ASID, LARGE).size(PageSize::Size2M);
    reach(&p, LARGE + 0x5000, PageState::GuestInvalid);
    assert_eq!(p.rmpupdate(LARGE, &large), Err(RmpError::Overlap));
    p.rmpupdate(LARGE + 0x5000, &RmpUpdate::shared()).unwrap();
    p.rmpupdate(LARGE, &large).unwrap();
    for at in [0, 0x5000, 0x1f_f000] {
        assert_eq!(
            p.rmpupdate(LARGE + at, &RmpUpdate::shared()),
            Err(RmpError::Overlap)
        );
        let entry = p.rmpread(LARGE + at).unwrap();
        assert_eq!((entry.size, entry.gpa), (PageSize::Size2M, LARGE + at));
    }
    let head = GuestPage::new(ASID, LARGE, LARGE).mapping(PageSize::Size2M);
    assert!(p.pvalidate(&head, PageSize::Size2M, true).unwrap());

    assert_eq!(p.psmash(LARGE + 0x1000), Err(RmpError::Input));
    assert_eq!(p.psmash(p.memory_len()), Err(RmpError::BadAddress));
    p.psmash(LARGE).unwrap();
    assert_eq!(p.psmash(LARGE), Err(RmpError::Input));
    for at in [0, 0x5000, 0x1f_f000] {
        let entry = p.rmpread(LARGE + at).unwrap();
        assert_eq!((entry.size, entry.gpa), (PageSize::Size4K, LARGE + at));
        assert_eq!(entry.state, PageState::GuestValid);
    }
    p.rmpupdate(LARGE + 0x5000, &RmpUpdate::shared()).unwrap();
    p.host_write(LARGE + 0x5000, &[1]).unwrap();
    assert!(p.host_write(LARGE + 0x6000, &[1]).is_err());
}

#[test]
fn unsmash_joins_only_512_like_pages() {
    let p = snp(6);
    guest(&p);
    let unsmash = |spa| {
        let page_paddr = small(spa);
        run(&p, SnpPageUnsmash { page_paddr })
    };
    for i in 0..512 {
        let spa = LARGE + i * 0x1000;
        p.rmpupdate(spa, &RmpUpdate::pre_guest(ASID, spa)).unwrap();
    }
    assert_eq!(unsmash(LARGE + 0x1000), Status::INVALID_ADDRESS);
    reclaim(&p, LARGE + 0x7000).ok().unwrap();
    assert_eq!(unsmash(LARGE), Status::INVALID_PAGE_STATE);
    let other = RmpUpdate::pre_guest(ASID, LARGE + 0x8000);
    p.rmpupdate(LARGE + 0x7000, &other).unwrap();
    assert_eq!(unsmash(LARGE), Status::INVALID_PAGE_STATE);
    reclaim(&p, LARGE + 0x7000).ok().unwrap();
    p.rmpupdate(LARGE + 0x7000, &RmpUpdate::pre_guest(ASID, LARGE + 0x7000))
        .unwrap();
    unsmash(LARGE).ok().unwrap();
    assert_eq!(p.rmpread(LARGE + 0x7000).unwrap().size, PageSize::Size2M);
    assert_eq!(unsmash(LARGE), Status::INVALID_PAGE_SIZE);
    // The page size is part of a reclaim.
    assert_eq!(reclaim(&p, LARGE), Status::INVALID_PAGE_SIZE);
    let page_paddr = SizedPage::new(LARGE, PageSize::Size2M).unwrap();
    run(&p, SnpPageReclaim { page_paddr }).ok().unwrap();
    p.psmash(LARGE).unwrap();
}

fn npf(page: &GuestPage, code: u64) -> AccessFault {
    AccessFault::NestedPage {
        gpa: page.gpa,
        error_code: code,
    }
}

const RMP: u64 = 1 << 31;
const SIZEM: u64 = 1 << 35;
const VMPL: u64 = 1 << 36;

#[test]
fn a_guest_reaches_a_page_only_as_it_accepted_it() {
    let p = snp(7);
    guest(&p);
    let spa = 0x50_0000;
    let page = GuestPage::new(ASID, 0x9000, spa);
    p.rmpupdate(spa, &RmpUpdate::guest(ASID, 0x9000)).unwrap();
    let read = |page: &GuestPage| p.guest_read(page, &mut [0; 8]);
    assert_eq!(read(&page), Err(AccessFault::NotValidated { gpa: 0x9000 }));
    assert!(p.pvalidate(&page, PageSize::Size4K, true).unwrap());
    // Again: carry flag.
    assert!(!p.pvalidate(&page, PageSize::Size4K, true).unwrap());
    p.guest_write(&page, b"my words").unwrap();

    // The host maps another guest address, or another page, to what it likes.
    let elsewhere = GuestPage {
        gpa: 0xa000,
        ..page
    };
    assert_eq!(read(&elsewhere), Err(npf(&elsewhere, RMP)));
    let free = GuestPage {
        spa: 0x50_1000,
        ..page
    };
    assert_eq!(read(&free), Err(npf(&free, RMP)));
    // Replay: the cipher text of the page in another page assigned at the same address.
    let mut old = [0; 0x1000];
    p.host_read(spa, &mut old).unwrap();
    p.host_write(0x50_1000, &old).unwrap();
    p.rmpupdate(0x50_1000, &RmpUpdate::guest(ASID, 0x9000))
        .unwrap();
    assert_eq!(read(&free), Err(AccessFault::NotValidated { gpa: 0x9000 }));
    // Taking the page away and giving it back needs a new acceptance.
    p.rmpupdate(spa, &RmpUpdate::shared()).unwrap();
    p.rmpupdate(spa, &RmpUpdate::guest(ASID, 0x9000)).unwrap();
    assert_eq!(read(&page), Err(AccessFault::NotValidated { gpa: 0x9000 }));
    assert!(p.pvalidate(&page, PageSize::Size4K, true).unwrap());
    let mut words = [0; 8];
    p.guest_read(&page, &mut words).unwrap();
    assert_eq!(&words, b"my words");
    // Shared accesses do not reach private pages.
    assert_eq!(p.guest_write_shared(&page, &[0]), Err(npf(&page, RMP)));
    assert_eq!(p.guest_read_shared(&page, &mut [0]), Err(npf(&page, RMP)));
}

#[test]
fn mapping_and_entry_must_have_the_same_size() {
    let p = snp(8);
    guest(&p);
    let large = RmpUpdate::guest(ASID, LARGE).size(PageSize::Size2M);
    p.rmpupdate(LARGE, &large).unwrap();
    let small = GuestPage::new(ASID, LARGE + 0x3000, LARGE + 0x3000);
    let fault = p.pvalidate(&small, PageSize::Size4K, true).unwrap_err();
    assert_eq!(fault, GuestRmpError::Fault(npf(&small, RMP | SIZEM)));
    let unaligned = GuestPage::new(ASID, LARGE + 0x1000, LARGE + 0x1000);
    let error = p.pvalidate(&unaligned, PageSize::Size2M, true).unwrap_err();
    assert_eq!(error, GuestRmpError::Code(RmpError::Input));
    let head = GuestPage::new(ASID, LARGE, LARGE).mapping(PageSize::Size2M);
    assert!(p.pvalidate(&head, PageSize::Size2M, true).unwrap());
    assert_eq!(
        p.guest_read(&small, &mut [0]),
        Err(npf(&small, RMP | SIZEM))
    );
    let through = small.mapping(PageSize::Size2M);
    p.guest_write(&through, &[5; 16]).unwrap();
    p.psmash(LARGE).unwrap();
    assert_eq!(p.guest_read(&through, &mut [0]), Err(npf(&small, RMP)));
    let mut seen = [0; 16];
    p.guest_read(&small, &mut seen).unwrap();
    assert_eq!(seen, [5; 16]);
    let error = p.pvalidate(&head, PageSize::Size2M, false).unwrap_err();
    assert_eq!(error, GuestRmpError::Code(RmpError::SizeMismatch));
}

#[test]
fn rmpadjust_lets_a_vmpl_give_only_downwards_and_only_what_it_has() {
    let p = snp(9);
    guest(&p);
    let spa = 0x50_0000;
    reach(&p, spa, PageState::GuestValid);
    let page = GuestPage::new(ASID, spa, spa);
    let adjust = |vmpl: u8, target_vmpl: u8, permissions: u8, vmsa: bool| {
        let adjust = RmpAdjust {
            target_vmpl,
            permissions,
            vmsa,
        };
        p.rmpadjust(&page.vmpl(vmpl), PageSize::Size4K, &adjust)
    };
    let refused = Err(GuestRmpError::Code(RmpError::Permission));
    let input = Err(GuestRmpError::Code(RmpError::Input));
    for vmpl in 1..4 {
        let fault = npf(&page, RMP | VMPL);
        assert_eq!(p.guest_read(&page.vmpl(vmpl), &mut [0]), Err(fault));
    }
    let read_write = permission::READ | permission::WRITE;
    adjust(0, 1, read_write, false).unwrap();
    assert_eq!(adjust(0, 0, read_write, false), refused);
    assert_eq!(adjust(1, 1, read_write, false), refused);
    assert_eq!(adjust(2, 1, 0, false), refused);
    assert_eq!(adjust(1, 2, permission::ALL, false), refused);
    assert_eq!(adjust(1, 2, permission::READ, true), refused);
    assert_eq!(adjust(0, 4, 0, false), input);
    assert_eq!(adjust(0, 1, 0x10, false), input);
    adjust(1, 2, permission::READ, false).unwrap();
    p.guest_write(&page.vmpl(1), &[1]).unwrap();
    p.guest_read(&page.vmpl(2), &mut [0]).unwrap();
    assert_eq!(
        p.guest_write(&page.vmpl(2), &[1]),
        Err(npf(&page, RMP | VMPL))
    );
    adjust(0, 1, 0, true).unwrap();
    assert!(p.rmpread(spa).unwrap().vmsa);
    // PVALIDATE is for VMPL0, and taking the page back ends every permission.
    let fault = p
        .pvalidate(&page.vmpl(1), PageSize::Size4K, false)
        .unwrap_err();
    assert_eq!(fault, GuestRmpError::Fault(AccessFault::GeneralProtection));
    p.rmpupdate(spa, &RmpUpdate::guest(ASID, spa)).unwrap();
    let entry = p.rmpread(spa).unwrap();
    assert_eq!(
        (entry.vmsa, entry.permissions),
        (false, [permission::ALL, 0, 0, 0])
    );
    let fault = Err(GuestRmpError::Fault(AccessFault::NotValidated { gpa: spa }));
    assert_eq!(adjust(0, 1, 0, false), fault);
}

#[test]
fn guests_without_snp_have_no_rmp_instructions_and_no_protected_mapping() {
    let p = sev(10);
    let handle = running(&p, OPEN, 6, &[0x44; 0x1000]);
    let page = GuestPage::new(6, 0, GUEST);
    let error = p.pvalidate(&page, PageSize::Size4K, true).unwrap_err();
    assert_eq!(error, GuestRmpError::Fault(AccessFault::NotActive(6)));
    // The same page at another guest address, and a host write: neither is detected.
    let mut seen = [0; 16];
    p.guest_read(
        &GuestPage {
            gpa: 0x7000,
            ..page
        },
        &mut seen,
    )
    .unwrap();
    assert_eq!(seen, [0x44; 16]);
    p.host_write(GUEST, &[0; 16]).unwrap();
    p.guest_read(&page, &mut seen).unwrap();
    assert_ne!(seen, [0x44; 16]);
    deactivate(&p, handle).ok().unwrap();
    assert_eq!(
        p.guest_read(&page, &mut seen),
        Err(AccessFault::NotActive(6))
    );
}

#[test]
fn accesses_stay_in_one_page_and_in_memory() {
    let p = sev(11);
    running(&p, OPEN, 6, &[0; 16]);
    let page = GuestPage::new(6, 0xff8, GUEST + 0xff8);
    p.guest_read(&page, &mut [0; 8]).unwrap();
    assert_eq!(
        p.guest_read(&page, &mut [0; 9]),
        Err(AccessFault::CrossesPage)
    );
    let skew = GuestPage::new(6, 0xff0, GUEST + 0xff8);
    assert_eq!(
        p.guest_read(&skew, &mut [0; 1]),
        Err(AccessFault::CrossesPage)
    );
    let end = p.memory_len();
    let beyond = GuestPage::new(6, 0, end);
    assert_eq!(
        p.guest_write(&beyond, &[0]),
        Err(AccessFault::NoMemory(end))
    );
    assert_eq!(
        p.host_read(end - 4, &mut [0; 8]),
        Err(AccessFault::NoMemory(end - 4))
    );
    assert_eq!(
        p.host_write(u64::MAX, &[0; 2]),
        Err(AccessFault::NoMemory(u64::MAX))
    );
    assert_eq!(p.rmpread(end), None);
}
