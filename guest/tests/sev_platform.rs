//! SEV guests over the software AMD SP and an honest host, and the MSR protocol by its numbers.

mod common;

use common::{LARGE, no_flush, range};
use kvm_ops_guest::sev::msr::{self, CpuidRegister, Features, ResponseError, SevInfo, Termination};
use kvm_ops_guest::sev::{
    Cause, Convert, Kind, MsrError, MsrRequest, Permissions, Progress, Pvalidate, Reply, RmpCode,
    Rmpadjust, SevError, Unchanged, Validate, Validated, Versions, Vmpl,
};
use kvm_ops_guest::{Flush, PageSize, Privacy, RangeError};
use kvm_ops_guest_test::sev::platform::{GuestPage, PageSize as RmpSize, PageState, permission};
use kvm_ops_guest_test::sev::{
    Access, Exit, Fault, Reply as Answer, StopCause, TestSev, TestSevBuilder, hosts,
};
use proptest::prelude::*;

const GPA: u64 = 0x8000;

fn start(guest: TestSevBuilder) -> TestSev {
    guest.build().expect("a guest")
}

#[test]
fn a_page_of_an_snp_guest_goes_to_shared_and_back() {
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    let spa = host.assign(GPA, RmpSize::Size4K).expect("a page");
    let page = range(GPA, 0x1000);
    cpu.kernel().validate(page).expect("validated");
    cpu.write(GPA, b"secret").expect("ours");
    assert_ne!(host.read(spa, 6).expect("ram"), b"secret");

    cpu.kernel().share(page, no_flush).expect("shared");
    assert_eq!(
        host.platform().rmpread(spa).expect("ram").state,
        PageState::Hypervisor
    );
    cpu.write_shared(GPA, b"public").expect("shared");
    assert_eq!(host.read(spa, 6).expect("ram"), b"public");

    cpu.kernel().unshare(page, no_flush).expect("private");
    assert_eq!(
        host.platform().rmpread(spa).expect("ram").state,
        PageState::GuestValid
    );
    cpu.write(GPA, b"secret").expect("ours");
    assert_eq!(cpu.read(GPA, 6).expect("ours"), b"secret");
    assert!(host.platform().host_write(spa, b"forged").is_err());
}

#[test]
fn pvalidate_comes_before_the_change_to_shared_and_after_the_one_to_private() {
    let pages = range(GPA, 0x2000);
    let validated = |unchanged| {
        Some(Reply::Pvalidate(Validated {
            code: RmpCode::SUCCESS,
            unchanged,
        }))
    };
    let operation = |gpa, validate| {
        Progress::Pvalidate(Pvalidate {
            gpa,
            size: PageSize::Size4K,
            validate,
        })
    };
    let request = |gpa, operation: u64| Progress::GhcbMsr(operation << 52 | gpa | 0x014);
    let done = Some(Reply::GhcbMsr(0x015));

    let mut share = Convert::new(pages, Privacy::Shared, Kind::Snp).expect("fits");
    assert_eq!(share.next(None), Progress::Flush(Flush::sev(false)));
    assert_eq!(share.next(None), operation(GPA, false));
    assert_eq!(share.next(None), operation(GPA, false), "not executed");
    assert_eq!(share.next(validated(false)), operation(GPA + 0x1000, false));
    assert_eq!(share.next(validated(false)), request(GPA, 2));
    assert_eq!(share.next(done), request(GPA + 0x1000, 2));
    assert_eq!(share.next(None), request(GPA + 0x1000, 2), "not executed");
    assert_eq!(share.next(done), Progress::Done);

    let mut unshare = Convert::new(pages, Privacy::Private, Kind::Snp)
        .expect("fits")
        .coherent(true);
    assert_eq!(unshare.next(None), Progress::Flush(Flush::sev(true)));
    assert_eq!(unshare.next(None), request(GPA, 1));
    assert_eq!(unshare.next(done), request(GPA + 0x1000, 1));
    assert_eq!(unshare.next(done), operation(GPA, true));
    assert_eq!(
        unshare.next(validated(false)),
        operation(GPA + 0x1000, true)
    );
    assert_eq!(unshare.next(validated(false)), Progress::Done);
}

#[test]
fn caches_are_flushed_unless_the_processor_keeps_aliases_coherent() {
    for coherent in [false, true] {
        let flush = Flush::sev(coherent);
        assert_eq!((flush.caches, flush.tlb), (!coherent, true));
    }
}

#[test]
fn a_range_is_validated_in_the_sizes_that_the_host_assigned() {
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    host.assign(LARGE, RmpSize::Size2M).expect("a page");
    for gpa in (2 * LARGE..3 * LARGE + 0x2000).step_by(0x1000) {
        host.assign(gpa, RmpSize::Size4K).expect("a page");
    }
    cpu.kernel()
        .validate(range(LARGE, 2 * LARGE + 0x2000))
        .expect("validated");
    let pvalidates = guest.take_pvalidates();
    let first: Vec<_> = pvalidates
        .iter()
        .take(3)
        .map(|(op, done)| (op.gpa, op.size, done.code))
        .collect();
    let expected = [
        (LARGE, PageSize::Size2M, RmpCode::SUCCESS),
        (2 * LARGE, PageSize::Size2M, RmpCode::FAIL_SIZEMISMATCH),
        (2 * LARGE, PageSize::Size4K, RmpCode::SUCCESS),
    ];
    assert_eq!(first, expected);
    assert_eq!(pvalidates.len(), 1 + 1 + 512 + 2);
}

#[test]
fn four_kib_of_a_large_page_are_shared_after_the_host_split_it() {
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    host.assign(LARGE, RmpSize::Size2M).expect("a page");
    cpu.kernel()
        .validate(range(LARGE, LARGE))
        .expect("validated");
    cpu.write(LARGE + 0x3000, b"kept").expect("ours");
    cpu.kernel()
        .share(range(LARGE + 0x1000, 0x1000), no_flush)
        .expect("shared");
    assert_eq!(cpu.read(LARGE + 0x3000, 4).expect("ours"), b"kept");
    cpu.write_shared(LARGE + 0x1000, b"public").expect("shared");
}

#[test]
fn a_host_that_assigns_large_pages_is_met_with_large_pvalidates() {
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    guest.set_host(hosts::large_pages());
    cpu.kernel()
        .unshare(range(LARGE, 2 * LARGE), no_flush)
        .expect("private");
    let pvalidates = guest.take_pvalidates();
    let sizes: Vec<_> = pvalidates.iter().map(|(op, _)| op.size).collect();
    assert_eq!(sizes, [PageSize::Size2M; 2]);
}

#[test]
fn rmpadjust_gives_lower_levels_what_was_asked_and_no_more() {
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    let large = host.assign(LARGE, RmpSize::Size2M).expect("a page");
    let small = host.assign(2 * LARGE, RmpSize::Size4K).expect("a page");
    let both = range(LARGE, LARGE + 0x1000);
    cpu.kernel().validate(both).expect("validated");
    let rw = Permissions::READ.and(Permissions::WRITE);
    cpu.kernel().adjust(both, Vmpl::Two, rw).expect("adjusted");
    for spa in [large, small] {
        let entry = host.platform().rmpread(spa).expect("ram");
        assert_eq!(entry.permissions[2], permission::READ | permission::WRITE);
        assert_eq!((entry.permissions[1], entry.permissions[3]), (0, 0));
    }
    let asid = host.asid();
    let at_vmpl = |vmpl| GuestPage::new(asid, 2 * LARGE, small).vmpl(vmpl);
    assert!(host.platform().guest_read(&at_vmpl(2), &mut [0; 8]).is_ok());
    assert!(
        host.platform()
            .guest_read(&at_vmpl(1), &mut [0; 8])
            .is_err()
    );
    // Validating again takes it all away.
    cpu.kernel()
        .share(range(2 * LARGE, 0x1000), no_flush)
        .expect("shared");
    cpu.kernel()
        .unshare(range(2 * LARGE, 0x1000), no_flush)
        .expect("private");
    assert!(
        host.platform()
            .guest_read(&at_vmpl(2), &mut [0; 8])
            .is_err()
    );
}

#[test]
fn the_operand_of_rmpadjust_has_level_permissions_and_vmsa_apart() {
    let operation = Rmpadjust {
        gpa: 0,
        size: PageSize::Size4K,
        target: Vmpl::Three,
        permissions: Permissions::READ.and(Permissions::EXECUTE_SUPERVISOR),
        vmsa: true,
    };
    assert_eq!(operation.operand(), 1 << 16 | 9 << 8 | 3);
}

#[test]
fn sev_and_es_guests_tell_the_host_by_hypercall() {
    for guest in [TestSev::sev(), TestSev::sev_es()] {
        let guest = start(guest);
        let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
        let pages = range(GPA, 0x3000);
        cpu.kernel()
            .notify(pages, Privacy::Shared, no_flush)
            .expect("told");
        cpu.kernel()
            .notify(pages, Privacy::Private, no_flush)
            .expect("told");
        let call = |args| Exit::Hypercall { nr: 12, args };
        let expected = [call([GPA, 3, 0, 0]), call([GPA, 3, 16, 0])];
        assert_eq!(guest.take_exits(), expected);
        assert!(!host.is_shared(GPA));
        guest.set_host(|_, _| Answer::Value((-1000i64) as u64));
        let refused = cpu.kernel().notify(pages, Privacy::Shared, no_flush);
        let Err(SevError::Convert(error)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!((error.cause, error.rest), (Cause::Hypercall(-1000), pages));
    }
}

#[test]
fn without_snp_the_c_bit_alone_decides_what_is_private() {
    for guest in [TestSev::sev(), TestSev::sev_es()] {
        let guest = start(guest);
        let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
        let spa = host.back(GPA).expect("a page");
        cpu.write(GPA, b"secret").expect("ours");
        assert_ne!(host.read(spa, 6).expect("ram"), b"secret");
        cpu.write_shared(GPA, b"public").expect("shared");
        assert_eq!(host.read(spa, 6).expect("ram"), b"public");
        assert_ne!(cpu.read(GPA, 6).expect("no fault"), b"public");
    }
}

#[test]
fn versions_are_agreed_on_or_not() {
    let host = |min, max| SevInfo {
        min,
        max,
        c_bit: 51,
    };
    let table = [
        (Versions::ES, host(1, 1), Some(1)),
        (Versions::ES, host(1, 2), Some(2)),
        (Versions::ES, host(2, 9), Some(2)),
        (Versions::ES, host(3, 9), None),
        (Versions::ES, host(0, 0), None),
        (Versions::SNP, host(1, 1), None),
        (Versions::SNP, host(1, 2), Some(2)),
        (Versions::SNP, host(3, 2), None),
        (Versions::SNP, host(u16::MAX, 0), None),
    ];
    for (ours, theirs, agreed) in table {
        assert_eq!(ours.common(theirs), agreed, "{ours:?} {theirs:?}");
    }
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    guest.set_host(hosts::msr_answers(2, 2 << 48 | 1 << 32 | 51 << 24 | 1));
    assert_eq!(cpu.kernel().negotiate(Versions::SNP), Ok(2));
    assert_eq!(cpu.kernel().sev_info(), Ok(host(1, 2)));
    guest.set_host(hosts::msr_answers(2, 1 << 48 | 1 << 32 | 51 << 24 | 1));
    let none = Err(MsrError::NoCommonVersion(host(1, 1)));
    assert_eq!(cpu.kernel().negotiate(Versions::SNP), none);
}

#[test]
fn requests_have_the_numbers_of_the_specification() {
    use Privacy::{Private, Shared};
    let table = [
        (msr::SEV_INFO_REQUEST, 0x002),
        (
            msr::cpuid_request(0x8000_001F, CpuidRegister::Ebx),
            0x8000_001F_4000_0004,
        ),
        (msr::AP_RESET_HOLD_REQUEST, 0x006),
        (msr::PREFERRED_GHCB_REQUEST, 0x010),
        (msr::register_ghcb_request(0x1234_5000), 0x1234_5012),
        (
            msr::page_state_request(0x1234_5000, Private),
            1 << 52 | 0x1234_5014,
        ),
        (
            msr::page_state_request(0x1234_5000, Shared),
            2 << 52 | 0x1234_5014,
        ),
        (msr::FEATURES_REQUEST, 0x080),
        (Termination::LINUX_PVALIDATE.request(), 0x2_1100),
        (Termination::SNP_UNSUPPORTED.request(), 0x2_0100),
        (
            Termination {
                set: 0xFF,
                reason: 0xFF,
            }
            .request(),
            0xFF_F100,
        ),
    ];
    for (request, number) in table {
        assert_eq!(request, number, "{number:#x}");
    }
}

#[test]
fn responses_are_read_field_by_field() {
    assert_eq!(
        msr::cpuid(0xABCD_0123_C000_0005, CpuidRegister::Edx),
        Ok(0xABCD_0123)
    );
    assert_eq!(msr::ap_reset_hold(0x1007), Ok(true));
    assert_eq!(msr::ap_reset_hold(0x0007), Ok(false));
    assert_eq!(msr::preferred_ghcb(0xFFFF_FFFF_FFFF_F011), Ok(None));
    assert_eq!(msr::preferred_ghcb(0x5011), Ok(Some(0x5000)));
    assert_eq!(msr::register_ghcb(0x5013, 0x5000), Ok(()));
    let features = msr::features(0x21 << 12 | 0x081).expect("a response");
    assert!(features.has(Features::SNP | Features::MULTI_VMPL));
    assert!(!features.has(Features::AP_CREATION));
    assert_eq!(msr::page_state(0x015), Ok(()));
    assert_eq!(
        msr::page_state(7 << 32 | 0x015),
        Err(ResponseError::Refused(7))
    );
}

#[test]
fn a_termination_is_sent_once_and_returns() {
    let guest = start(TestSev::snp());
    let mut cpu = guest.vcpu();
    guest.set_host(|_, _| Answer::Enter);
    cpu.kernel().terminate(Termination::PROTOCOL);
    assert_eq!(guest.take_exits(), [Exit::Msr(0x1_0100)]);
    guest.set_host(hosts::honest());
    let ended = guest.run(|cpu| cpu.kernel().terminate(Termination::PROTOCOL));
    let cause = StopCause::Terminated(Termination::PROTOCOL);
    assert_eq!(ended.expect_err("ended").cause, cause);
}

#[test]
fn an_answer_to_another_step_ends_a_machine() {
    let page = range(GPA, 0x1000);
    let mut validate = Validate::new(page, true).expect("fits");
    validate.next(None);
    let Progress::Failed(error) = validate.next(Some(Reply::GhcbMsr(0x015))) else {
        panic!("taken");
    };
    assert_eq!((error.cause, error.rest), (Cause::OutOfStep, page));
}

#[test]
fn ranges_above_the_address_space_are_refused() {
    let above = range(1 << 52, 0x1000);
    assert_eq!(Validate::new(above, true).err(), Some(RangeError::TooHigh));
    for kind in [Kind::Legacy, Kind::Snp] {
        let convert = Convert::new(above, Privacy::Shared, kind);
        assert_eq!(convert.err(), Some(RangeError::TooHigh));
    }
}

#[test]
fn a_page_validated_by_firmware_passes_only_if_asked() {
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    host.assign(GPA, RmpSize::Size4K).expect("a page");
    let page = range(GPA, 0x1000);
    cpu.kernel().validate(page).expect("validated");
    let again = cpu.kernel().validate(page);
    let Err(SevError::Convert(error)) = again else {
        panic!("{again:?}");
    };
    let size = PageSize::Size4K;
    assert_eq!(error.cause, Cause::Unchanged { size });
    let lenient = Validate::new(page, true)
        .expect("fits")
        .unchanged(Unchanged::Allow);
    cpu.kernel().run_validate(lenient).expect("as asked");
}

#[test]
fn an_access_before_pvalidate_faults() {
    let guest = start(TestSev::snp());
    let (host, mut cpu) = (guest.hypervisor(), guest.vcpu());
    host.assign(GPA, RmpSize::Size4K).expect("a page");
    let access = Access::Read;
    assert_eq!(
        cpu.read(GPA, 4),
        Err(Fault::NotValidated { gpa: GPA, access })
    );
}

/// Any request that a guest of this crate makes.
fn requests() -> impl Strategy<Value = (u64, MsrRequest)> {
    use MsrRequest as R;
    let gpa = || (0u64..1 << 40).prop_map(|page| page << 12);
    let register = prop::sample::select(vec![
        CpuidRegister::Eax,
        CpuidRegister::Ebx,
        CpuidRegister::Ecx,
        CpuidRegister::Edx,
    ]);
    prop_oneof![
        Just((msr::SEV_INFO_REQUEST, R::SevInfo)),
        Just((msr::AP_RESET_HOLD_REQUEST, R::ApResetHold)),
        Just((msr::PREFERRED_GHCB_REQUEST, R::PreferredGhcb)),
        Just((msr::FEATURES_REQUEST, R::Features)),
        (any::<u32>(), register).prop_map(|(function, register)| {
            let request = R::Cpuid { function, register };
            (msr::cpuid_request(function, register), request)
        }),
        gpa().prop_map(|gpa| (msr::register_ghcb_request(gpa), R::RegisterGhcb { gpa })),
        (gpa(), any::<bool>()).prop_map(|(gpa, private)| {
            let to = if private {
                Privacy::Private
            } else {
                Privacy::Shared
            };
            (msr::page_state_request(gpa, to), R::PageState { gpa, to })
        }),
        (0u8..16, any::<u8>()).prop_map(|(set, reason)| {
            let why = Termination { set, reason };
            (why.request(), R::Terminate(why))
        }),
    ]
}

proptest! {
    #[test]
    fn a_host_reads_the_request_that_the_guest_made((msr, request) in requests()) {
        prop_assert_eq!(MsrRequest::from_msr(msr), Some(request));
    }
}
