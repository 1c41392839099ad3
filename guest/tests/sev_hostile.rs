//! Attacks of a hostile host on an SEV, SEV-ES or SNP guest, and the guest's view of them. Each test
//! is a row of docs/hostile-host.md.

mod common;

use common::{LARGE, no_flush, range};
use kvm_ops_guest::sev::msr::{self, CpuidRegister, ResponseError};
use kvm_ops_guest::sev::{Cause, ConvertError, MsrError, SevError, Versions};
use kvm_ops_guest::{GpaRange, PageSize, Privacy, Record, RecordError};
use kvm_ops_guest_test::sev::platform::{
    AccessFault, PageSize as RmpSize, PageState, RmpError, RmpUpdate,
};
use kvm_ops_guest_test::sev::{
    Exit, Fault, Reply, StopCause, Stopped, TestSev, TestSevBuilder, Vcpu, hosts,
};
use proptest::prelude::*;

const GPA: u64 = 0x8000;
const OTHER: u64 = 0x9000;
/// Responses in the GHCB MSR to a page state change: done, and not.
const DONE: u64 = 0x015;
const REFUSED: u64 = 1 << 63 | DONE;

fn one() -> GpaRange {
    range(GPA, 0x1000)
}

fn start(guest: TestSevBuilder) -> TestSev {
    guest.build().expect("a guest")
}

fn cause(result: Result<(), SevError>) -> (Cause, GpaRange) {
    match result {
        Err(SevError::Convert(ConvertError { cause, rest })) => (cause, rest),
        other => panic!("{other:?}"),
    }
}

/// An SNP guest with "secret" in a validated page, and the page's host address.
fn snp() -> (TestSev, Vcpu, u64) {
    let guest = start(TestSev::snp().assigned(GPA..GPA + 0x1000));
    let mut cpu = guest.vcpu();
    cpu.kernel().validate(one()).expect("validated");
    cpu.write(GPA, b"secret").expect("ours");
    let spa = guest.hypervisor().behind(GPA).expect("mapped");
    (guest, cpu, spa)
}

/// The guests without an RMP, with "secret" in a private page.
fn legacy() -> [(TestSev, Vcpu, u64); 2] {
    [TestSev::sev(), TestSev::sev_es()].map(|guest| {
        let guest = start(guest);
        let mut cpu = guest.vcpu();
        cpu.write(GPA, b"secret").expect("ours");
        let spa = guest.hypervisor().behind(GPA).expect("mapped");
        (guest, cpu, spa)
    })
}

/// The access ended in a nested page fault of the RMP, which the host did not cure.
fn is_rmp_fault<T: std::fmt::Debug>(guest: &TestSev, result: Result<T, Fault>) {
    let Err(Fault::Stopped(stopped)) = result else {
        panic!("{result:?}");
    };
    is_rmp_stop(guest, &stopped);
}

fn is_rmp_stop(guest: &TestSev, stopped: &Stopped) {
    const RMP: u64 = 1 << 31;
    match guest.take_exits().last() {
        Some(Exit::Fault(AccessFault::NestedPage { error_code, .. })) => {
            assert_ne!(error_code & RMP, 0, "{stopped}");
        }
        other => panic!("{other:?}: {stopped}"),
    }
}

fn is_not_validated<T: std::fmt::Debug>(result: Result<T, Fault>, at: u64) {
    match result {
        Err(Fault::NotValidated { gpa, .. }) if gpa == at => {}
        other => panic!("{other:?}"),
    }
}

// --- page state changes -----------------------------------------------------------------------

#[test]
fn success_without_a_private_page_keeps_the_guest_from_running() {
    let guest = start(TestSev::snp());
    let host = guest.hypervisor();
    host.back(GPA).expect("a page");
    guest.set_host(hosts::page_state_answers(DONE));
    let result = guest.run(|cpu| cpu.kernel().unshare(one(), no_flush));
    let stopped = result.expect_err("PVALIDATE never comes back");
    is_rmp_stop(&guest, &stopped);
    assert!(matches!(stopped.cause, StopCause::Nested(_)), "{stopped}");
}

#[test]
fn success_without_sharing_leaves_the_page_to_neither_side() {
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    guest.set_host(hosts::page_state_answers(DONE));
    cpu.kernel().share(one(), no_flush).expect("says the host");
    // Neither alias works, and the host still cannot write there.
    is_rmp_fault(&guest, cpu.read_shared(GPA, 6));
    is_not_validated(cpu.read(GPA, 6), GPA);
    assert!(host.platform().host_write(spa, b"forged").is_err());
}

#[test]
fn a_refusal_is_an_error_with_what_is_left() {
    let (guest, mut cpu, _) = snp();
    guest.set_host(hosts::page_state_answers(REFUSED));
    let refused = Cause::PageState(1 << 31);
    assert_eq!(cause(cpu.kernel().share(one(), no_flush)), (refused, one()));
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    guest.set_host(hosts::page_state_answers(REFUSED));
    assert_eq!(
        cause(cpu.kernel().unshare(one(), no_flush)),
        (refused, one())
    );
}

#[test]
fn a_response_that_is_none_is_an_error() {
    let (guest, mut cpu, _) = snp();
    let host = guest.hypervisor();
    for raw in [0, 0x014, 0x013, 0x1015, 1 << 31 | 0x015, u64::MAX] {
        guest.set_host(hosts::page_state_answers(raw));
        host.assign(LARGE, RmpSize::Size4K).expect("a page");
        let page = range(LARGE, 0x1000);
        cpu.kernel().validate(page).expect("validated");
        let expected = (Cause::Response(raw), page);
        assert_eq!(
            cause(cpu.kernel().share(page, no_flush)),
            expected,
            "{raw:#x}"
        );
    }
}

#[test]
fn a_wrong_size_is_split_or_met_and_nothing_is_lost() {
    // Asked for one small page, the host assigns 2 MiB: PVALIDATE faults, the host has to split.
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    guest.set_host(hosts::large_pages());
    let small = range(LARGE, 0x1000);
    cpu.kernel().unshare(small, no_flush).expect("private");
    cpu.write(LARGE, b"ours").expect("validated");
    let next = LARGE + 0x1000;
    is_not_validated(cpu.read(next, 4), next);
    // Asked for 2 MiB, it assigns small pages.
    guest.set_host(hosts::honest());
    let large = range(2 * LARGE, LARGE);
    cpu.kernel().unshare(large, no_flush).expect("private");
    let last = 3 * LARGE - 8;
    cpu.write(last, b"ours").expect("validated");
}

#[test]
fn a_page_that_is_still_validated_is_found_out_by_the_carry_flag() {
    // The host pretends both ways; the guest cleared the page itself, so this needs a guest whose
    // record is wrong: it takes a page for shared that it never shared.
    let (guest, mut cpu, _) = snp();
    guest.set_host(hosts::page_state_answers(DONE));
    let size = PageSize::Size4K;
    let unchanged = (Cause::Unchanged { size }, one());
    assert_eq!(cause(cpu.kernel().unshare(one(), no_flush)), unchanged);
    assert_eq!(cpu.read(GPA, 6).expect("ours"), b"secret");
}

// --- private pages ----------------------------------------------------------------------------

#[test]
fn snp_notices_a_page_taken_away_and_given_anew() {
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    host.platform()
        .rmpupdate(spa, &RmpUpdate::shared())
        .expect("the host's right");
    is_rmp_fault(&guest, cpu.read(GPA, 6));
    host.platform()
        .rmpupdate(spa, &RmpUpdate::guest(host.asid(), GPA))
        .expect("free");
    is_not_validated(cpu.read(GPA, 6), GPA);
}

#[test]
fn snp_notices_a_remap_to_another_page() {
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    // A page of the host.
    let strange = host.free_page(RmpSize::Size4K).expect("a page");
    host.map(GPA, strange, RmpSize::Size4K);
    is_rmp_fault(&guest, cpu.read(GPA, 6));
    // A validated page of the same guest, made for another address.
    let other = host.assign(OTHER, RmpSize::Size4K).expect("a page");
    cpu.kernel()
        .validate(range(OTHER, 0x1000))
        .expect("validated");
    host.map(GPA, other, RmpSize::Size4K);
    is_rmp_fault(&guest, cpu.read(GPA, 6));
    host.map(GPA, spa, RmpSize::Size4K);
    assert_eq!(cpu.read(GPA, 6).expect("ours"), b"secret");
}

#[test]
fn a_guest_that_validates_again_can_be_replayed_for_ever() {
    // Why validating in a #VC handler is wrong: no instruction can tell this from the first time.
    let (guest, mut cpu, old) = snp();
    let host = guest.hypervisor();
    let new = host.assign(GPA, RmpSize::Size4K).expect("a page");
    is_not_validated(cpu.read(GPA, 6), GPA);
    cpu.kernel()
        .validate(one())
        .expect("PVALIDATE says success");
    cpu.write(GPA, b"newer!").expect("ours");
    host.map(GPA, old, RmpSize::Size4K);
    assert_eq!(
        cpu.read(GPA, 6).expect("no fault"),
        b"secret",
        "the old contents are back"
    );
    host.map(GPA, new, RmpSize::Size4K);
    assert_eq!(cpu.read(GPA, 6).expect("no fault"), b"newer!");
    // Only when the first page is there again at a third validation does the carry flag show it.
    host.map(GPA, old, RmpSize::Size4K);
    let size = PageSize::Size4K;
    assert_eq!(
        cause(cpu.kernel().validate(one())).0,
        Cause::Unchanged { size }
    );
}

#[test]
fn a_guest_with_a_record_does_not_validate_again() {
    let (guest, mut cpu, _) = snp();
    let host = guest.hypervisor();
    let mut bits = [0];
    let mut record = Record::new(&mut bits, 0).expect("fits");
    record.claim(one()).expect("as it was validated at first");
    host.assign(GPA, RmpSize::Size4K).expect("a page");
    let Err(Fault::NotValidated { gpa, .. }) = cpu.read(GPA, 6) else {
        panic!("no #VC");
    };
    assert!(record.is_private(gpa), "an attack");
    let is = Privacy::Private;
    assert_eq!(record.claim(one()), Err(RecordError::Already { gpa, is }));
}

#[test]
fn without_snp_a_remap_to_another_page_is_not_noticed() {
    for (guest, mut cpu, spa) in legacy() {
        let host = guest.hypervisor();
        let other = host.back(OTHER).expect("a page");
        cpu.write(OTHER, b"public").expect("ours");
        host.map(GPA, other, RmpSize::Size4K);
        host.map(OTHER, spa, RmpSize::Size4K);
        assert_eq!(cpu.read(GPA, 6).expect("no fault"), b"public");
        assert_eq!(cpu.read(OTHER, 6).expect("no fault"), b"secret");
    }
}

#[test]
fn without_snp_a_page_taken_away_and_given_anew_is_garbage_without_a_fault() {
    for (guest, mut cpu, _) in legacy() {
        let host = guest.hypervisor();
        host.back(GPA).expect("a page");
        assert_ne!(cpu.read(GPA, 6).expect("no fault"), b"secret");
    }
}

#[test]
fn one_page_at_two_addresses() {
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    host.map(OTHER, spa, RmpSize::Size4K);
    is_rmp_fault(&guest, cpu.read(OTHER, 6));
    let twice = host
        .platform()
        .rmpupdate(spa, &RmpUpdate::guest(host.asid(), OTHER));
    assert_eq!(
        twice,
        Ok(()),
        "the host may, but then the page is no longer at the first address"
    );
    is_rmp_fault(&guest, cpu.read(GPA, 6));
    for (guest, mut cpu, spa) in legacy() {
        let host = guest.hypervisor();
        host.map(OTHER, spa, RmpSize::Size4K);
        cpu.write(OTHER, b"double").expect("ours");
        assert_eq!(cpu.read(GPA, 6).expect("no fault"), b"double");
    }
}

// --- contents ---------------------------------------------------------------------------------

#[test]
fn the_host_reads_ciphertext() {
    let [sev, es] = legacy();
    for (guest, _, spa) in [snp(), sev, es] {
        let host = guest.hypervisor();
        let seen = host.read(spa, 4096).expect("ram");
        assert!(!seen.windows(6).any(|w| w == b"secret"));
    }
}

#[test]
fn replayed_ciphertext_is_read_without_snp_and_cannot_be_written_with_it() {
    for (guest, mut cpu, spa) in legacy() {
        let host = guest.hypervisor();
        let old = host.read(spa, 4096).expect("ram");
        cpu.write(GPA, b"newer!").expect("ours");
        host.platform()
            .host_write(spa, &old)
            .expect("nothing stops it");
        assert_eq!(cpu.read(GPA, 6).expect("no fault"), b"secret");
    }
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    let old = host.read(spa, 4096).expect("ram");
    cpu.write(GPA, b"newer!").expect("ours");
    let state = PageState::GuestValid;
    assert_eq!(
        host.platform().host_write(spa, &old),
        Err(AccessFault::HostWrite { spa, state })
    );
    assert_eq!(cpu.read(GPA, 6).expect("ours"), b"newer!");
}

#[test]
fn swapped_ciphertext_is_garbage_without_snp_and_cannot_be_written_with_it() {
    for (guest, mut cpu, spa) in legacy() {
        let host = guest.hypervisor();
        let other = host.back(OTHER).expect("a page");
        cpu.write(OTHER, b"public").expect("ours");
        let bytes = host.read(other, 4096).expect("ram");
        host.platform()
            .host_write(spa, &bytes)
            .expect("nothing stops it");
        let read = cpu.read(GPA, 6).expect("no fault");
        assert!(read != b"secret" && read != b"public");
    }
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    let other = host.assign(OTHER, RmpSize::Size4K).expect("a page");
    let bytes = host.read(other, 4096).expect("ram");
    assert!(host.platform().host_write(spa, &bytes).is_err());
    assert_eq!(cpu.read(GPA, 6).expect("ours"), b"secret");
}

#[test]
fn to_write_an_snp_page_the_host_must_take_it_which_shows() {
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    let old = host.read(spa, 4096).expect("ram");
    host.platform()
        .rmpupdate(spa, &RmpUpdate::shared())
        .expect("the host's right");
    host.platform().host_write(spa, &old).expect("its own page");
    host.platform()
        .rmpupdate(spa, &RmpUpdate::guest(host.asid(), GPA))
        .expect("free");
    is_not_validated(cpu.read(GPA, 6), GPA);
}

#[test]
fn pages_cannot_be_given_as_validated() {
    // A host that fixes a page it assigned (as for the launch) gets no validated page by it.
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    let spa = host.assign(GPA, RmpSize::Size4K).expect("a page");
    let fixed = RmpUpdate::pre_guest(host.asid(), GPA);
    host.platform().rmpupdate(spa, &fixed).expect("allowed");
    is_rmp_fault(&guest, cpu.read(GPA, 6));
    assert_eq!(
        host.platform().rmpupdate(spa, &fixed),
        Err(RmpError::Permission)
    );
}

// --- the MSR protocol -------------------------------------------------------------------------

#[test]
fn a_host_that_speaks_no_common_version_is_refused() {
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    for (max, min) in [(1, 1), (9, 3), (0, 0), (2, 3)] {
        guest.set_host(hosts::msr_answers(2, max << 48 | min << 32 | 51 << 24 | 1));
        let negotiated = cpu.kernel().negotiate(Versions::SNP);
        let refused = matches!(negotiated, Err(MsrError::NoCommonVersion(_)));
        assert!(refused, "{min}..{max}: {negotiated:?}");
    }
}

#[test]
fn a_ghcb_registered_elsewhere_is_refused() {
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    guest.set_host(hosts::msr_answers(0x012, 0x6013));
    let mismatch = Err(ResponseError::Mismatch(0x6013));
    assert_eq!(cpu.kernel().register_ghcb(0x5000), mismatch);
    guest.set_host(hosts::msr_answers(0x012, 0x5013));
    assert_eq!(cpu.kernel().register_ghcb(0x5000), Ok(()));
}

#[test]
fn a_request_left_in_the_msr_is_no_response() {
    // KVM leaves this value for an unknown code.
    let guest = start(TestSev::snp().host(|_, _| Reply::Enter));
    let mut cpu = guest.vcpu();
    assert!(cpu.kernel().sev_info().is_err());
    assert!(cpu.kernel().features().is_err());
    assert!(cpu.kernel().cpuid(1).is_err());
    assert!(cpu.kernel().register_ghcb(0x5000).is_err());
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
    let (guest, mut cpu, spa) = snp();
    let host = guest.hypervisor();
    host.platform()
        .rmpupdate(spa, &RmpUpdate::shared())
        .expect("the host's right");
    is_rmp_fault(&guest, cpu.read(GPA, 6));
}

#[test]
fn shared_memory_changes_under_the_guest() {
    let [sev, es] = legacy();
    for (guest, mut cpu, _) in [snp(), sev, es] {
        let host = guest.hypervisor();
        let spa = host.back(OTHER).expect("a page");
        cpu.write_shared(OTHER, b"checked").expect("shared");
        host.platform()
            .host_write(spa, b"changed")
            .expect("the host's too");
        assert_eq!(cpu.read_shared(OTHER, 7).expect("shared"), b"changed");
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
