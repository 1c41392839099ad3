//! Attacks of a hostile host on the private memory of a TD, and the TD's view of them. Each test is a
//! row of docs/hostile-host.md.

mod common;

use common::{kernel, no_flush, range};
use kvm_ops_guest::tdx::{TdInfo, VeKind, Vmcall};
use kvm_ops_guest::{GpaRange, PageSize, Privacy, Record, RecordError};
use kvm_ops_guest_test::tdx::module::{Code, HostLeaf as L, SeptState};
use kvm_ops_guest_test::tdx::{
    Exit, Fault, Hypervisor, MachineError, Reply, StopCause, Stopped, TestTd, Vcpu, ViolationBy,
    module,
};
use std::error::Error;

const PAGE: u64 = 0x8000;
const SMALL: PageSize = PageSize::Size4K;

fn one() -> GpaRange {
    range(PAGE, 0x1000)
}

/// A TD that owns an accepted page with "secret" in it and waits in a call to its host, which does
/// what `attack` says before it enters again; then the guest goes on with `after`.
fn with_secret<R>(
    attributes: u64,
    mut attack: impl FnMut(&Hypervisor<'_>) + Send + 'static,
    after: impl FnOnce(&mut Vcpu) -> R,
) -> Result<R, Stopped> {
    let host = move |host: &Hypervisor<'_>, exit: &Exit| match exit {
        Exit::Vmcall(Vmcall::RdMsr(_)) => {
            attack(host);
            Reply::Enter
        }
        exit => host.honestly(exit),
    };
    let td = TestTd::builder()
        .attributes(attributes)
        .pending(PAGE..PAGE + 0x1000)
        .host(host)
        .build()
        .expect("a td");
    td.run(|cpu| {
        kernel(cpu).accept(one()).expect("accepted");
        cpu.write(PAGE, b"secret").expect("ours");
        kernel(cpu).vmcall(Vmcall::RdMsr(0)).expect("the attack");
        after(cpu)
    })
}

fn swap(host: &Hypervisor<'_>) {
    host.take(PAGE, SMALL).expect("the host's right");
    host.give(PAGE, SMALL).expect("the host's right");
}

/// The host address of the page.
fn behind(host: &Hypervisor<'_>) -> u64 {
    host.behind(PAGE).expect("there")
}

fn status(host: &Hypervisor<'_>, leaf: L, operands: [u64; 3]) -> module::Status {
    host.seamcall(leaf, operands).expect("executes")
}

fn code(refused: Result<(), MachineError>) -> Code {
    let error = refused.expect_err("refused");
    match error.source().and_then(|error| error.downcast_ref()) {
        Some(module::CallError::Leaf { status, .. }) => status.code(),
        other => panic!("{other:?}"),
    }
}

/// The information of the #VE that a read of the page raises.
fn ve_at_read(cpu: &mut Vcpu) -> VeKind {
    match cpu.read(PAGE, 6) {
        Err(Fault::Exception(exception)) => assert!(exception.is_ve(), "{exception}"),
        other => panic!("{other:?}"),
    }
    let gpaw = kernel(cpu).gpaw();
    let info = kernel(cpu).ve_info().expect("module").expect("one");
    info.kind(gpaw)
}

// --- private pages ----------------------------------------------------------------------------

#[test]
fn a_page_taken_away_and_given_anew_raises_ve_and_is_not_silently_zero() {
    let kind = with_secret(0, swap, ve_at_read);
    assert_eq!(kind, Ok(VeKind::NotAccepted { gpa: PAGE }));
}

#[test]
fn with_sept_ve_disable_it_stops_the_vcpu_instead() {
    let mut entries = 0;
    let result = with_secret(TdInfo::SEPT_VE_DISABLE, swap, |cpu| {
        cpu.read(PAGE, 6).map_err(|fault| fault.to_string())
    });
    let error = result
        .expect("the read ends")
        .expect_err("nothing was read");
    assert!(error.contains("0x8000: the page is pending"), "{error}");
    // Entering again does not help.
    let stubborn = TestTd::builder()
        .pending(PAGE..PAGE + 0x1000)
        .host(move |_, exit| match exit {
            Exit::Violation { gpa: PAGE, by } if entries < 5 => {
                assert_eq!(*by, ViolationBy::PendingAccess);
                entries += 1;
                Reply::Enter
            }
            _ => Reply::Stop,
        })
        .build()
        .expect("a td");
    let read = stubborn
        .run(|cpu| cpu.read(PAGE, 6))
        .expect("the read ends");
    assert!(read.is_err(), "nothing was read");
    assert_eq!(stubborn.take_exits().len(), 6);
}

#[test]
fn a_guest_that_accepts_again_gets_zeros_without_any_fault() {
    // Why accepting in a #VE handler is wrong: the module cannot tell this from the first time.
    let after = |cpu: &mut Vcpu| {
        kernel(cpu).accept(one()).expect("the module says success");
        cpu.read(PAGE, 6).expect("accepted")
    };
    assert_eq!(with_secret(0, swap, after), Ok(vec![0; 6]));
}

#[test]
fn a_guest_with_a_record_does_not_accept_again() {
    let after = |cpu: &mut Vcpu| {
        let mut bits = [0];
        let mut record = Record::new(&mut bits, 0).expect("fits");
        record.claim(one()).expect("as it was accepted at first");
        let VeKind::NotAccepted { gpa } = ve_at_read(cpu) else {
            panic!("another reason");
        };
        (record.is_private(gpa), record.claim(one()))
    };
    let is = Privacy::Private;
    let refused = Err(RecordError::Already { gpa: PAGE, is });
    assert_eq!(with_secret(0, swap, after), Ok((true, refused)));
}

#[test]
fn a_page_taken_away_for_good_stops_the_vcpu() {
    let td = TestTd::builder()
        .accepted(PAGE..PAGE + 0x1000)
        .host(|host, exit| match exit {
            Exit::Vmcall(_) => {
                host.take(PAGE, SMALL).expect("the host's right");
                Reply::Enter
            }
            _ => Reply::Stop,
        })
        .build()
        .expect("a td");
    let read = td.run(|cpu| {
        kernel(cpu).vmcall(Vmcall::RdMsr(0)).expect("the attack");
        cpu.read(PAGE, 6)
    });
    let Ok(Err(Fault::Stopped(stopped))) = read else {
        panic!("{read:?}");
    };
    let violation = Exit::Violation {
        gpa: PAGE,
        by: ViolationBy::Access,
    };
    assert_eq!(stopped.cause, StopCause::Denied(Box::new(violation)));
}

#[test]
fn one_page_at_two_addresses_is_refused_by_the_module() {
    let attack = |host: &Hypervisor<'_>| {
        let refused = host.give_page(PAGE + 0x1000, SMALL, behind(host));
        assert_eq!(code(refused), Code::PAGE_METADATA_INCORRECT);
        let view = host.entry(PAGE + 0x1000, SMALL);
        assert_eq!((view.level, view.state), (0, SeptState::Free));
    };
    let data = with_secret(0, attack, |cpu| cpu.read(PAGE, 6));
    assert_eq!(data, Ok(Ok(b"secret".to_vec())));
}

#[test]
fn a_second_page_at_an_address_is_refused_by_the_module() {
    let attack = |host: &Hypervisor<'_>| {
        let other = host.free_page(SMALL).expect("one");
        let refused = host.give_page(PAGE, SMALL, other);
        assert_eq!(code(refused), Code::EPT_ENTRY_STATE_INCORRECT);
    };
    let data = with_secret(0, attack, |cpu| cpu.read(PAGE, 6));
    assert_eq!(data, Ok(Ok(b"secret".to_vec())));
}

#[test]
fn a_removal_without_tlb_tracking_is_refused_by_the_module() {
    let attack = |host: &Hypervisor<'_>| {
        let at = [PAGE, host.tdr(), 0];
        assert_eq!(status(host, L::MemRangeBlock, at), module::Status::SUCCESS);
        let refused = status(host, L::MemPageRemove, at);
        assert_eq!(refused.code(), Code::TLB_TRACKING_NOT_DONE);
        let refused = status(host, L::MemRangeUnblock, at);
        assert_eq!(refused.code(), Code::TLB_TRACKING_NOT_DONE);
        let track = status(host, L::MemTrack, [host.tdr(), 0, 0]);
        assert_eq!(track, module::Status::SUCCESS);
        assert_eq!(
            status(host, L::MemRangeUnblock, at),
            module::Status::SUCCESS
        );
    };
    let data = with_secret(0, attack, |cpu| cpu.read(PAGE, 6));
    assert_eq!(data, Ok(Ok(b"secret".to_vec())));
}

#[test]
fn a_page_moved_to_other_memory_keeps_its_contents() {
    let attack = |host: &Hypervisor<'_>| {
        let (old, new) = (behind(host), host.free_page(SMALL).expect("one"));
        let at = [PAGE, host.tdr(), 0];
        assert_eq!(status(host, L::MemRangeBlock, at), module::Status::SUCCESS);
        let track = status(host, L::MemTrack, [host.tdr(), 0, 0]);
        assert_eq!(track, module::Status::SUCCESS);
        let moved = status(host, L::MemPageRelocate, [PAGE, host.tdr(), new]);
        assert_eq!(moved, module::Status::SUCCESS);
        assert_ne!(old, new);
        assert_eq!(behind(host), new);
    };
    let data = with_secret(0, attack, |cpu| cpu.read(PAGE, 6));
    assert_eq!(data, Ok(Ok(b"secret".to_vec())));
}

// --- contents ---------------------------------------------------------------------------------

#[test]
fn the_host_reads_ciphertext() {
    let attack = |host: &Hypervisor<'_>| {
        let seen = host.read(behind(host), 4096).expect("ram");
        assert!(!seen.windows(6).any(|w| w == b"secret"));
    };
    with_secret(0, attack, |_| ()).expect("runs on");
}

/// Runs an attack on contents and expects that the TD is lost at its next read.
fn kills(attack: impl FnMut(&Hypervisor<'_>) + Send + 'static) {
    let read = with_secret(0, attack, |cpu| cpu.read(PAGE, 6));
    let Ok(Err(Fault::Stopped(stopped))) = read else {
        panic!("altered data was read: {read:?}");
    };
    is_lost(&stopped);
}

fn is_lost(stopped: &Stopped) {
    match stopped.cause {
        StopCause::Lost(status) => {
            assert_eq!(status.code(), Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE);
        }
        _ => panic!("{stopped}"),
    }
}

#[test]
fn a_write_by_the_host_kills_the_td_at_its_next_read() {
    kills(|host| host.write(behind(host), b"forged").expect("ram"));
}

#[test]
fn replayed_ciphertext_kills_the_td() {
    // Even the bytes that were there, written back by the host: its key id is not the TD's.
    kills(|host| {
        let page = behind(host);
        let old = host.read(page, 4096).expect("ram");
        host.write(page, &old).expect("ram");
    });
}

#[test]
fn ciphertext_of_another_page_kills_the_td() {
    kills(|host| {
        let other = host.give(PAGE + 0x1000, SMALL).expect("given");
        let bytes = host.read(other, 4096).expect("ram");
        host.write(behind(host), &bytes).expect("ram");
    });
}

#[test]
fn a_missing_cache_flush_of_the_host_hurts_only_availability() {
    // The host turns a shared page private without writing its dirty line back; the line lands
    // after the guest accepted.
    let td = TestTd::builder()
        .shared(PAGE..PAGE + 0x1000)
        .host(|host, exit| match exit {
            Exit::Vmcall(_) => {
                host.write(behind(host), b"stale line").expect("ram");
                Reply::Enter
            }
            exit => host.honestly(exit),
        })
        .build()
        .expect("a td");
    let read = td.run(|cpu| {
        kernel(cpu).unshare(one(), no_flush).expect("private");
        cpu.write(PAGE, b"secret").expect("ours");
        kernel(cpu).vmcall(Vmcall::RdMsr(0)).expect("the attack");
        cpu.read(PAGE, 6)
    });
    let Ok(Err(Fault::Stopped(stopped))) = read else {
        panic!("altered data was read: {read:?}");
    };
    is_lost(&stopped);
}
