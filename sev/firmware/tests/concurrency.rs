//! Several threads on one platform, several platforms in one process.

mod common;

use common::*;
use soft_amd_sp::measure::PageType;
use soft_amd_sp::{
    GuestPage, PageSize, PageState, Platform, RandomFailures, RmpError, RmpUpdate, Status,
};
use std::thread;

const POLICY: SnpPolicy = SnpPolicy::SMT;

#[test]
fn a_platform_can_be_shared_and_sent() {
    fn check<T: Send + Sync>() {}
    check::<Platform>();
}

/// The whole life of an SNP guest on separate pages.
fn life(p: &Platform, n: u64, asid: u32) -> Result<(), Status> {
    let gctx = 0x10_0000 * n;
    let (page, answer) = (gctx + 0x1000, gctx + 0x2000);
    p.rmpupdate(gctx, &RmpUpdate::firmware()).unwrap();
    let gctx_paddr = common::page(gctx);
    run(p, SnpGctxCreate { gctx_paddr }).ok()?;
    snp_launch_start(p, gctx, POLICY).ok()?;
    loop {
        match snp_activate(p, gctx, asid).ok() {
            Err(Status::DFFLUSH_REQUIRED) => {
                p.wbinvd_all();
                // Another guest's end may have voided this WBINVD.
                let _ = p.run(&mut SnpDfFlush);
            }
            other => break other?,
        }
    }
    let words = [n as u8; 64];
    p.host_write(page, &words).unwrap();
    p.rmpupdate(page, &RmpUpdate::pre_guest(asid, 0x8000))
        .unwrap();
    run(p, snp_update(gctx, page, PageType::Normal)).ok()?;
    snp_finish(p, gctx).ok()?;
    let mut seen = [0; 64];
    for _ in 0..20 {
        let at = GuestPage::new(asid, 0x8000, page);
        p.guest_read(&at, &mut seen).unwrap();
        assert_eq!(seen, words);
        p.guest_write(&at, &seen).unwrap();
        assert!(p.host_write(page, &[0]).is_err());
    }
    p.rmpupdate(answer, &RmpUpdate::guest(asid, 0x9000))
        .unwrap();
    assert!(
        p.pvalidate(
            &GuestPage::new(asid, 0x9000, answer),
            PageSize::Size4K,
            true
        )
        .unwrap()
    );
    p.rmpupdate(answer, &RmpUpdate::shared()).unwrap();
    p.rmpupdate(page, &RmpUpdate::shared()).unwrap();
    snp_decommission(p, gctx).ok()?;
    reclaim(p, gctx).ok()?;
    p.rmpupdate(gctx, &RmpUpdate::shared()).unwrap();
    Ok(())
}

#[test]
fn lives_of_many_guests_overlap_on_one_platform() {
    let p = snp(1);
    thread::scope(|s| {
        for n in 1..=5 {
            let p = &p;
            s.spawn(move || (0..20).for_each(|_| life(p, n, n as u32).unwrap()));
        }
        s.spawn(|| (0..200).for_each(|_| drop(p.snapshot().to_string())));
    });
    let s = p.snapshot();
    assert!(s.rmp.is_empty() && s.snp_guests.is_empty(), "{s}");
    assert_eq!(p.counters().ended_with(Command::SNP_DECOMMISSION, 0), 100);
}

#[test]
fn platforms_do_not_know_of_each_other() {
    thread::scope(|s| {
        for seed in 0..4 {
            s.spawn(move || {
                let p = snp(seed);
                (0..5).for_each(|_| life(&p, 1, 1).unwrap());
                assert_eq!(p.counters().calls(Command::SNP_GCTX_CREATE), 5);
            });
        }
    });
}

/// Memory holds, at every moment, one whole write of the host or one whole write of the guest.
#[test]
fn hosts_and_guests_race_for_one_page_and_each_write_is_whole() {
    let p = snp(2);
    snp_launch(&p, 0x1000, POLICY, 1);
    let page = 0x50_0000;
    let at = GuestPage::new(1, 0x8000, page);
    let raw = |out: &mut [u8; 64]| p.host_read(page, out).unwrap();

    // The stored form of each of the guest's writes.
    p.rmpupdate(page, &RmpUpdate::guest(1, 0x8000)).unwrap();
    assert!(p.pvalidate(&at, PageSize::Size4K, true).unwrap());
    let sealed: std::collections::HashSet<[u8; 64]> = (0..=u8::MAX)
        .map(|byte| {
            let mut out = [0; 64];
            p.guest_write(&at, &[byte; 64]).unwrap();
            raw(&mut out);
            out
        })
        .collect();
    assert_eq!(sealed.len(), 256);

    thread::scope(|s| {
        s.spawn(|| {
            for _ in 0..500 {
                p.rmpupdate(page, &RmpUpdate::shared()).unwrap();
                p.rmpupdate(page, &RmpUpdate::guest(1, 0x8000)).unwrap();
                // The guest is the one that accepts; here in the same breath.
                let _ = p.pvalidate(&at, PageSize::Size4K, true);
            }
        });
        s.spawn(|| {
            for i in 0..2000_u32 {
                let _ = p.guest_write(&at, &[i as u8; 64]);
            }
        });
        s.spawn(|| {
            for i in 0..2000_u32 {
                let _ = p.host_write(page, &[i as u8; 64]);
                assert_eq!(p.psmash(page & !0x1f_ffff), Err(RmpError::Input));
            }
        });
        s.spawn(|| {
            let mut seen = [0; 64];
            for _ in 0..4000 {
                raw(&mut seen);
                let by_host = seen.iter().all(|b| *b == seen[0]);
                assert!(by_host || sealed.contains(&seen), "{seen:x?}");
            }
        });
    });
    assert_eq!(p.rmpread(page).unwrap().state, PageState::GuestValid);
}

#[test]
fn random_failures_under_threads_lose_nothing_that_the_firmware_holds() {
    let p = snp(3);
    p.fail_randomly(RandomFailures {
        seed: 9,
        one_in: 7,
        statuses: vec![Status::HWERROR_PLATFORM, Status::RESOURCE_LIMIT],
        codes: vec![],
    });
    thread::scope(|s| {
        for n in 1..=5 {
            let p = &p;
            s.spawn(move || {
                // A life that fails is left where it is; its pages stay accounted for.
                let _ = life(p, n, n as u32);
            });
        }
    });
    p.clear_failures();
    let s = p.snapshot();
    let contexts = s
        .pages_by_state()
        .get(&PageState::Context)
        .copied()
        .unwrap_or(0);
    assert_eq!(contexts, s.snp_guests.len(), "{s}");
    for guest in &s.snp_guests {
        let status = snp_decommission(&p, guest.context);
        status.ok().unwrap();
    }
    for range in p.snapshot().rmp {
        for i in 0..range.pages as u64 {
            let at = range.spa + i * 0x1000;
            if range.entry.state.is_immutable() {
                reclaim(&p, at).ok().unwrap();
            }
            p.rmpupdate(at, &RmpUpdate::shared()).unwrap();
        }
    }
    assert!(p.snapshot().rmp.is_empty());
}
