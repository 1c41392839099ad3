//! Attacks of a hostile host on an SEV, SEV-ES or SNP guest, and the guest's view of them. Each test
//! is a row of docs/hostile-host.md.

mod common;

use common::snp::{LARGE, Machine, PageStateAnswer, Stuck, range, until_stuck};
use kvm_ops_guest::sev::msr::{self, CpuidRegister, ResponseError};
use kvm_ops_guest::sev::{Cause, ConvertError, MsrError, SevError, Versions};
use kvm_ops_guest::{Flush, GpaRange, PageSize, Privacy, Record, RecordError};
use proptest::prelude::*;
use soft_amd_sp::{AccessFault, PageSize as RmpSize, PageState, RmpError, RmpUpdate};

const GPA: u64 = 0x8000;
const OTHER: u64 = 0x9000;

fn one() -> GpaRange {
    range(GPA, 0x1000)
}

fn no_flush(_: Flush) {}

fn cause(result: Result<(), SevError>) -> (Cause, GpaRange) {
    match result {
        Err(SevError::Convert(ConvertError { cause, rest })) => (cause, rest),
        other => panic!("{other:?}"),
    }
}

/// An SNP guest with "secret" in a validated page.
fn snp() -> (Machine, u64) {
    let mut m = Machine::snp();
    let spa = m.assign(GPA, RmpSize::Size4K);
    m.kernel().validate(one()).expect("validated");
    m.write(GPA, b"secret").expect("ours");
    (m, spa)
}

/// The guests without an RMP, with "secret" in a private page.
fn legacy() -> [(Machine, u64); 2] {
    [false, true].map(|es| {
        let mut m = Machine::legacy(es);
        let spa = m.back(GPA);
        m.write(GPA, b"secret").expect("ours");
        (m, spa)
    })
}

fn is_rmp_fault<T: std::fmt::Debug>(result: Result<T, AccessFault>) {
    const RMP: u64 = 1 << 31;
    match result {
        Err(AccessFault::NestedPage { error_code, .. }) if error_code & RMP != 0 => {}
        other => panic!("{other:?}"),
    }
}

// --- page state changes -----------------------------------------------------------------------

#[test]
fn success_without_a_private_page_keeps_the_guest_from_running() {
    let mut m = Machine::snp();
    m.back(GPA);
    m.answer = PageStateAnswer::Pretend;
    let result = until_stuck(|| m.kernel().unshare(one(), no_flush));
    let Err(Stuck(fault)) = result else {
        panic!("{result:?}");
    };
    is_rmp_fault::<()>(Err(fault));
}

#[test]
fn success_without_sharing_leaves_the_page_to_neither_side() {
    let (mut m, spa) = snp();
    m.answer = PageStateAnswer::Pretend;
    m.kernel().share(one(), no_flush).expect("says the host");
    // Neither alias works, and the host still cannot write there.
    is_rmp_fault(m.read_shared(GPA, 6));
    assert_eq!(m.read(GPA, 6), Err(AccessFault::NotValidated { gpa: GPA }));
    assert!(m.p.host_write(spa, b"forged").is_err());
}

#[test]
fn a_refusal_is_an_error_with_what_is_left() {
    let (mut m, _) = snp();
    m.answer = PageStateAnswer::Refuse;
    let refused = Cause::PageState(1 << 31);
    assert_eq!(cause(m.kernel().share(one(), no_flush)), (refused, one()));
    let mut m = Machine::snp();
    m.answer = PageStateAnswer::Refuse;
    assert_eq!(cause(m.kernel().unshare(one(), no_flush)), (refused, one()));
}

#[test]
fn a_response_that_is_none_is_an_error() {
    let (mut m, _) = snp();
    for raw in [0, 0x014, 0x013, 0x1015, 1 << 31 | 0x015, u64::MAX] {
        m.answer = PageStateAnswer::Raw(raw);
        m.assign(LARGE, RmpSize::Size4K);
        let page = range(LARGE, 0x1000);
        m.kernel().validate(page).expect("validated");
        let expected = (Cause::Response(raw), page);
        assert_eq!(
            cause(m.kernel().share(page, no_flush)),
            expected,
            "{raw:#x}"
        );
    }
}

#[test]
fn a_wrong_size_is_split_or_met_and_nothing_is_lost() {
    // Asked for one small page, the host assigns 2 MiB: PVALIDATE faults, the host has to split.
    let mut m = Machine::snp();
    m.answer = PageStateAnswer::Large;
    let small = range(LARGE, 0x1000);
    m.kernel().unshare(small, no_flush).expect("private");
    m.write(LARGE, b"ours").expect("validated");
    let next = LARGE + 0x1000;
    assert_eq!(
        m.read(next, 4),
        Err(AccessFault::NotValidated { gpa: next })
    );
    // Asked for 2 MiB, it assigns small pages.
    m.answer = PageStateAnswer::Honest;
    let large = range(2 * LARGE, LARGE);
    m.kernel().unshare(large, no_flush).expect("private");
    let last = 3 * LARGE - 8;
    m.write(last, b"ours").expect("validated");
}

#[test]
fn a_page_that_is_still_validated_is_found_out_by_the_carry_flag() {
    // The host pretends both ways; the guest cleared the page itself, so this needs a guest whose
    // record is wrong: it takes a page for shared that it never shared.
    let (mut m, _) = snp();
    m.answer = PageStateAnswer::Pretend;
    let size = PageSize::Size4K;
    let unchanged = (Cause::Unchanged { size }, one());
    assert_eq!(cause(m.kernel().unshare(one(), no_flush)), unchanged);
    assert_eq!(m.read(GPA, 6).expect("ours"), b"secret");
}

// --- private pages ----------------------------------------------------------------------------

#[test]
fn snp_notices_a_page_taken_away_and_given_anew() {
    let (mut m, spa) = snp();
    m.p.rmpupdate(spa, &RmpUpdate::shared())
        .expect("the host's right");
    is_rmp_fault(m.read(GPA, 6));
    m.p.rmpupdate(spa, &RmpUpdate::guest(m.asid, GPA))
        .expect("free");
    assert_eq!(m.read(GPA, 6), Err(AccessFault::NotValidated { gpa: GPA }));
}

#[test]
fn snp_notices_a_remap_to_another_page() {
    let (mut m, spa) = snp();
    // A page of the host.
    let strange = m.page(RmpSize::Size4K);
    m.map(GPA, strange, RmpSize::Size4K);
    is_rmp_fault(m.read(GPA, 6));
    // A validated page of the same guest, made for another address.
    let other = m.assign(OTHER, RmpSize::Size4K);
    m.kernel()
        .validate(range(OTHER, 0x1000))
        .expect("validated");
    m.map(GPA, other, RmpSize::Size4K);
    is_rmp_fault(m.read(GPA, 6));
    m.map(GPA, spa, RmpSize::Size4K);
    assert_eq!(m.read(GPA, 6).expect("ours"), b"secret");
}

#[test]
fn a_guest_that_validates_again_can_be_replayed_for_ever() {
    // Why validating in a #VC handler is wrong: no instruction can tell this from the first time.
    let (mut m, old) = snp();
    let new = m.assign(GPA, RmpSize::Size4K);
    assert_eq!(m.read(GPA, 6), Err(AccessFault::NotValidated { gpa: GPA }));
    m.kernel().validate(one()).expect("PVALIDATE says success");
    m.write(GPA, b"newer!").expect("ours");
    m.map(GPA, old, RmpSize::Size4K);
    assert_eq!(
        m.read(GPA, 6).expect("no fault"),
        b"secret",
        "the old contents are back"
    );
    m.map(GPA, new, RmpSize::Size4K);
    assert_eq!(m.read(GPA, 6).expect("no fault"), b"newer!");
    // Only when the first page is there again at a third validation does the carry flag show it.
    m.map(GPA, old, RmpSize::Size4K);
    let size = PageSize::Size4K;
    assert_eq!(
        cause(m.kernel().validate(one())).0,
        Cause::Unchanged { size }
    );
}

#[test]
fn a_guest_with_a_record_does_not_validate_again() {
    let (mut m, _) = snp();
    let mut bits = [0];
    let mut record = Record::new(&mut bits, 0).expect("fits");
    record.claim(one()).expect("as it was validated at first");
    m.assign(GPA, RmpSize::Size4K);
    let Err(AccessFault::NotValidated { gpa }) = m.read(GPA, 6) else {
        panic!("no #VC");
    };
    assert!(record.is_private(gpa), "an attack");
    let is = Privacy::Private;
    assert_eq!(record.claim(one()), Err(RecordError::Already { gpa, is }));
}

#[test]
fn without_snp_a_remap_to_another_page_is_not_noticed() {
    for (mut m, spa) in legacy() {
        let other = m.back(OTHER);
        m.write(OTHER, b"public").expect("ours");
        m.map(GPA, other, RmpSize::Size4K);
        m.map(OTHER, spa, RmpSize::Size4K);
        assert_eq!(m.read(GPA, 6).expect("no fault"), b"public");
        assert_eq!(m.read(OTHER, 6).expect("no fault"), b"secret");
    }
}

#[test]
fn without_snp_a_page_taken_away_and_given_anew_is_garbage_without_a_fault() {
    for (mut m, _) in legacy() {
        m.back(GPA);
        assert_ne!(m.read(GPA, 6).expect("no fault"), b"secret");
    }
}

#[test]
fn one_page_at_two_addresses() {
    let (mut m, spa) = snp();
    m.map(OTHER, spa, RmpSize::Size4K);
    is_rmp_fault(m.read(OTHER, 6));
    let twice = m.p.rmpupdate(spa, &RmpUpdate::guest(m.asid, OTHER));
    assert_eq!(
        twice,
        Ok(()),
        "the host may, but then the page is no longer at the first address"
    );
    is_rmp_fault(m.read(GPA, 6));
    for (mut m, spa) in legacy() {
        m.map(OTHER, spa, RmpSize::Size4K);
        m.write(OTHER, b"double").expect("ours");
        assert_eq!(m.read(GPA, 6).expect("no fault"), b"double");
    }
}

// --- contents ---------------------------------------------------------------------------------

#[test]
fn the_host_reads_ciphertext() {
    let [sev, es] = legacy();
    for (m, spa) in [snp(), sev, es] {
        let seen = m.host_read(spa, 4096);
        assert!(!seen.windows(6).any(|w| w == b"secret"));
    }
}

#[test]
fn replayed_ciphertext_is_read_without_snp_and_cannot_be_written_with_it() {
    for (mut m, spa) in legacy() {
        let old = m.host_read(spa, 4096);
        m.write(GPA, b"newer!").expect("ours");
        m.p.host_write(spa, &old).expect("nothing stops it");
        assert_eq!(m.read(GPA, 6).expect("no fault"), b"secret");
    }
    let (mut m, spa) = snp();
    let old = m.host_read(spa, 4096);
    m.write(GPA, b"newer!").expect("ours");
    let state = PageState::GuestValid;
    assert_eq!(
        m.p.host_write(spa, &old),
        Err(AccessFault::HostWrite { spa, state })
    );
    assert_eq!(m.read(GPA, 6).expect("ours"), b"newer!");
}

#[test]
fn swapped_ciphertext_is_garbage_without_snp_and_cannot_be_written_with_it() {
    for (mut m, spa) in legacy() {
        let other = m.back(OTHER);
        m.write(OTHER, b"public").expect("ours");
        let bytes = m.host_read(other, 4096);
        m.p.host_write(spa, &bytes).expect("nothing stops it");
        let read = m.read(GPA, 6).expect("no fault");
        assert!(read != b"secret" && read != b"public");
    }
    let (mut m, spa) = snp();
    let other = m.assign(OTHER, RmpSize::Size4K);
    let bytes = m.host_read(other, 4096);
    assert!(m.p.host_write(spa, &bytes).is_err());
    assert_eq!(m.read(GPA, 6).expect("ours"), b"secret");
}

#[test]
fn to_write_an_snp_page_the_host_must_take_it_which_shows() {
    let (mut m, spa) = snp();
    let old = m.host_read(spa, 4096);
    m.p.rmpupdate(spa, &RmpUpdate::shared())
        .expect("the host's right");
    m.p.host_write(spa, &old).expect("its own page");
    m.p.rmpupdate(spa, &RmpUpdate::guest(m.asid, GPA))
        .expect("free");
    assert_eq!(m.read(GPA, 6), Err(AccessFault::NotValidated { gpa: GPA }));
}

#[test]
fn pages_cannot_be_given_as_validated() {
    // A host that fixes a page it assigned (as for the launch) gets no validated page by it.
    let mut m = Machine::snp();
    let spa = m.assign(GPA, RmpSize::Size4K);
    let fixed = RmpUpdate::pre_guest(m.asid, GPA);
    m.p.rmpupdate(spa, &fixed).expect("allowed");
    is_rmp_fault(m.read(GPA, 6));
    assert_eq!(m.p.rmpupdate(spa, &fixed), Err(RmpError::Permission));
}

// --- the MSR protocol -------------------------------------------------------------------------

#[test]
fn a_host_that_speaks_no_common_version_is_refused() {
    let mut m = Machine::snp();
    for (max, min) in [(1, 1), (9, 3), (0, 0), (2, 3)] {
        m.msr.insert(2, max << 48 | min << 32 | 51 << 24 | 1);
        let negotiated = m.kernel().negotiate(Versions::SNP);
        let refused = matches!(negotiated, Err(MsrError::NoCommonVersion(_)));
        assert!(refused, "{min}..{max}: {negotiated:?}");
    }
}

#[test]
fn a_ghcb_registered_elsewhere_is_refused() {
    let mut m = Machine::snp();
    m.msr.insert(0x012, 0x6013);
    let mismatch = Err(ResponseError::Mismatch(0x6013));
    assert_eq!(m.kernel().register_ghcb(0x5000), mismatch);
    m.msr.insert(0x012, 0x5013);
    assert_eq!(m.kernel().register_ghcb(0x5000), Ok(()));
}

#[test]
fn a_request_left_in_the_msr_is_no_response() {
    // KVM leaves this value for an unknown code.
    let mut m = Machine::snp();
    assert!(m.kernel().sev_info().is_err());
    assert!(m.kernel().features().is_err());
    assert!(m.kernel().cpuid(1).is_err());
    assert!(m.kernel().register_ghcb(0x5000).is_err());
}

#[test]
fn cpuid_of_another_register_is_refused() {
    let eax = 7 << 32 | 0x005;
    assert_eq!(msr::cpuid(eax, CpuidRegister::Eax), Ok(7));
    let mismatch = Err(ResponseError::Mismatch(eax));
    assert_eq!(msr::cpuid(eax, CpuidRegister::Ebx), mismatch);
}

#[test]
fn a_host_that_does_not_enter_the_guest_denies_service() {
    let (mut m, spa) = snp();
    m.p.rmpupdate(spa, &RmpUpdate::shared())
        .expect("the host's right");
    is_rmp_fault(m.read(GPA, 6));
}

#[test]
fn shared_memory_changes_under_the_guest() {
    let [sev, es] = legacy();
    for (mut m, _) in [snp(), sev, es] {
        let spa = m.back(OTHER);
        m.write_shared(OTHER, b"checked").expect("shared");
        m.p.host_write(spa, b"changed").expect("the host's too");
        assert_eq!(m.read_shared(OTHER, 7).expect("shared"), b"changed");
    }
}

proptest! {
    #[test]
    fn only_the_one_response_confirms_a_page_state(response: u64, low in 0u64..0x100) {
        for msr_value in [response, low, response & !0xFFF | 0x015] {
            prop_assert_eq!(msr::page_state(msr_value).is_ok(), msr_value == 0x015);
        }
    }

    #[test]
    fn no_response_makes_the_protocol_panic(response: u64, code in 0u64..0x100, gpa: u64) {
        for value in [response, response & !0xFFF | code] {
            let _ = msr::sev_info(value);
            let _ = msr::cpuid(value, CpuidRegister::Ecx);
            let _ = msr::ap_reset_hold(value);
            let _ = msr::preferred_ghcb(value);
            let _ = msr::features(value);
            let registered = msr::register_ghcb(value, gpa);
            prop_assert_eq!(registered.is_ok(), value == gpa & !0xFFF | 0x013);
        }
    }
}
