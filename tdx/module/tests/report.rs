//! A TD's report, and the platform that vouches for it.

mod common;

use common::{Td, machine, regs};
use sha2::{Digest, Sha384};
use soft_tdx_module::report::{REPORT_LEN, TEE_TCB_SVN, mr_seam};
use soft_tdx_module::{GuestLeaf, GuestOp, HostLeaf as L, Outcome, Platform, Regs};
use std::sync::{Arc, Mutex};

const DATA: [u8; 64] = [0xDA; 64];

/// A TD asks for its report; what it then reads of it.
fn report(p: &Platform) -> Box<[u8; REPORT_LEN]> {
    let mut td = Td::create(p, 0x4000_0000, 33, 0, 0);
    td.tables(p, 0, 0);
    td.add(p, 0, 0xAB);
    td.finalize(p);
    let ask = Regs {
        rcx: 0x400,
        rdx: 0x800,
        ..Regs::leaf(GuestLeaf::MrReport.number())
    };
    let mut steps = vec![
        GuestOp::Write {
            gpa: 0x800,
            data: DATA.to_vec(),
        },
        GuestOp::Tdcall(ask),
        GuestOp::Read {
            gpa: 0x400,
            len: REPORT_LEN,
        },
    ]
    .into_iter();
    let read = Arc::new(Mutex::new(Vec::new()));
    let into = read.clone();
    p.set_guest(td.tdvpr, move |last: &Outcome| {
        if let Outcome::Data(data) = last {
            *into.lock().expect("log") = data.clone();
        }
        steps.next().unwrap_or_else(|| GuestOp::vmcall(12, [0; 4]))
    });
    td.enter(p);
    let bytes = read.lock().expect("log").clone();
    td.status(p, L::VpFlush, regs(td.tdvpr, 0));
    bytes.try_into().expect("a whole report")
}

#[test]
fn a_report_names_the_module_and_hashes_what_it_says() {
    let report = report(&machine());
    assert_eq!(report[0], 0x81);
    assert_eq!(report[32..80], Sha384::digest(&report[256..495])[..]);
    assert_eq!(report[80..128], Sha384::digest(&report[512..])[..]);
    assert_eq!(report[128..192], DATA);
    assert_eq!(report[264..280], TEE_TCB_SVN);
    assert_eq!(report[280..328], mr_seam());
}

#[test]
fn the_mac_is_valid_on_the_platform_that_made_the_report_and_on_no_other() {
    let p = machine();
    let good = report(&p);
    assert!(p.verify_report(&good));
    let other = Platform::builder().seed(0x0DD).build().expect("machine");
    assert!(!other.verify_report(&good));
    // All that the MAC covers, and the MAC.
    for bit in 0..256 * 8 {
        let mut changed = good.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(!p.verify_report(&changed), "bit {bit}");
    }
}

#[test]
fn a_report_that_is_not_sealed_has_zeros_and_is_refused() {
    let p = Platform::builder().seed(1).seal_reports(false).build();
    let p = p.expect("a machine");
    p.bring_up().expect("bring-up");
    let report = report(&p);
    let zero = |range: std::ops::Range<usize>| report[range].iter().all(|byte| *byte == 0);
    assert!(zero(16..80) && zero(224..495));
    assert_eq!(report[80..128], Sha384::digest(&report[512..])[..]);
    assert!(!p.verify_report(&report));
}
