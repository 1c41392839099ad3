//! Migration of a TD by bundles that pass through the host's memory, with honest and hostile hosts.

mod common;
#[path = "common/migration.rs"]
mod migration;

#[path = "common/unreplayed.rs"]
mod unreplayed;

use common::{Td, holding, regs};
use migration::{Bundle, MIGRATE, Migration};
use soft_tdx_module::{
    Code, EventType, GuestOp, HostLeaf as L, LockMode, LockTarget, OpState, Outcome, Status, VmExit,
};
use std::sync::{Arc, Mutex};

const PAGES: u64 = 8;
const VMCALL: u64 = 77;

fn gpas() -> Vec<u64> {
    (0..PAGES).map(|n| n << 12).collect()
}

/// A session with the source paused and `PAGES` pages to send.
fn paused(encrypt: bool) -> Migration {
    let mut m = Migration::new(PAGES, encrypt);
    m.begin();
    m.target_tables(PAGES);
    m.source.ok(&m.p, L::ExportPause, regs(m.source.tdr, 0));
    m
}

/// The first byte of each page, as the target's guest reads it.
fn read_by_target(m: &Migration) -> Vec<u8> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let into = log.clone();
    let mut next = 0;
    m.p.set_guest(m.target.tdvpr, move |last: &Outcome| {
        if let Outcome::Data(d) = last {
            into.lock().expect("log").push(d[0]);
        }
        next += 1;
        match next {
            n if n <= PAGES => GuestOp::Read {
                gpa: (n - 1) << 12,
                len: 1,
            },
            _ => GuestOp::vmcall(12, [0; 4]),
        }
    });
    assert_eq!(m.target.enter(&m.p).rax, VMCALL);
    let mut log = log.lock().expect("log");
    std::mem::take(&mut log)
}

fn migrates(encrypt: bool) {
    let mut m = paused(encrypt);
    let b = Bundle::of_stream(0);
    assert_eq!(m.export(&b, &gpas()), Status::SUCCESS);
    assert_eq!(m.import(&b, PAGES), Status::SUCCESS);
    m.state_bundles();
    m.token(true);
    assert_eq!(m.state(), [OpState::PostExport, OpState::PostImport]);
    m.target.ok(&m.p, L::ImportEnd, regs(m.target.tdr, 0));
    let [source, target] = [&m.source, &m.target].map(|td| m.p.td(td.tdr).expect("a td"));
    assert_eq!(target.op_state, OpState::Runnable);
    assert_eq!(target.mrtd, source.mrtd);
    assert_eq!(target.rtmr, source.rtmr);
    assert_eq!(target.num_vcpus, source.num_vcpus);
    assert_eq!(
        read_by_target(&m),
        (0..PAGES as u8).collect::<Vec<_>>(),
        "every page has its contents"
    );
}

#[test]
fn a_td_runs_where_it_was_imported_with_its_memory_and_measurements() {
    migrates(false);
}

#[test]
fn a_td_migrates_through_encrypted_memory() {
    migrates(true);
}

/// An interrupt that the source's guest was about to handle, when the push to its stack made an EPT violation.
#[test]
fn an_event_that_an_exit_interrupted_is_delivered_at_the_target() {
    const VECTOR: u8 = 0x40;
    let interrupted = VmExit {
        reason: 48,
        gpa: PAGES << 12,
        idt_vectoring: 0x8000_0000 | u64::from(VECTOR),
        ..VmExit::default()
    };
    let mut m = Migration::new(PAGES, false);
    m.begin();
    m.target_tables(PAGES);
    m.p.set_guest(m.source.tdvpr, move |_: &Outcome| {
        GuestOp::Fault(interrupted)
    });
    let exit = m.source.enter(&m.p).rax;
    assert_eq!(exit, u64::from(interrupted.reason));
    m.source.ok(&m.p, L::ExportPause, regs(m.source.tdr, 0));
    m.state_bundles();
    m.token(true);
    m.target.ok(&m.p, L::ImportEnd, regs(m.target.tdr, 0));
    let delivered = Arc::new(Mutex::new(Vec::new()));
    let into = delivered.clone();
    m.p.set_guest(m.target.tdvpr, move |last: &Outcome| {
        if let Outcome::Event(event) = last {
            into.lock().expect("log").push((event.kind, event.vector));
        }
        GuestOp::vmcall(12, [0; 4])
    });
    for _ in 0..2 {
        assert_eq!(m.target.enter(&m.p).rax, VMCALL);
    }
    let delivered = delivered.lock().expect("log").clone();
    assert_eq!(delivered, [(EventType::Interrupt, VECTOR)]);
}

#[test]
fn pages_may_follow_after_the_target_runs() {
    let mut m = paused(false);
    m.state_bundles();
    m.token(true);
    m.target.ok(&m.p, L::ImportCommit, regs(m.target.tdr, 0));
    assert_eq!(m.state()[1], OpState::LiveImport);
    let b = Bundle::of_stream(1);
    assert_eq!(m.export(&b, &gpas()), Status::SUCCESS);
    assert_eq!(m.import(&b, PAGES), Status::SUCCESS);
    assert_eq!(read_by_target(&m), (0..PAGES as u8).collect::<Vec<_>>());
}

#[test]
fn the_source_runs_on_after_an_abort_before_the_start_token() {
    let m = paused(false);
    m.export(&Bundle::of_stream(0), &gpas());
    m.source.ok(&m.p, L::ExportAbort, regs(m.source.tdr, 0));
    assert_eq!(m.state()[0], OpState::Runnable);
    m.p.set_guest(m.source.tdvpr, |_: &Outcome| GuestOp::vmcall(12, [0; 4]));
    assert_eq!(m.source.enter(&m.p).rax, VMCALL);
}

#[test]
fn after_the_start_token_only_the_targets_abort_token_lets_the_source_run() {
    let mut m = paused(false);
    m.state_bundles();
    m.token(true);
    let b = Bundle::of_stream(0);
    let abort = |m: &Migration| m.source.status(&m.p, L::ExportAbort, b.token(m.source.tdr));
    // The start token is still in the buffer.
    assert_eq!(abort(&m).code(), Code::INVALID_MBMD);
    let r = b.token(m.target.tdr);
    assert!(!m.target.status(&m.p, L::ImportAbort, r).is_error());
    assert_eq!(m.state()[1], OpState::FailedImport);
    assert_eq!(abort(&m), Status::SUCCESS);
    assert_eq!(m.state()[0], OpState::Runnable);
}

#[test]
fn a_bundle_imports_once() {
    let mut m = paused(false);
    let b = Bundle::of_stream(0);
    m.export(&b, &gpas());
    assert_eq!(m.import(&b, PAGES), Status::SUCCESS);
    assert_eq!(m.import(&b, PAGES).code(), Code::INVALID_MBMD);
    assert_eq!(m.state(), [OpState::PausedExport, OpState::MemoryImport]);
}

#[test]
fn no_changed_bit_of_an_mbmd_is_taken() {
    let mut m = paused(false);
    let b = Bundle::of_stream(0);
    m.export(&b, &gpas());
    let mut good = [0; 48];
    m.p.read_memory(b.mbmd(), &mut good).expect("shared memory");
    for bit in 0..48 * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        m.p.write_memory(b.mbmd(), &bad).expect("shared memory");
        let r = b.memory(m.target.tdr, PAGES);
        let code = m.target.status(&m.p, L::ImportMem, r).code();
        let refused = [Code::INVALID_MBMD, Code::INCORRECT_MBMD_MAC];
        assert!(refused.contains(&code), "bit {bit}: {code:?}");
        assert_eq!(m.state()[1], OpState::MemoryImport, "the import goes on");
    }
    m.p.write_memory(b.mbmd(), &good).expect("shared memory");
    assert_eq!(m.import(&b, PAGES), Status::SUCCESS);
}

#[test]
fn a_shortened_bundle_is_refused() {
    let mut m = paused(false);
    let b = Bundle::of_stream(0);
    m.export(&b, &gpas());
    assert_eq!(m.import(&b, PAGES - 1).code(), Code::INVALID_MBMD);
}

#[test]
fn a_changed_page_ends_the_import_and_not_the_source() {
    let mut m = paused(false);
    let b = Bundle::of_stream(0);
    m.export(&b, &gpas());
    m.p.write_memory(b.buffer(3), &[1]).expect("shared memory");
    let status = m.import(&b, PAGES);
    assert_eq!(status.to_string(), "TDX_INVALID_PAGE_MAC(fatal)|0x61");
    assert_eq!(m.state(), [OpState::PausedExport, OpState::FailedImport]);
}

#[test]
fn swapped_entries_are_refused() {
    let mut m = paused(false);
    let b = Bundle::of_stream(0);
    m.export(&b, &gpas());
    let mut swapped = gpas();
    swapped.swap(1, 2);
    m.list(&b, &swapped, MIGRATE);
    let status = m.import(&b, PAGES);
    assert_eq!(status.to_string(), "TDX_INVALID_PAGE_MAC(fatal)|0x61");
}

#[test]
fn bundles_of_two_streams_may_arrive_in_any_order() {
    let mut m = paused(false);
    let first = gpas();
    let (first, second) = first.split_at(4);
    let streams = [0, 1].map(Bundle::of_stream);
    assert_eq!(m.export(&streams[0], first), Status::SUCCESS);
    assert_eq!(m.export(&streams[1], second), Status::SUCCESS);
    assert_eq!(m.import(&streams[1], 4), Status::SUCCESS);
    assert_eq!(m.import(&streams[0], 4), Status::SUCCESS);
}

#[test]
fn a_live_page_is_exported_only_once_blocked_and_tracked() {
    let m = Migration::new(PAGES, false);
    m.begin();
    let b = Bundle::of_stream(0);
    let status = m.export(&b, &gpas());
    assert_eq!(
        status,
        Code::SUCCESS.detail(PAGES as u32),
        "none is blocked"
    );
    m.block(&gpas());
    assert_eq!(m.export(&b, &gpas()), Status::SUCCESS);
    let view = m.p.migration(m.source.tdr).expect("a td");
    assert_eq!((view.mig_count, view.dirty_count), (PAGES, 0));
}

#[test]
fn a_write_to_a_blocked_page_reaches_the_host_and_the_page_is_sent_again() {
    let m = Migration::new(PAGES, false);
    m.begin();
    let b = Bundle::of_stream(0);
    m.block(&gpas());
    m.export(&b, &gpas());
    m.p.set_guest(
        m.source.tdvpr,
        soft_tdx_module::Script::new([GuestOp::Write {
            gpa: 0x3000,
            data: vec![0xEE],
        }]),
    );
    let exit = m.source.enter(&m.p);
    assert_eq!((exit.rax, exit.r8), (48, 0x3000));
    m.source
        .ok(&m.p, L::ExportUnblockw, regs(0x3000, m.source.tdr));
    assert_eq!(m.source.enter(&m.p).rax, VMCALL);
    let dirty = |m: &Migration| m.p.migration(m.source.tdr).expect("a td").dirty_count;
    assert_eq!(dirty(&m), 1);
    m.source.ok(&m.p, L::ExportPause, regs(m.source.tdr, 0));
    let start = soft_tdx_module::Regs {
        r10: 1 << 63,
        ..b.token(m.source.tdr)
    };
    let early = m.source.status(&m.p, L::ExportTrack, start);
    assert_eq!(early.code(), Code::EXPORTED_DIRTY_PAGES_REMAIN);
    assert_eq!(m.export(&b, &[0x3000]), Status::SUCCESS);
    assert_eq!(dirty(&m), 0);
}

#[test]
fn a_td_that_may_migrate_has_no_l2_vms() {
    const MIGRATABLE: u64 = 1 << 29;
    let p = common::machine();
    for l2_vms in 0..=3u64 {
        let td = Td::allocate(
            &p,
            0x4000_0000 + (l2_vms << 24),
            33 + l2_vms as u16,
            0,
            l2_vms,
        );
        let params = [(8, 3), (16, 4 | l2_vms << 16), (24, 0x1E), (40, 40)];
        let init = |attributes: u64| {
            for (offset, value) in [(0, attributes)].into_iter().chain(params) {
                let at = td.params + offset;
                p.write_memory(at, &value.to_le_bytes()).expect("params");
            }
            td.status(&p, L::MngInit, regs(td.tdr, td.params)).code()
        };
        let with = match l2_vms {
            0 => Status::SUCCESS.code(),
            _ => Code::OPERAND_INVALID,
        };
        assert_eq!(init(MIGRATABLE), with, "{l2_vms}");
        if l2_vms > 0 {
            assert_eq!(init(0), Status::SUCCESS.code(), "{l2_vms}");
        }
    }
}

#[test]
fn a_blocked_page_is_unblocked_only_after_its_translations_are_tracked() {
    let m = Migration::new(PAGES, false);
    let page = regs(0, m.source.tdr);
    m.source.ok(&m.p, L::MemRangeBlock, page);
    let status = m.source.status(&m.p, L::MemRangeUnblock, page);
    assert_eq!(status.code(), Code::TLB_TRACKING_NOT_DONE);
    assert_eq!(status.detail(), 1);
    m.source.ok(&m.p, L::MemTrack, regs(m.source.tdr, 0));
    m.source.ok(&m.p, L::MemRangeUnblock, page);
}

/// A status as the recordings spell it, which number the operands of lists and of the migration's lock.
fn as_recorded(status: Status) -> String {
    let text = status.to_string();
    let numbers = [
        ("MIG_BUFF_LIST_ENTRY", "98"),
        ("GPA_LIST_ENTRY", "97"),
        ("MIG", "173"),
    ];
    let number = numbers.iter().find_map(|(name, number)| {
        let head = text.strip_suffix(&format!("|{name}"))?;
        Some(format!("{head}|{number}"))
    });
    number.unwrap_or(text)
}

/// What is wrong with a call of a migration, beside what the transcripts have.
#[test]
fn a_wrong_operand_and_a_lock_that_is_held_are_named_and_the_right_call_is_served() {
    const PRIVATE: u64 = 1 << 51;
    for (leaf, expected) in unreplayed::MIGRATION {
        let name = expected.rsplit('|').next().expect("an operand");
        let m = match leaf {
            "TDH.EXPORT.BLOCKW" | "TDH.EXPORT.UNBLOCKW" => {
                let m = Migration::new(PAGES, false);
                m.begin();
                m
            }
            _ => paused(false),
        };
        let b = Bundle::of_stream(0);
        let tdr = m.source.tdr;
        m.list(&b, &gpas(), MIGRATE);
        let (call, operands) = match leaf {
            "TDH.EXPORT.MEM" => (L::ExportMem, b.memory(tdr, PAGES)),
            "TDH.EXPORT.TRACK" => (L::ExportTrack, b.token(tdr)),
            "TDH.EXPORT.BLOCKW" => (L::ExportBlockw, regs(b.gpa_list() | (PAGES - 1) << 55, tdr)),
            "TDH.EXPORT.UNBLOCKW" => {
                m.block(&gpas());
                (L::ExportUnblockw, regs(0, tdr))
            }
            _ => (L::ImportTrack, b.token(m.target.tdr)),
        };
        let mut wrong = operands;
        let mut lock = None;
        match (expected.contains("BUSY"), name) {
            (true, "SEPT_TREE") => lock = Some(LockTarget::SeptTree { tdr }),
            (true, "RCX") => {
                let (gpa, level) = (0, 0);
                lock = Some(LockTarget::SeptEntry { tdr, gpa, level });
            }
            (true, _) => lock = Some(LockTarget::Mig { tdr }),
            (false, "RCX") => wrong.rcx |= PRIVATE,
            (false, "RDX") if expected.contains("METADATA") => wrong.rdx = m.source.tdvpr,
            (false, "RDX") => wrong.rdx |= PRIVATE,
            (false, "R8") => wrong.r8 |= PRIVATE,
            (false, "R9") => wrong.r9 |= PRIVATE,
            (false, "R11") => wrong.r11 |= PRIVATE,
            // Entries of the lists: a page of 2 MiB, and a private page for what is exported.
            (false, "97") => m.list(&b, &[1], MIGRATE),
            (false, _) => Bundle::write(&m.p, b.buffer_list(), &[b.buffer(0) | PRIVATE]),
        }
        let before = m.state();
        let td = &m.source;
        let refused = || td.status(&m.p, call, wrong);
        let status = match lock {
            Some(lock) => holding(&m.p, lock, LockMode::Exclusive, refused),
            None => refused(),
        };
        assert_eq!(as_recorded(status), expected, "{leaf}");
        assert_eq!(m.state(), before, "{leaf}: {expected}");
        // A token of the target needs the source's first.
        if leaf == "TDH.IMPORT.TRACK" {
            continue;
        }
        m.list(&b, &gpas(), MIGRATE);
        let served = td.status(&m.p, call, operands);
        // A page whose buffer is refused counts as exported by then.
        let problems = u32::from(name == "98");
        assert_eq!(served, Code::SUCCESS.detail(problems), "{leaf}: {expected}");
    }
}
