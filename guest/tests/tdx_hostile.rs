//! Answers of a hostile host to a TD, and the TD's view of them. Each test is a row of
//! docs/hostile-host.md.

mod common;

use common::td::{Exit, Guest, Host, LARGE, Reply, SHARED};
use kvm_ops_guest::tdx::{Cause, ConvertError, Limits, TdError, Vmcall, VmcallStatus};
use kvm_ops_guest::{Flush, GpaRange, PageSize, Privacy};

const PAGE: u64 = 0x8000;

fn range(start: u64, bytes: u64) -> GpaRange {
    GpaRange::new(start, bytes).expect("a range")
}

fn one() -> GpaRange {
    range(PAGE, 0x1000)
}

fn no_flush(_: Flush) {}

fn cause(result: Result<(), TdError>) -> (Cause, GpaRange) {
    match result {
        Err(TdError::Convert(ConvertError { cause, rest })) => (cause, rest),
        other => panic!("{other:?}"),
    }
}

fn unexpected(_: &mut Host, exit: Exit) -> Reply {
    panic!("{exit:?}")
}

// --- MapGPA ---------------------------------------------------------------------------------

#[test]
fn retry_for_ever_is_given_up() {
    let mut host = Host::new(0);
    let mut calls = 0;
    let result = host.run(
        |cpu: &mut Guest| cpu.kernel().share(one(), no_flush),
        |_, exit| match exit {
            Exit::MapGpa { gpa, .. } => {
                calls += 1;
                Reply::Status(VmcallStatus::RETRY, gpa)
            }
            other => panic!("{other:?}"),
        },
    );
    let tries = Limits::DEFAULT.stalled_retries;
    assert_eq!(
        result.map(cause),
        Some((Cause::NoProgress { tries }, one()))
    );
    assert_eq!(calls, tries);
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
        for to in [Privacy::Private, Privacy::Shared] {
            let mut answered = 0;
            let result = Host::new(0).run(
                |cpu: &mut Guest| match to {
                    Privacy::Private => cpu.kernel().unshare(whole, no_flush),
                    Privacy::Shared => cpu.kernel().share(whole, no_flush),
                },
                |_, exit| match exit {
                    Exit::MapGpa { gpa, .. } => {
                        answered = wrong(gpa);
                        Reply::Status(VmcallStatus::RETRY, answered)
                    }
                    other => panic!("{other:?}"),
                },
            );
            let answer = answered;
            assert_eq!(
                result.map(cause),
                Some((Cause::RetryOutside { answer }, whole))
            );
        }
    }
}

#[test]
fn progress_by_single_pages_is_slow_but_ends() {
    let mut calls = 0;
    let result = Host::new(0).run(
        |cpu: &mut Guest| cpu.kernel().share(range(LARGE, LARGE), no_flush),
        |_, exit| match exit {
            Exit::MapGpa { gpa, bytes } => {
                calls += 1;
                match bytes {
                    0x1000 => Reply::Status(VmcallStatus::SUCCESS, 0),
                    _ => Reply::Status(VmcallStatus::RETRY, gpa + 0x1000),
                }
            }
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(result, Some(Ok(())));
    assert_eq!(calls, 512);
}

#[test]
fn success_without_a_private_page_keeps_the_guest_from_running() {
    let mut entries = 0;
    let result = Host::new(0).run(
        |cpu: &mut Guest| cpu.kernel().unshare(one(), no_flush),
        |_, exit| match exit {
            Exit::MapGpa { .. } => Reply::Status(VmcallStatus::SUCCESS, 0),
            Exit::Violation { gpa: PAGE, .. } if entries < 20 => {
                entries += 1;
                Reply::Enter
            }
            Exit::Violation { gpa: PAGE, .. } => Reply::Stop,
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(result, None, "the guest never got a page it did not accept");
}

#[test]
fn success_without_sharing_shows_when_the_page_is_to_be_private_again() {
    // The host confirms MapGPA both ways and leaves the private page where it was.
    let mut host = Host::new(0);
    host.aug(PAGE, 0);
    let result = host.run(
        |cpu: &mut Guest| {
            cpu.kernel().accept(one()).expect("accepted");
            cpu.write(PAGE, b"secret").expect("ours");
            cpu.kernel().share(one(), no_flush).expect("says the host");
            cpu.kernel().unshare(one(), no_flush)
        },
        |_, exit| match exit {
            Exit::MapGpa { .. } => Reply::Status(VmcallStatus::SUCCESS, 0),
            other => panic!("{other:?}"),
        },
    );
    let size = PageSize::Size4K;
    assert_eq!(
        result.map(cause),
        Some((Cause::AlreadyAccepted { size }, one()))
    );
    assert_ne!(host.read(host.behind(PAGE), 6), b"secret");
}

#[test]
fn a_refusal_is_an_error_with_what_is_left() {
    for status in [
        VmcallStatus::INVALID_OPERAND,
        VmcallStatus::SUBFUNC_UNSUPPORTED,
        VmcallStatus(77),
    ] {
        let result = Host::new(0).run(
            |cpu: &mut Guest| cpu.kernel().share(one(), no_flush),
            |_, exit| match exit {
                Exit::MapGpa { gpa, .. } => Reply::Status(status, gpa),
                other => panic!("{other:?}"),
            },
        );
        let at = SHARED | PAGE;
        assert_eq!(result.map(cause), Some((Cause::Host { status, at }, one())));
    }
}

// --- by design --------------------------------------------------------------------------------

#[test]
fn shared_memory_changes_under_the_guest() {
    let mut host = Host::new(0);
    let seen = host.run(
        |cpu: &mut Guest| {
            cpu.kernel().share(one(), no_flush).expect("shared");
            cpu.write(SHARED | PAGE, b"checked").expect("shared");
            cpu.kernel().vmcall(Vmcall::RdMsr(0)).expect("the attack");
            cpu.read(SHARED | PAGE, 7).expect("shared")
        },
        |host, exit| {
            if let Exit::Vmcall(_) = exit {
                host.write(PAGE, b"changed");
            }
            Reply::Status(VmcallStatus::SUCCESS, 0)
        },
    );
    assert_eq!(seen, Some(b"changed".to_vec()), "copy, then check");
}

#[test]
fn a_host_that_does_not_enter_the_guest_denies_service() {
    let mut host = Host::new(0);
    let result = host.run(
        |cpu: &mut Guest| cpu.kernel().vmcall(Vmcall::RdMsr(0)),
        |_, _| Reply::Stop,
    );
    assert_eq!(result, None);
}

#[test]
fn the_hosts_answers_to_cpuid_and_rdmsr_are_its_own() {
    let lie = soft_tdx_module::Regs {
        r11: 0xBAD,
        r12: 0xBAD,
        ..soft_tdx_module::Regs::default()
    };
    let (cpuid, msr) = Host::new(0)
        .run(
            |cpu: &mut Guest| {
                let mut kernel = cpu.kernel();
                let cpuid = kernel.vmcall(Vmcall::Cpuid {
                    leaf: 1,
                    subleaf: 0,
                });
                (cpuid, kernel.vmcall(Vmcall::RdMsr(0x1B)))
            },
            |_, _| Reply::Registers(lie),
        )
        .expect("runs to its end");
    assert_eq!(cpuid.map(|c| c[0]), Ok(0xBAD));
    assert_eq!(msr.map(|m| m[0]), Ok(0xBAD));
}

#[test]
fn the_host_cannot_forge_what_the_module_says() {
    // A host that answers everything with nonsense does not reach VP.INFO.
    let mut host = Host::new(0);
    let info = host.run(|cpu: &mut Guest| cpu.kernel().info(), unexpected);
    let info = info.expect("no exit").expect("info");
    assert_eq!(info.gpaw.shared_bit(), SHARED);
}
