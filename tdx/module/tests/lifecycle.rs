//! The life of a TD as the example shows it, its measurement checked against another SHA-384.

#[path = "../examples/lifecycle.rs"]
#[allow(dead_code, unreachable_pub)]
mod lifecycle;

/// MRTD by the definition, computed by an implementation of SHA-384 the module does not use.
fn expected_mrtd() -> [u8; 48] {
    let mut hash = hmac_sha512::sha384::Hash::new();
    for k in 0..lifecycle::MEASURED_PAGES {
        let mut record = |name: &[u8], gpa: u64, data: &[u8]| {
            let mut r = [0u8; 128];
            r[..name.len()].copy_from_slice(name);
            r[16..24].copy_from_slice(&gpa.to_le_bytes());
            hash.update(r);
            hash.update(data);
        };
        record(b"MEM.PAGE.ADD", k << 12, &[]);
        for chunk in (0..4096).step_by(256) {
            record(b"MR.EXTEND", k << 12 | chunk, &[k as u8 + 1; 256]);
        }
    }
    hash.finalize()
}

#[test]
fn a_td_lives_is_measured_as_defined_and_gives_everything_back() {
    let outcome = lifecycle::live().expect("a life without errors");
    assert_eq!(outcome.mrtd, expected_mrtd());
    assert_eq!(outcome.message, 0xC0FFEE);
    // TDR, 6 TDCS, 6 TDVPS, 3 tables, 2 measured and 1 accepted page.
    assert_eq!(outcome.pages_returned, 1 + 6 + 6 + 3 + 2 + 1);
}
