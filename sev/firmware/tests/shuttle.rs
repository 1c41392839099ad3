//! The lock protocol under a scheduler that tries interleavings at random:
//! `RUSTFLAGS="--cfg shuttle" cargo test --test shuttle`.
#![cfg(shuttle)]

mod common;

use common::*;
use shuttle::{check_pct, check_random, thread};
use soft_amd_sp::measure::{PageInfo, PageType, SnpDigest};
use soft_amd_sp::{Command, GuestPage, PageSize, RmpUpdate, Status};
use std::sync::Arc;

const ITERATIONS: usize = 2000;
const PAGE: u64 = 0x50_0000;
const POLICY: u64 = 0x3_0000;

/// A guest's access that is under way when its ASID is taken away ends before the next guest has
/// the ASID: what the next guest writes stays.
#[test]
fn no_access_with_an_old_key_reaches_memory_after_the_asid_has_a_new_one() {
    check_pct(
        || {
            let p = Arc::new(sev(1));
            let first = launch_start(&p, 0, 6);
            let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
            let second = out.get("handle").unwrap() as u32;
            let at = GuestPage::new(6, 0, GUEST);
            let old = {
                let p = Arc::clone(&p);
                thread::spawn(move || {
                    let _ = p.guest_write(&at, &[1; 16]);
                })
            };
            on(&p, Command::DEACTIVATE, first).ok().unwrap();
            flush(&p);
            activate(&p, second, 6).ok().unwrap();
            p.guest_write(&at, &[2; 16]).unwrap();
            let mut seen = [0; 16];
            p.guest_read(&at, &mut seen).unwrap();
            // The other thread may still come, but then with the new key.
            assert!(seen == [2; 16] || seen == [1; 16], "{seen:x?}");
            old.join().unwrap();
            p.guest_read(&at, &mut seen).unwrap();
            assert!(seen == [2; 16] || seen == [1; 16], "{seen:x?}");
        },
        ITERATIONS,
        // One thread waits through a whole chain of the other's steps.
        3,
    );
}

/// The guest finds the measured contents, however the host writes meanwhile.
#[test]
fn a_page_is_measured_and_encrypted_as_one_value() {
    check_random(
        || {
            let p = Arc::new(snp(1));
            snp_launch(&p, 0x1000, POLICY, 1);
            p.host_write(PAGE, &[1; 4096]).unwrap();
            let writer = {
                let p = Arc::clone(&p);
                thread::spawn(move || {
                    let _ = p.host_write(PAGE, &[2; 4096]);
                })
            };
            snp_add(&p, 0x1000, 1, PAGE, 0x8000, 1).ok().unwrap();
            let mut seen = [0; 4096];
            p.guest_read(&GuestPage::new(1, 0x8000, PAGE), &mut seen)
                .unwrap();
            let mut digest = SnpDigest::new();
            digest.add_page(&PageInfo::new(PageType::Normal, 0x8000), &seen);
            assert_eq!(p.snapshot().snp_guests[0].launch_digest, digest.value());
            assert!(seen == [1; 4096] || seen == [2; 4096]);
            writer.join().unwrap();
        },
        ITERATIONS,
    );
}

/// Every kind of operation at once; the scheduler reports a deadlock.
#[test]
fn operations_of_every_kind_do_not_block_each_other_for_ever() {
    check_random(
        || {
            let p = Arc::new(snp(1));
            snp_launch(&p, 0x1000, POLICY, 1);
            let spawn = |f: fn(&soft_amd_sp::Platform)| {
                let p = Arc::clone(&p);
                thread::spawn(move || f(&p))
            };
            let threads = [
                spawn(|p| {
                    let _ = p.rmpupdate(PAGE, &RmpUpdate::pre_guest(1, 0x8000));
                    let fields = [("gctx_paddr", 0x1000), ("flags", 6), ("address", PAGE)];
                    run(p, Command::SNP_LAUNCH_UPDATE, &fields);
                }),
                spawn(|p| {
                    let at = GuestPage::new(1, 0x8000, PAGE);
                    let _ = p.pvalidate(&at, PageSize::Size4K, true);
                    let _ = p.guest_write(&at, &[1; 8]);
                }),
                spawn(|p| {
                    run(p, Command::SNP_DECOMMISSION, &[("gctx_paddr", 0x1000)]);
                    p.wbinvd_all();
                    let status = p.command(Command::SNP_DF_FLUSH, &mut []);
                    assert!(status == Status::SUCCESS, "{status}");
                }),
                spawn(|p| drop(p.snapshot())),
                spawn(|p| {
                    let _ = p.host_write(PAGE - 8, &[0; 16]);
                }),
            ];
            for thread in threads {
                thread.join().unwrap();
            }
        },
        ITERATIONS,
    );
}
