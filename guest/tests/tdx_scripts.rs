//! The state machines against answers written down by hand.

use kvm_ops_guest::tdx::{
    Accept, AlreadyAccepted, Cause, CompletionStatus, Convert, Gpaw, Limits, MapGpa, Progress,
    Regs, VmcallStatus, accept_operand,
};
use kvm_ops_guest::{Flush, GpaRange, PageSize, Privacy, RangeError};

const SHARED: u64 = 1 << 47;

fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}

/// A host's answers to MapGPA.
fn answer(status: VmcallStatus, r11: u64) -> Regs {
    Regs {
        r10: status.0,
        r11,
        ..Regs::default()
    }
}

fn module(status: u64) -> Regs {
    Regs {
        rax: status,
        ..Regs::default()
    }
}

/// The call a step asks for.
fn call(step: Progress) -> Regs {
    match step {
        Progress::Call(regs) => regs,
        other => panic!("no call: {other:?}"),
    }
}

fn cause(step: Progress) -> (Cause, GpaRange) {
    match step {
        Progress::Failed(error) => (error.cause, error.rest),
        other => panic!("no failure: {other:?}"),
    }
}

#[test]
fn mapgpa_goes_on_where_an_honest_host_stopped() {
    for (to, bit) in [(Privacy::Shared, SHARED), (Privacy::Private, 0)] {
        let mut map = MapGpa::new(range(0x10_0000, 0x4000), to, Gpaw::Bits48).expect("fits");
        let first = call(map.next(None));
        assert_eq!((first.rax, first.rcx, first.r10), (0, 0xFC00, 0));
        assert_eq!(
            (first.r11, first.r12, first.r13),
            (0x10001, bit | 0x10_0000, 0x4000)
        );
        let retry = answer(VmcallStatus::RETRY, bit | 0x10_3000);
        let second = call(map.next(Some(&retry)));
        assert_eq!((second.r12, second.r13), (bit | 0x10_3000, 0x1000));
        assert_eq!(
            map.next(Some(&answer(VmcallStatus::SUCCESS, 0))),
            Progress::Done
        );
        assert_eq!(map.next(None), Progress::Done);
    }
}

#[test]
fn a_host_that_answers_retry_for_ever_is_given_up() {
    let limits = Limits {
        stalled_retries: 3,
        ..Limits::DEFAULT
    };
    let whole = range(0x10_0000, 0x4000);
    let mut map = MapGpa::new(whole, Privacy::Shared, Gpaw::Bits48)
        .expect("fits")
        .limits(limits);
    let same = answer(VmcallStatus::RETRY, SHARED | 0x10_0000);
    let first = call(map.next(None));
    assert_eq!(call(map.next(Some(&same))), first);
    assert_eq!(call(map.next(Some(&same))), first);
    assert_eq!(
        cause(map.next(Some(&same))),
        (Cause::NoProgress { tries: 3 }, whole)
    );
    // Nothing that comes later changes that.
    let late = answer(VmcallStatus::SUCCESS, 0);
    assert_eq!(
        cause(map.next(Some(&late))),
        (Cause::NoProgress { tries: 3 }, whole)
    );
}

#[test]
fn progress_forgives_earlier_retries_without() {
    let limits = Limits {
        stalled_retries: 2,
        ..Limits::DEFAULT
    };
    let mut map = MapGpa::new(range(0, 0x10_0000), Privacy::Private, Gpaw::Bits48)
        .expect("fits")
        .limits(limits);
    map.next(None);
    for page in 1..0x100 {
        call(map.next(Some(&answer(VmcallStatus::RETRY, page << 12))));
        call(map.next(Some(&answer(VmcallStatus::RETRY, page << 12))));
    }
}

#[test]
fn a_retry_address_that_is_no_page_of_the_rest_is_refused() {
    let whole = range(0x10_0000, 0x4000);
    let bad = [
        (SHARED | 0xF_F000, "before"),
        (
            SHARED | 0x10_4000,
            "at the end: nothing remains, which is not RETRY",
        ),
        (SHARED | 0x10_5000, "beyond"),
        (SHARED | 0x10_0800, "not a page"),
        (0x10_1000, "the private alias of the right page"),
        (SHARED << 1 | SHARED | 0x10_1000, "bits that are no address"),
        (0, "nothing"),
        (u64::MAX, "everything"),
    ];
    for (answered, why) in bad {
        let mut map = MapGpa::new(whole, Privacy::Shared, Gpaw::Bits48).expect("fits");
        map.next(None);
        let step = map.next(Some(&answer(VmcallStatus::RETRY, answered)));
        assert_eq!(
            cause(step),
            (Cause::RetryOutside { answer: answered }, whole),
            "{why}"
        );
    }
}

#[test]
fn a_range_that_reaches_the_shared_bit_is_refused_before_any_call() {
    for (gpaw, bit) in [(Gpaw::Bits48, 1 << 47), (Gpaw::Bits52, 1 << 51)] {
        let last = range(bit - 0x1000, 0x1000);
        let over = range(bit - 0x1000, 0x2000);
        let above = range(bit, 0x1000);
        for to in [Privacy::Private, Privacy::Shared] {
            assert!(Convert::new(last, to, gpaw).is_ok());
            for bad in [over, above] {
                assert_eq!(Convert::new(bad, to, gpaw).err(), Some(RangeError::TooHigh));
            }
        }
    }
}

#[test]
fn the_operand_of_accept_is_a_page_and_a_level_and_never_an_address_alone() {
    for size in PageSize::DESCENDING {
        let gpa = 5 * size.bytes();
        let rcx = accept_operand(gpa, size);
        assert_eq!(rcx & 7, size as u64);
        assert_eq!(rcx & !7, gpa);
    }
}

#[test]
fn accept_asks_for_the_largest_size_and_falls_only_on_what_the_module_says() {
    let gib = 1 << 30;
    let whole = range(gib, gib);
    let mut accept = Accept::new(whole, Gpaw::Bits48).expect("fits");
    assert_eq!(call(accept.next(None)).rcx, gib | 2);
    // A 1.5 module knows no 1 GiB pages here.
    let step = accept.next(Some(&module(CompletionStatus::OPERAND_INVALID | 1)));
    assert_eq!(call(step).rcx, gib | 1);
    // The host mapped this one in small pages.
    let step = accept.next(Some(&module(CompletionStatus::PAGE_SIZE_MISMATCH | 1)));
    assert_eq!(call(step).rcx, gib);
    for page in 1..512 {
        let step = accept.next(Some(&module(0)));
        assert_eq!(call(step).rcx, gib + page * 0x1000);
    }
    let step = accept.next(Some(&module(0)));
    assert_eq!(
        call(step).rcx,
        (gib + 0x20_0000) | 1,
        "2 MiB is tried again"
    );
    // A failure at 2 MiB that is not about the size ends it.
    let status = CompletionStatus::OPERAND_INVALID | 1;
    let rest = range(gib + 0x20_0000, gib - 0x20_0000);
    assert_eq!(
        cause(accept.next(Some(&module(status)))),
        (Cause::Module(CompletionStatus(status)), rest)
    );
}

#[test]
fn a_page_accepted_before_is_an_attack_unless_the_guest_cannot_know() {
    let status = module(CompletionStatus::PAGE_ALREADY_ACCEPTED);
    let whole = range(0x1000, 0x2000);
    let mut accept = Accept::new(whole, Gpaw::Bits48).expect("fits");
    accept.next(None);
    let size = PageSize::Size4K;
    assert_eq!(
        cause(accept.next(Some(&status))),
        (Cause::AlreadyAccepted { size }, whole)
    );

    let mut accept = Accept::new(whole, Gpaw::Bits48)
        .expect("fits")
        .already_accepted(AlreadyAccepted::Keep);
    accept.next(None);
    assert_eq!(call(accept.next(Some(&status))).rcx, 0x2000);
    assert_eq!(accept.next(Some(&status)), Progress::Done);
}

#[test]
fn a_conversion_flushes_first_and_only_a_private_one_accepts() {
    let one = range(0x5000, 0x1000);
    let ok = answer(VmcallStatus::SUCCESS, 0);

    let mut share = Convert::new(one, Privacy::Shared, Gpaw::Bits48).expect("fits");
    let both = Flush {
        caches: true,
        tlb: true,
    };
    assert_eq!(share.next(None), Progress::Flush(both));
    assert_eq!(call(share.next(None)).r12, SHARED | 0x5000);
    assert_eq!(share.next(Some(&ok)), Progress::Done);

    let mut unshare = Convert::new(one, Privacy::Private, Gpaw::Bits48).expect("fits");
    let tlb = Flush {
        caches: false,
        tlb: true,
    };
    assert_eq!(unshare.next(None), Progress::Flush(tlb));
    assert_eq!(call(unshare.next(None)).r12, 0x5000);
    let accept = call(unshare.next(Some(&ok)));
    assert_eq!((accept.rax, accept.rcx), (6, 0x5000));
    assert_eq!(unshare.next(Some(&module(0))), Progress::Done);
}

#[test]
fn a_call_that_was_not_executed_is_asked_for_again() {
    let mut convert = Convert::new(range(0, 0x2000), Privacy::Private, Gpaw::Bits48).expect("ok");
    convert.next(None);
    let map = convert.next(None);
    assert_eq!(convert.next(None), map);
    let accept = convert.next(Some(&answer(VmcallStatus::SUCCESS, 0)));
    assert_eq!(convert.next(None), accept);
}

#[test]
fn a_conversion_to_private_that_the_host_stops_halfway_has_nothing_done() {
    let whole = range(0x20_0000, 0x40_0000);
    let mut convert = Convert::new(whole, Privacy::Private, Gpaw::Bits48).expect("fits");
    convert.next(None);
    convert.next(None);
    convert.next(Some(&answer(VmcallStatus::RETRY, 0x40_0000)));
    let status = VmcallStatus::INVALID_OPERAND;
    let step = convert.next(Some(&answer(status, 0x40_0000)));
    let expected = Cause::Host {
        status,
        at: 0x40_0000,
    };
    assert_eq!(cause(step), (expected, whole), "mapped is not accepted");
}

#[test]
fn a_lock_that_stays_taken_ends_the_acceptance() {
    let limits = Limits {
        busy: 5,
        ..Limits::DEFAULT
    };
    let mut accept = Accept::new(range(0, 0x1000), Gpaw::Bits52)
        .expect("fits")
        .limits(limits);
    let first = accept.next(None);
    let busy = module(CompletionStatus::OPERAND_BUSY | 1);
    for _ in 1..5 {
        assert_eq!(accept.next(Some(&busy)), first);
    }
    let (why, _) = cause(accept.next(Some(&busy)));
    let status = CompletionStatus(CompletionStatus::OPERAND_BUSY | 1);
    assert_eq!(why, Cause::Busy { tries: 5, status });
}
