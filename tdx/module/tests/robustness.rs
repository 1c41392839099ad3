//! No register value, memory content or order of calls makes the module panic, hang or lose a lock or a page.

#[path = "common/driver.rs"]
#[allow(dead_code, unreachable_pub)]
mod driver;

use driver::Driver;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_sequences_neither_panic_nor_leave_locks_or_pages_behind(
        bytes in proptest::collection::vec(any::<u8>(), 0..8000)
    ) {
        Driver::new().run(&bytes);
    }

    #[test]
    fn random_sequences_around_l2_vms_do_no_more_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..8000)
    ) {
        Driver::partitioned().run(&bytes);
    }

    #[test]
    fn any_register_values_before_bring_up_are_answered(
        calls in proptest::collection::vec((0usize..4, any::<[u64; 6]>(), 0u64..60), 1..100)
    ) {
        let p = soft_tdx_module::Platform::builder().build().expect("machine");
        for (lp, v, leaf) in calls {
            let mut r = soft_tdx_module::Regs {
                rax: leaf | (v[0] & 0xFF) << 56, rcx: v[1], rdx: v[2], r8: v[3], r9: v[4], r10: v[5],
                ..Default::default()
            };
            prop_assert!(p.seamcall(lp, &mut r).is_ok());
        }
    }
}

/// Pseudo-random bytes.
fn random_bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8
    };
    (0..n).map(|_| next()).collect()
}

/// One thread lives a life again and again, three others call at random, all on the same pages.
#[test]
fn threads_of_random_calls_leave_no_locks_or_pages_behind() {
    let mut busy = 0;
    for round in 0..40 {
        let driver = Driver::new();
        let p = driver.platform();
        std::thread::scope(|s| {
            for thread in 0..3 {
                s.spawn(move || {
                    let bytes = random_bytes(round * 3 + thread + 1, 60_000);
                    let mut b = driver::Bytes(&bytes);
                    while !b.is_empty() {
                        driver::step(p, &mut b);
                    }
                });
            }
            s.spawn(|| {
                for n in 0..4000 {
                    driver.live_step(n);
                }
            });
        });
        driver::audit(p);
        busy += p
            .counts()
            .0
            .iter()
            .filter(|((_, s), _)| *s == "OPERAND_BUSY")
            .map(|(_, n)| n)
            .sum::<u64>();
    }
    assert!(busy > 0, "the threads never met");
}

/// The random sequences are only worth something if they get anywhere.
#[test]
fn the_driver_reaches_running_guests_and_teardown() {
    let mut total = std::collections::BTreeMap::<(&str, &str), u64>::new();
    for seed in 0..120 {
        let bytes = random_bytes(seed, 20_000);
        let mut driver = match seed % 2 {
            0 => Driver::new(),
            _ => Driver::partitioned(),
        };
        driver.run(&bytes);
        for (key, n) in driver.platform().counts().0 {
            *total.entry(key).or_default() += n;
        }
    }
    for leaf in [
        "TDH.MNG.INIT",
        "TDH.VP.INIT",
        "TDH.MR.FINALIZE",
        "TDH.VP.ENTER",
        "TDH.MNG.KEY.FREEID",
        "TDH.PHYMEM.PAGE.RECLAIM",
        "TDG.MEM.PAGE.ACCEPT",
        "TDG.MEM.PAGE.ATTR.WR",
        "TDG.VP.ENTER",
    ] {
        let successes: u64 = total
            .iter()
            .filter(|((l, s), _)| *l == leaf && *s == "SUCCESS")
            .map(|(_, n)| n)
            .sum();
        assert!(successes > 0, "{leaf} never succeeds: {total:#?}");
    }
}
