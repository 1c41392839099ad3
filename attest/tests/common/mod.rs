//! Evidence and helpers that the tests share.
#![allow(dead_code)] // Not each of them uses all.

use kvm_ops_attest::snp::{CHECKS, SIGNED_LEN};
use kvm_ops_attest::{Verdict, Waivers};

pub(crate) fn waive(names: &[&str]) -> Waivers {
    Waivers::new(names.iter().copied(), &CHECKS).unwrap()
}

pub(crate) fn assert_accepted(verdict: &Verdict) {
    let rows: Vec<_> = verdict.rows().iter().map(ToString::to_string).collect();
    assert!(verdict.is_accepted(), "{}", rows.join("\n"));
}

/// Replaces S by n - S, n being the order of P-384.
pub(crate) fn negate_s(report: &mut [u8]) {
    const ORDER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffff\
                         c7634d81f4372ddf581a0db248b0a77aecec196accc52973";
    let s = &mut report[SIGNED_LEN + 72..SIGNED_LEN + 72 + 48];
    let mut borrow = false;
    for (byte, n) in s
        .iter_mut()
        .zip(hex::decode(ORDER).unwrap().into_iter().rev())
    {
        let (difference, a) = n.overflowing_sub(*byte);
        let (difference, b) = difference.overflowing_sub(borrow.into());
        (*byte, borrow) = (difference, a || b);
    }
    assert!(!borrow);
}
