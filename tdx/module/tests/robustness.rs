//! No register value, memory content or order of calls makes the module panic, hang or lose a lock or a page.

#[path = "common/driver.rs"]
#[allow(dead_code, unreachable_pub)]
mod driver;

use driver::Driver;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_sequences_neither_panic_nor_leave_locks_or_pages_behind(
        bytes in proptest::collection::vec(any::<u8>(), 0..8000)
    ) {
        Driver::new().run(&bytes);
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

/// The random sequences are only worth something if they get anywhere.
#[test]
fn the_driver_reaches_running_guests_and_teardown() {
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 32) as u8
    };
    let mut total = std::collections::BTreeMap::<(&str, &str), u64>::new();
    for _ in 0..60 {
        let bytes: Vec<u8> = (0..20_000).map(|_| random()).collect();
        let mut driver = Driver::new();
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
    ] {
        let successes: u64 = total
            .iter()
            .filter(|((l, s), _)| *l == leaf && *s == "SUCCESS")
            .map(|(_, n)| n)
            .sum();
        assert!(successes > 0, "{leaf} never succeeds: {total:#?}");
    }
}
