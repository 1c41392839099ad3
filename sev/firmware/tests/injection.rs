//! Failures on request, and what can be observed.

mod common;

use common::*;
use soft_amd_sp::{Failure, Instruction, Operation, RandomFailures, RmpError, RmpUpdate, Status};

const ASID: u32 = 6;

#[test]
fn every_command_can_be_made_to_fail_with_any_status_without_effect() {
    let p = sev(1);
    let before = p.snapshot();
    for command in Command::ALL {
        for status in [Status::HWERROR_UNSAFE, Status(0x1234)] {
            assert!(p.fail_next(*command, status));
            let mut buffer = vec![0; command.buffer_len()];
            assert_eq!(p.command(*command, &mut buffer), status, "{command}");
            assert_eq!(p.counters().ended_with(*command, status.0.into()), 1);
        }
    }
    assert_eq!(p.snapshot(), before);
}

#[test]
fn the_nth_call_from_now_fails_and_no_other() {
    let p = sev(2);
    let status = || p.run(&mut Nop);
    status().ok().unwrap();
    let operation = Operation::Command(Command::NOP);
    p.fail(Failure {
        operation,
        nth: 3,
        code: Status::HWERROR_PLATFORM.0.into(),
    });
    p.fail(Failure {
        operation,
        nth: 5,
        code: Status::UNSUPPORTED.0.into(),
    });
    let got: Vec<_> = (0..6).map(|_| status()).collect();
    let ok = Status::SUCCESS;
    assert_eq!(
        got,
        [
            ok,
            ok,
            Status::HWERROR_PLATFORM,
            ok,
            Status::UNSUPPORTED,
            ok
        ]
    );
    p.fail_next(Command::NOP, Status::UNSUPPORTED);
    p.clear_failures();
    status().ok().unwrap();
}

#[test]
fn instructions_can_be_made_to_fail() {
    let p = snp(3);
    let fail = |instruction: Instruction, code| {
        assert!(p.fail(Failure {
            operation: instruction.into(),
            nth: 1,
            code
        }));
    };
    for (code, error) in [
        (3, RmpError::InUse),
        (4, RmpError::Overlap),
        (99, RmpError::Other(99)),
    ] {
        fail(Instruction::RmpUpdate, code);
        assert_eq!(p.rmpupdate(0x1000, &RmpUpdate::firmware()), Err(error));
        assert_eq!(p.counters().ended_with(Instruction::RmpUpdate, code), 1);
    }
    p.rmpupdate(0x1000, &RmpUpdate::firmware()).unwrap();
    // A core that does not get to its WBINVD leaves the flush incomplete.
    p.require_df_flush();
    fail(Instruction::Wbinvd, 1);
    p.wbinvd_all();
    assert_eq!(p.run(&mut SnpDfFlush), Status::WBINVD_REQUIRED);
    p.wbinvd_all();
    p.run(&mut SnpDfFlush).ok().unwrap();
}

#[test]
fn a_flush_can_be_demanded_and_guests_limited() {
    let p = sev(4);
    let handle = launch_start(&p, OPEN, ASID);
    deactivate(&p, handle).ok().unwrap();
    flush(&p);
    p.require_df_flush();
    assert_eq!(activate(&p, handle, ASID + 1), Status::DFFLUSH_REQUIRED);
    assert_eq!(p.run(&mut DfFlush), Status::WBINVD_REQUIRED);
    flush(&p);
    activate(&p, handle, ASID + 1).ok().unwrap();
    p.limit_guests(1);
    assert_eq!(run(&p, LaunchStart::default()), Status::RESOURCE_LIMIT);
    p.limit_guests(2);
    run(&p, LaunchStart::default()).ok().unwrap();
}

/// A host that tries again until it succeeds.
fn launch_against(seed: u64) -> (Vec<String>, usize) {
    let p = sev(5);
    p.fail_randomly(RandomFailures {
        seed,
        one_in: 3,
        statuses: vec![Status::HWERROR_PLATFORM, Status::RESOURCE_LIMIT],
        codes: vec![],
    });
    let mut tries = 0;
    let mut until_ok = |attempt: &mut dyn FnMut() -> Status| loop {
        tries += 1;
        assert!(tries < 1000);
        if attempt().is_success() {
            break;
        }
    };
    let mut start = LaunchStart::default();
    until_ok(&mut || p.run(&mut start));
    let handle = start.handle.get();
    until_ok(&mut || activate(&p, handle, ASID));
    until_ok(&mut || update_data(&p, handle, GUEST, 16));
    until_ok(&mut || launch_measure(&p, handle, SCRATCH));
    until_ok(&mut || launch_finish(&p, handle));
    (p.trace().iter().map(ToString::to_string).collect(), tries)
}

#[test]
fn random_failures_replay_from_their_seed() {
    assert_eq!(launch_against(1), launch_against(1));
    let different: std::collections::BTreeSet<_> = (0..8).map(|s| launch_against(s).1).collect();
    assert!(different.len() > 1);
}

#[test]
fn trace_and_counters_tell_what_happened() {
    let p = sev_from(builder(6).trace_capacity(4));
    let handle = launch_start(&p, OPEN, ASID);
    assert_eq!(activate(&p, handle, ASID), Status::ACTIVE);
    p.command(0x7ff_u32, &mut []);
    p.fail_next(Command::NOP, Status::UNSUPPORTED);
    p.run(&mut Nop);
    let trace: Vec<_> = p.trace().iter().map(ToString::to_string).collect();
    assert_eq!(trace.len(), 4);
    assert!(
        trace[1].contains("ACTIVATE") && trace[1].ends_with("ACTIVE (0x12)"),
        "{trace:?}"
    );
    assert!(trace[2].contains("command 0x7ff") && trace[2].ends_with("INVALID_COMMAND (0x11)"));
    assert!(trace[3].ends_with("UNSUPPORTED (0x15) (injected)"));
    let sequences: Vec<_> = p.trace().iter().map(|t| t.sequence).collect();
    assert!(sequences.windows(2).all(|w| w[1] == w[0] + 1));
    let counters = p.counters();
    assert_eq!(counters.calls(Command::ACTIVATE), 2);
    assert_eq!(
        counters.ended_with(Command::ACTIVATE, Status::ACTIVE.0.into()),
        1
    );
    assert_eq!(counters.calls(Instruction::Wbinvd), 2);
    assert_eq!(counters.commands_ended_with(Status::UNSUPPORTED), 1);
    assert!(counters.to_string().contains("LAUNCH_START"));
}

#[test]
fn the_dump_names_guests_asids_and_pages() {
    let p = snp(7);
    snp_launch(&p, 0x1000, SnpPolicy::SMT, 1);
    for i in 0..3 {
        let at = 0x50_0000 + i * 0x1000;
        p.rmpupdate(at, &RmpUpdate::guest(1, at)).unwrap();
    }
    let dump = p.snapshot().to_string();
    for line in [
        "platform UNINIT, snp INIT",
        "gctx 0x1000 LAUNCH policy 0x30000 asid 0x1",
        "asid 0x1: gctx 0x1000",
        "rmp: 2 ranges outside hypervisor state",
        "0x0000500000-0x0000502fff     3 pages Guest-Invalid 4K asid 0x1 gpa 0x500000",
    ] {
        assert!(dump.contains(line), "{line:?} is not in\n{dump}");
    }
}

#[test]
fn plans_are_bounded() {
    let p = sev(8);
    let operation = Operation::Command(Command::NOP);
    let planned = (0..10_000)
        .filter(|_| {
            p.fail(Failure {
                operation,
                nth: 9,
                code: 1,
            })
        })
        .count();
    assert_eq!(planned, 4096);
}
