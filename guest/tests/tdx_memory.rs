//! Attacks of a hostile host on the private memory of a TD, and the TD's view of them. Each test is a
//! row of docs/hostile-host.md.

mod common;

use common::td::{Exit, Guest, Host, Reply, regs};
use kvm_ops_guest::tdx::{TdInfo, VeKind, Vmcall, VmcallStatus};
use kvm_ops_guest::{Flush, GpaRange, Privacy, Record, RecordError};
use soft_tdx_module::{Code, HostLeaf as L, SeptState};

const PAGE: u64 = 0x8000;

fn one() -> GpaRange {
    GpaRange::new(PAGE, 0x1000).expect("a range")
}

fn no_flush(_: Flush) {}

/// A TD that owns an accepted page with "secret" in it and waits in a call to its host, which does
/// what `attack` says before it enters again; then the guest goes on with `after`.
fn with_secret<R: Send>(
    attributes: u64,
    mut attack: impl FnMut(&mut Host),
    after: impl FnOnce(&mut Guest) -> R + Send,
    mut later: impl FnMut(&mut Host, Exit) -> Reply,
) -> Option<R> {
    let mut host = Host::new(attributes);
    host.aug(PAGE, 0);
    host.run(
        |cpu: &mut Guest| {
            cpu.kernel().accept(one()).expect("accepted");
            cpu.write(PAGE, b"secret").expect("ours");
            cpu.kernel().vmcall(Vmcall::RdMsr(0)).expect("the attack");
            after(cpu)
        },
        |host, exit| match exit {
            Exit::Vmcall(r) if r.r11 == 31 => {
                attack(host);
                Reply::Status(VmcallStatus::SUCCESS, 0)
            }
            exit => later(host, exit),
        },
    )
}

fn unexpected(_: &mut Host, exit: Exit) -> Reply {
    panic!("{exit:?}")
}

// --- private pages ----------------------------------------------------------------------------

#[test]
fn a_page_taken_away_and_given_anew_raises_ve_and_is_not_silently_zero() {
    let swap = |host: &mut Host| {
        host.remove(PAGE, 0);
        host.aug(PAGE, 0);
    };
    let after = |cpu: &mut Guest| {
        let event = cpu.read(PAGE, 6).expect_err("pending");
        assert_eq!(event.vector, 20);
        let gpaw = cpu.kernel().gpaw();
        let info = cpu.kernel().ve_info().expect("module").expect("one");
        info.kind(gpaw)
    };
    let kind = with_secret(0, swap, after, unexpected);
    assert_eq!(kind, Some(VeKind::NotAccepted { gpa: PAGE }));
}

#[test]
fn with_sept_ve_disable_it_stops_the_vcpu_instead() {
    let swap = |host: &mut Host| {
        host.remove(PAGE, 0);
        host.aug(PAGE, 0);
    };
    let mut entries = 0;
    let result = with_secret(
        TdInfo::SEPT_VE_DISABLE,
        swap,
        |cpu| cpu.read(PAGE, 6),
        |_, exit| match exit {
            Exit::Violation { gpa: PAGE, .. } if entries < 5 => {
                entries += 1;
                Reply::Enter
            }
            Exit::Violation {
                gpa: PAGE,
                extended,
            } => {
                assert_eq!(extended & 0xF, 6, "pending");
                Reply::Stop
            }
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(result, None, "nothing was read");
}

#[test]
fn a_guest_that_accepts_again_gets_zeros_without_any_fault() {
    // Why accepting in a #VE handler is wrong: the module cannot tell this from the first time.
    let swap = |host: &mut Host| {
        host.remove(PAGE, 0);
        host.aug(PAGE, 0);
    };
    let after = |cpu: &mut Guest| {
        cpu.kernel().accept(one()).expect("the module says success");
        cpu.read(PAGE, 6).expect("accepted")
    };
    assert_eq!(with_secret(0, swap, after, unexpected), Some(vec![0; 6]));
}

#[test]
fn a_guest_with_a_record_does_not_accept_again() {
    let swap = |host: &mut Host| {
        host.remove(PAGE, 0);
        host.aug(PAGE, 0);
    };
    let after = |cpu: &mut Guest| {
        let mut bits = [0];
        let mut record = Record::new(&mut bits, 0).expect("fits");
        record.claim(one()).expect("as it was accepted at first");
        let gpaw = cpu.kernel().gpaw();
        cpu.read(PAGE, 6).expect_err("pending");
        let info = cpu.kernel().ve_info().expect("module").expect("one");
        let VeKind::NotAccepted { gpa } = info.kind(gpaw) else {
            panic!("{info:?}");
        };
        (record.is_private(gpa), record.claim(one()))
    };
    let is = Privacy::Private;
    let refused = Err(RecordError::Already { gpa: PAGE, is });
    assert_eq!(
        with_secret(0, swap, after, unexpected),
        Some((true, refused))
    );
}

#[test]
fn a_page_taken_away_for_good_stops_the_vcpu() {
    let result = with_secret(
        0,
        |host| host.remove(PAGE, 0),
        |cpu| cpu.read(PAGE, 6),
        |_, exit| match exit {
            Exit::Violation { gpa: PAGE, .. } => Reply::Stop,
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(result, None);
}

#[test]
fn one_page_at_two_addresses_is_refused_by_the_module() {
    let attack = |host: &mut Host| {
        let page = host.behind(PAGE);
        let status = host.aug_page(PAGE + 0x1000, 0, page);
        assert_eq!(status.code(), Code::PAGE_METADATA_INCORRECT);
        assert_eq!(host.entry(PAGE + 0x1000, 0), (0, SeptState::Free));
    };
    let data = with_secret(
        0,
        attack,
        |cpu| cpu.read(PAGE, 6).expect("ours"),
        unexpected,
    );
    assert_eq!(data, Some(b"secret".to_vec()));
}

#[test]
fn a_second_page_at_an_address_is_refused_by_the_module() {
    let attack = |host: &mut Host| {
        let other = host.page(0);
        let status = host.aug_page(PAGE, 0, other);
        assert_eq!(status.code(), Code::EPT_ENTRY_STATE_INCORRECT);
    };
    let data = with_secret(
        0,
        attack,
        |cpu| cpu.read(PAGE, 6).expect("ours"),
        unexpected,
    );
    assert_eq!(data, Some(b"secret".to_vec()));
}

#[test]
fn a_removal_without_tlb_tracking_is_refused_by_the_module() {
    let attack = |host: &mut Host| {
        host.ok(L::MemRangeBlock, regs(PAGE, host.tdr));
        let status = host.status(L::MemPageRemove, regs(PAGE, host.tdr));
        assert_eq!(status.code(), Code::TLB_TRACKING_NOT_DONE);
        let status = host.status(L::MemRangeUnblock, regs(PAGE, host.tdr));
        assert_eq!(status.code(), Code::TLB_TRACKING_NOT_DONE);
        host.ok(L::MemTrack, regs(host.tdr, 0));
        host.ok(L::MemRangeUnblock, regs(PAGE, host.tdr));
    };
    let data = with_secret(0, attack, |cpu| cpu.read(PAGE, 6), unexpected);
    assert_eq!(data, Some(Ok(b"secret".to_vec())));
}

#[test]
fn a_page_moved_to_other_memory_keeps_its_contents() {
    let attack = |host: &mut Host| {
        let (old, new) = (host.behind(PAGE), host.page(0));
        host.ok(L::MemRangeBlock, regs(PAGE, host.tdr));
        host.ok(L::MemTrack, regs(host.tdr, 0));
        let operands = soft_tdx_module::Regs {
            r8: new,
            ..regs(PAGE, host.tdr)
        };
        host.ok(L::MemPageRelocate, operands);
        assert_ne!(old, new);
        assert_eq!(host.behind(PAGE), new);
    };
    let data = with_secret(0, attack, |cpu| cpu.read(PAGE, 6), unexpected);
    assert_eq!(data, Some(Ok(b"secret".to_vec())));
}

// --- contents ---------------------------------------------------------------------------------

#[test]
fn the_host_reads_ciphertext() {
    let attack = |host: &mut Host| {
        let seen = host.read(host.behind(PAGE), 4096);
        assert!(!seen.windows(6).any(|w| w == b"secret"));
    };
    with_secret(0, attack, |_| (), unexpected).expect("runs on");
}

/// Runs an attack on contents and expects that the TD is lost at its next read.
fn kills(attack: impl FnMut(&mut Host)) {
    let mut lost = None;
    let read = with_secret(
        0,
        attack,
        |cpu| cpu.read(PAGE, 6),
        |_, exit| match exit {
            Exit::Lost(status) => {
                lost = Some(status.code());
                Reply::Stop
            }
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(read, None, "altered data was read");
    assert_eq!(lost, Some(Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE));
}

#[test]
fn a_write_by_the_host_kills_the_td_at_its_next_read() {
    kills(|host| host.write(host.behind(PAGE), b"forged"));
}

#[test]
fn replayed_ciphertext_kills_the_td() {
    // Even the bytes that were there, written back by the host: its key id is not the TD's.
    kills(|host| {
        let page = host.behind(PAGE);
        let old = host.read(page, 4096);
        host.write(page, &old);
    });
}

#[test]
fn ciphertext_of_another_page_kills_the_td() {
    kills(|host| {
        let other = host.aug(PAGE + 0x1000, 0);
        let bytes = host.read(other, 4096);
        host.write(host.behind(PAGE), &bytes);
    });
}

#[test]
fn a_missing_cache_flush_of_the_host_hurts_only_availability() {
    // The host turns a shared page private without writing its dirty line back; the line lands
    // after the guest accepted.
    let mut host = Host::new(0);
    let mut lost = false;
    let result = host.run(
        |cpu: &mut Guest| {
            cpu.kernel().unshare(one(), no_flush).expect("private");
            cpu.write(PAGE, b"secret").expect("ours");
            cpu.kernel().vmcall(Vmcall::RdMsr(0)).expect("the attack");
            cpu.read(PAGE, 6)
        },
        |host, exit| match exit {
            Exit::MapGpa { gpa, bytes } => {
                host.map_gpa(gpa, bytes);
                Reply::Status(VmcallStatus::SUCCESS, 0)
            }
            Exit::Vmcall(_) => {
                host.write(host.behind(PAGE), b"stale line");
                Reply::Status(VmcallStatus::SUCCESS, 0)
            }
            Exit::Lost(_) => {
                lost = true;
                Reply::Stop
            }
            other => panic!("{other:?}"),
        },
    );
    assert_eq!((result, lost), (None, true));
}
