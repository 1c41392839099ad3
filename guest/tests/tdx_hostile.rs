//! Answers of a hostile host to a TD, and the TD's view of them. Each test is a row of
//! docs/hostile-host.md.

mod common;

use common::{LARGE, SHARED, kernel, no_flush, range};
use kvm_ops_guest::tdx::{Cause, ConvertError, Limits, Regs, TdError, Vmcall, VmcallStatus};
use kvm_ops_guest::{GpaRange, PageSize, Privacy};
use kvm_ops_guest_test::tdx::hosts::{
    denies_service, map_gpa_answers, partial_map_gpa, stalled_map_gpa,
};
use kvm_ops_guest_test::tdx::{Exit, Host, Reply, StopCause, TestTd, ViolationBy};

const PAGE: u64 = 0x8000;

fn one() -> GpaRange {
    range(PAGE, 0x1000)
}

fn td(host: impl Host + 'static) -> TestTd {
    TestTd::builder().host(host).build().expect("a td")
}

fn cause(result: Result<(), TdError>) -> (Cause, GpaRange) {
    match result {
        Err(TdError::Convert(ConvertError { cause, rest })) => (cause, rest),
        other => panic!("{other:?}"),
    }
}

// --- MapGPA ---------------------------------------------------------------------------------

#[test]
fn retry_for_ever_is_given_up() {
    let td = td(stalled_map_gpa());
    let result = td.run(|cpu| kernel(cpu).share(one(), no_flush));
    let tries = Limits::DEFAULT.stalled_retries;
    assert_eq!(result.map(cause), Ok((Cause::NoProgress { tries }, one())));
    assert_eq!(td.take_exits().len(), tries as usize);
}

#[test]
fn retry_backwards_or_beyond_is_refused() {
    let whole = range(LARGE, 2 * LARGE);
    let answers: [fn(u64) -> u64; 5] = [
        |gpa| gpa - 0x1000,
        |gpa| gpa + 2 * LARGE,
        |gpa| gpa + 0x800,
        |gpa| gpa ^ SHARED,
        |_| 0,
    ];
    for wrong in answers {
        for (to, bit) in [(Privacy::Private, 0), (Privacy::Shared, SHARED)] {
            let td = td(move |_, exit| match exit {
                Exit::MapGpa { gpa, .. } => Reply::retry(wrong(*gpa)),
                other => panic!("{other:?}"),
            });
            let result = td.run(|cpu| match to {
                Privacy::Private => kernel(cpu).unshare(whole, no_flush),
                Privacy::Shared => kernel(cpu).share(whole, no_flush),
            });
            let answer = wrong(LARGE | bit);
            assert_eq!(
                result.map(cause),
                Ok((Cause::RetryOutside { answer }, whole))
            );
        }
    }
}

#[test]
fn progress_by_single_pages_is_slow_but_ends() {
    let td = td(partial_map_gpa(0x1000));
    let result = td.run(|cpu| kernel(cpu).share(range(LARGE, LARGE), no_flush));
    assert_eq!(result, Ok(Ok(())));
    assert_eq!(td.take_exits().len(), 512);
}

#[test]
fn success_without_a_private_page_keeps_the_guest_from_running() {
    let mut entries = 0;
    let td = td(move |_, exit| match exit {
        Exit::MapGpa { .. } => Reply::Enter,
        Exit::Violation { gpa: PAGE, .. } if entries < 20 => {
            entries += 1;
            Reply::Enter
        }
        Exit::Violation { gpa: PAGE, .. } => Reply::Stop,
        other => panic!("{other:?}"),
    });
    let result = td.run(|cpu| kernel(cpu).unshare(one(), no_flush));
    let stopped = result.expect_err("the guest never got a page it did not accept");
    let violation = Exit::Violation {
        gpa: PAGE,
        by: ViolationBy::Accept { level: 0 },
    };
    assert_eq!(stopped.cause, StopCause::Denied(Box::new(violation)));
}

#[test]
fn success_without_sharing_shows_when_the_page_is_to_be_private_again() {
    // The host confirms MapGPA both ways and leaves the private page where it was.
    let td = TestTd::builder()
        .pending(PAGE..PAGE + 0x1000)
        .host(map_gpa_answers(VmcallStatus::SUCCESS))
        .build()
        .expect("a td");
    let result = td.run(|cpu| {
        kernel(cpu).accept(one()).expect("accepted");
        cpu.write(PAGE, b"secret").expect("ours");
        kernel(cpu).share(one(), no_flush).expect("says the host");
        kernel(cpu).unshare(one(), no_flush)
    });
    let size = PageSize::Size4K;
    assert_eq!(
        result.map(cause),
        Ok((Cause::AlreadyAccepted { size }, one()))
    );
    let host = td.hypervisor();
    let page = host.behind(PAGE).expect("still there");
    assert_ne!(host.read(page, 6).expect("ram"), b"secret");
}

#[test]
fn a_refusal_is_an_error_with_what_is_left() {
    for status in [
        VmcallStatus::INVALID_OPERAND,
        VmcallStatus::SUBFUNC_UNSUPPORTED,
        VmcallStatus(77),
    ] {
        let td = td(map_gpa_answers(status));
        let result = td.run(|cpu| kernel(cpu).share(one(), no_flush));
        let at = SHARED | PAGE;
        assert_eq!(result.map(cause), Ok((Cause::Host { status, at }, one())));
    }
}

// --- by design --------------------------------------------------------------------------------

#[test]
fn shared_memory_changes_under_the_guest() {
    let td = td(|host, exit| match exit {
        Exit::Vmcall(Vmcall::RdMsr(_)) => {
            host.write(PAGE, b"changed").expect("ram");
            Reply::Enter
        }
        exit => host.honestly(exit),
    });
    let seen = td.run(|cpu| {
        kernel(cpu).share(one(), no_flush).expect("shared");
        cpu.write(SHARED | PAGE, b"checked").expect("shared");
        kernel(cpu).vmcall(Vmcall::RdMsr(0)).expect("the attack");
        cpu.read(SHARED | PAGE, 7).expect("shared")
    });
    assert_eq!(seen, Ok(b"changed".to_vec()), "copy, then check");
}

#[test]
fn a_host_that_does_not_enter_the_guest_denies_service() {
    let result = td(denies_service()).run(|cpu| kernel(cpu).vmcall(Vmcall::RdMsr(0)));
    let stopped = result.expect_err("denied");
    let call = Exit::Vmcall(Vmcall::RdMsr(0));
    assert_eq!(stopped.cause, StopCause::Denied(Box::new(call)));
}

#[test]
fn the_hosts_answers_to_cpuid_and_rdmsr_are_its_own() {
    let lie = Regs {
        r11: 0xBAD,
        r12: 0xBAD,
        ..Regs::default()
    };
    let td = td(move |_, _| Reply::Registers(Box::new(lie)));
    let answers = td.run(|cpu| {
        let mut kernel = kernel(cpu);
        let cpuid = kernel.vmcall(Vmcall::Cpuid {
            leaf: 1,
            subleaf: 0,
        });
        (cpuid, kernel.vmcall(Vmcall::RdMsr(0x1B)))
    });
    let (cpuid, msr) = answers.expect("runs to its end");
    assert_eq!(cpuid.map(|c| c[0]), Ok(0xBAD));
    assert_eq!(msr.map(|m| m[0]), Ok(0xBAD));
}

#[test]
fn the_host_cannot_forge_what_the_module_says() {
    // A host that answers everything with nonsense does not reach VP.INFO.
    let td = td(|_, exit| panic!("{exit:?}"));
    let info = td.run(|cpu| kernel(cpu).info());
    let info = info.expect("no exit").expect("info");
    assert_eq!(info.gpaw.shared_bit(), SHARED);
}
