//! The lock protocol under a scheduler that tries interleavings at random:
//! `RUSTFLAGS="--cfg shuttle" cargo test --test shuttle`.
#![cfg(shuttle)]

mod common;

use common::*;
use shuttle::{check_pct, check_random, thread};
use soft_amd_sp::measure::{PageInfo, PageType, SnpDigest};
use soft_amd_sp::{GuestPage, PageSize, RmpUpdate, Status, permission};
use std::sync::Arc;

const ITERATIONS: usize = 2000;
const PAGE: u64 = 0x50_0000;
const POLICY: SnpPolicy = SnpPolicy::SMT;

/// A guest's access that is under way when its ASID is taken away ends before the next guest has
/// the ASID: what the next guest writes stays.
#[test]
fn no_access_with_an_old_key_reaches_memory_after_the_asid_has_a_new_one() {
    check_pct(
        || {
            let p = Arc::new(sev(1));
            let first = launch_start(&p, OPEN, 6);
            let second = new_guest(&p, OPEN);
            let at = GuestPage::new(6, 0, GUEST);
            let old = {
                let p = Arc::clone(&p);
                thread::spawn(move || {
                    let _ = p.guest_write(&at, &[1; 16]);
                })
            };
            deactivate(&p, first).ok().unwrap();
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
            snp_add(&p, 0x1000, 1, PAGE, 0x8000, PageType::Normal)
                .ok()
                .unwrap();
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
                    run(p, snp_update(0x1000, PAGE, PageType::Zero));
                }),
                spawn(|p| {
                    let at = GuestPage::new(1, 0x8000, PAGE);
                    let _ = p.pvalidate(&at, PageSize::Size4K, true);
                    let _ = p.guest_write(&at, &[1; 8]);
                }),
                spawn(|p| {
                    snp_decommission(p, 0x1000);
                    p.wbinvd_all();
                    let status = p.run(&mut SnpDfFlush);
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

/// Processors that share turns find a page closed between two turns, and never in the middle of one.
#[test]
fn a_page_is_not_closed_while_a_processor_has_a_turn() {
    check_random(
        || {
            let p = Arc::new(snp(1));
            snp_launch(&p, 0x1000, POLICY, 1);
            snp_finish(&p, 0x1000).ok().unwrap();
            p.rmpupdate(PAGE, &RmpUpdate::guest(1, PAGE)).unwrap();
            let at = GuestPage::new(1, PAGE, PAGE);
            p.pvalidate(&at, PageSize::Size4K, true).unwrap();
            let processors = [(); 2].map(|()| {
                let p = Arc::clone(&p);
                thread::spawn(move || {
                    for _ in 0..2 {
                        let turn = p.guest_turn_shared(1).unwrap();
                        let closed = turn.closed();
                        p.guest_frame(&turn, &at, permission::WRITE).unwrap();
                        thread::yield_now();
                        assert_eq!(turn.closed(), closed);
                    }
                })
            });
            p.host_read(PAGE, &mut [0; 8]).unwrap();
            p.guest_write(&at, &[1; 8]).unwrap();
            for processor in processors {
                processor.join().unwrap();
            }
        },
        ITERATIONS,
    );
}
