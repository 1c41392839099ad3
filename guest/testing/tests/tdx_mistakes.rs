//! Mistakes of a guest fail with a message that names them.

use kvm_ops_guest::tdx::{CompletionStatus, TdGuest, TdInfo, Vmcall};
use kvm_ops_guest::{Flush, GpaRange};
use kvm_ops_guest_test::tdx::{
    BuildError, Fault, StopCause, Stopped, TestTd, TestTdBuilder, Vcpu, tdcall,
};

const SHARED: u64 = 1 << 47;

fn page() -> GpaRange {
    GpaRange::new(0x8000, 0x1000).expect("a range")
}

/// The message of a guest's failure.
fn message<T: std::fmt::Debug>(
    td: TestTdBuilder,
    guest: fn(&mut Vcpu) -> Result<T, Fault>,
) -> String {
    let td = td.build().expect("a td");
    let failed = td.run(guest).expect("the code ends");
    failed.expect_err("a mistake").to_string()
}

fn pending() -> TestTdBuilder {
    TestTd::builder().pending(0x8000..0x9000)
}

#[test]
fn a_page_that_was_not_accepted_is_named() {
    let said = message(pending(), |cpu| cpu.write(0x8010, b"mine"));
    assert_eq!(
        said,
        "vcpu 0 stopped at a write of 4 bytes at 0x8010: page 0x8000: the page is pending: \
         the guest has not accepted it (TDG.MEM.PAGE.ACCEPT)"
    );
    // Without SEPT_VE_DISABLE it is the guest's exception.
    let said = message(pending().attributes(0), |cpu| cpu.read(0x8010, 4));
    assert_eq!(
        said,
        "#VE at a read of 4 bytes at 0x8010: the page is pending: \
         the guest has not accepted it (TDG.MEM.PAGE.ACCEPT)"
    );
    // Memory that the host gives at the first touch is not accepted either.
    let said = message(TestTd::builder(), |cpu| cpu.read(0x5000, 1));
    assert!(said.contains("0x5000: the page is pending"), "{said}");
}

#[test]
fn what_unwrap_prints_names_it_too() {
    let td = pending().build().expect("a td");
    let fault = td.run(|cpu| cpu.read(0x8000, 1)).expect("ends");
    let said = format!("{:?}", fault.expect_err("a mistake"));
    assert!(said.contains("has not accepted it"), "{said}");
}

#[test]
fn a_leaf_on_a_page_that_was_not_accepted_stops_with_its_name() {
    let report = |cpu: &mut Vcpu| {
        let mut td = TdGuest::new(cpu).expect("TDG.VP.INFO");
        td.report(0x8400, 0x8000)
    };
    let stopped = pending()
        .build()
        .expect("a td")
        .run(report)
        .expect_err("stops");
    assert_eq!(stopped.cause, StopCause::NotAccepted { gpa: 0x8000 });
    let td = pending().attributes(0).build().expect("a td");
    let stopped = td.run(report).expect_err("no handler of #VE");
    assert_eq!(stopped.to_string(), "vcpu 0 stopped: no handler for #VE");
}

#[test]
fn the_shared_address_of_a_private_page_is_named() {
    let said = message(pending(), |cpu| cpu.write(SHARED | 0x8000, b"public"));
    assert!(said.ends_with("page 0x8000 is private: the guest has not made it shared (MapGPA)"));
}

#[test]
fn the_private_address_of_a_shared_page_is_named() {
    let said = message(TestTd::builder(), |cpu| {
        let mut td = TdGuest::new(&mut *cpu).expect("TDG.VP.INFO");
        td.share(page(), |_: Flush| ()).expect("shared");
        cpu.read(0x8000, 1)
    });
    assert!(said.ends_with(
        "page 0x8000 is shared: the guest made it so (MapGPA), and uses its private address"
    ));
}

#[test]
fn an_address_beyond_memory_is_named() {
    let small = TestTd::builder().memory(0x10_0000);
    let said = message(small, |cpu| cpu.read(0x10_0000, 1));
    assert!(said.ends_with("there is no memory at 0x100000"), "{said}");
}

#[test]
fn a_fatal_error_of_the_guest_has_its_text() {
    let td = TestTd::builder().build().expect("a td");
    let stopped = td.run(|cpu| {
        let mut text = [0; 64];
        text[..9].copy_from_slice(b"no memory");
        let mut td = TdGuest::new(cpu).expect("TDG.VP.INFO");
        td.vmcall(Vmcall::FatalError { code: 7, text })
    });
    let said = stopped.expect_err("stops").to_string();
    let expected = "vcpu 0 stopped: the guest reported a fatal error, 0x7: \"no memory\"";
    assert_eq!(said, expected);
}

#[test]
fn a_stopped_vcpu_stays_stopped_and_the_others_run_on() {
    let td = TestTd::builder().vcpus(2).build().expect("a td");
    let first = td.run(|cpu| cpu.read(0x8000, 1)).expect("ends");
    let again = td.run(|cpu| cpu.read(0x9000, 1)).expect("ends");
    assert_eq!(first, again);
    let mut other = td.vcpu(1).expect("a second");
    let mut info = TdInfo::request();
    other.try_tdcall(&mut info).expect("runs");
    assert_eq!(info.rax, CompletionStatus::SUCCESS);
    assert!(td.vcpu(2).is_none());
}

#[test]
fn outside_of_run_a_stop_is_a_panic_with_the_reason() {
    let failed = std::panic::catch_unwind(|| {
        let td = pending().build().expect("a td");
        let cpu = td.vcpu(0).expect("one");
        TdGuest::new(cpu).expect("info").report(0x8400, 0x8000)
    });
    let cause = failed.expect_err("panics");
    let said = cause.downcast_ref::<String>().expect("a text");
    assert!(said.contains("has not accepted it"), "{said}");
}

#[test]
fn a_test_that_fails_inside_of_run_fails() {
    let failed = std::panic::catch_unwind(|| {
        let td = TestTd::builder().build().expect("a td");
        td.run(|_| panic!("the test's own"))
    });
    let cause = failed
        .map(|result: Result<(), Stopped>| result)
        .expect_err("panics");
    assert_eq!(cause.downcast_ref::<&str>(), Some(&"the test's own"));
}

#[test]
#[should_panic(expected = "call it inside of TestTd::run")]
fn a_tdcall_without_a_vcpu_says_so() {
    tdcall(&mut [0; 16]);
}

#[test]
fn a_layout_that_cannot_be_is_refused_with_the_page() {
    let refused = |td: TestTdBuilder| td.build().expect_err("refused").to_string();
    let td = TestTd::builder;
    assert_eq!(
        refused(td().pending(0x8800..0x9000)),
        "0x8800..0x9000 is not made of pages of 0x1000 bytes"
    );
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = td().shared(0x9000..0x8000);
    assert_eq!(
        refused(reversed),
        "0x9000..0x8000 is not made of pages of 0x1000 bytes"
    );
    assert_eq!(
        refused(td().pending_large(0x20_0000..0x30_0000)),
        "0x200000..0x300000 is not made of pages of 0x200000 bytes"
    );
    assert_eq!(
        refused(
            td().pending_large(0x20_0000..0x40_0000)
                .accepted(0x21_0000..0x21_1000)
        ),
        "page 0x210000 is in the layout twice"
    );
    assert_eq!(
        refused(
            td().accepted(0x21_0000..0x21_1000)
                .pending_large(0x20_0000..0x40_0000)
        ),
        "page 0x200000 is in the layout twice"
    );
    assert_eq!(
        refused(td().memory(0x8000).measured(0x7000, &[1; 0x1001])),
        "page 0x8000 is beyond the end of memory at 0x8000"
    );
    assert_eq!(refused(td().vcpus(0)), "0 vcpus: there must be 1 to 64");
    assert_eq!(
        refused(td().memory(0)),
        "0x0 bytes of memory: not pages, or more than 64 GiB"
    );
    let Err(BuildError::Machine(error)) = td().attributes(1 << 40).build() else {
        panic!("such attributes do not exist");
    };
    let source = std::error::Error::source(&error).expect("the call");
    assert!(source.to_string().contains("ATTRIBUTES"), "{source}");
}
