//! Guest programs inside TDH.VP.ENTER, and memory that is really protected.

mod common;

use common::{Td, machine, regs};
use soft_tdx_module::{
    Code, Fault, GuestLeaf, GuestOp, HostLeaf as L, LockMode, LockTarget, Outcome, Platform, Regs,
    Script, Status, TraceEvent, VmExit, pending,
};
use std::sync::{Arc, Mutex};

const EPT_VIOLATION: u64 = 48;
const VMCALL: u64 = 77;

/// A program of `ops` that records each outcome, then halts.
fn recorded(
    ops: Vec<GuestOp>,
) -> (
    impl FnMut(&Outcome) -> GuestOp + Send,
    Arc<Mutex<Vec<Outcome>>>,
) {
    let log = Arc::new(Mutex::new(Vec::new()));
    let into = log.clone();
    let mut ops = ops.into_iter();
    let program = move |last: &Outcome| {
        into.lock().expect("log").push(last.clone());
        ops.next().unwrap_or_else(|| GuestOp::vmcall(12, [0; 4]))
    };
    (program, log)
}

fn runnable(p: &Platform) -> Td {
    let mut td = Td::create(p, 0x4000_0000, 33, 0, 0);
    td.tables(p, 0, 0);
    td.add(p, 0, 0xAB);
    td.finalize(p);
    td
}

#[test]
fn a_guest_reads_what_was_added_and_what_it_wrote() {
    let p = machine();
    let td = runnable(&p);
    let (program, log) = recorded(vec![
        GuestOp::Read { gpa: 0xFF8, len: 8 },
        GuestOp::Write {
            gpa: 0x7C,
            data: vec![1, 2, 3, 4, 5, 6, 7, 8],
        },
        GuestOp::Read { gpa: 0x78, len: 16 },
    ]);
    p.set_guest(td.tdvpr, program);
    assert_eq!(td.enter(&p).rax, VMCALL);
    let log = log.lock().expect("log");
    assert_eq!(log[1], Outcome::Data(vec![0xAB; 8]));
    let expected = [[0xAB; 4].as_slice(), &[1, 2, 3, 4, 5, 6, 7, 8], &[0xAB; 4]].concat();
    assert_eq!(log[3], Outcome::Data(expected));
}

#[test]
fn the_host_sees_ciphertext_and_its_writes_kill_the_td_at_the_next_read() {
    let p = machine();
    let mut td = Td::create(&p, 0x4000_0000, 33, 0, 0);
    td.tables(&p, 0, 0);
    let page = td.add(&p, 0, 0xAB);
    td.finalize(&p);
    let mut host_view = [0; 4096];
    p.read_memory(page, &mut host_view).expect("ram");
    assert!(
        !host_view.chunks(16).any(|c| c == [0xAB; 16]),
        "plaintext leaks"
    );
    assert_eq!(
        host_view
            .chunks(16)
            .collect::<std::collections::BTreeSet<_>>()
            .len(),
        256
    );

    p.write_memory(page + 0x40, &[0]).expect("ram");
    let reads = |gpa| GuestOp::Read { gpa, len: 8 };
    let (program, log) = recorded(vec![reads(0), reads(0x40)]);
    p.set_guest(td.tdvpr, program);
    let exit = td.enter(&p);
    assert_eq!(
        Status(exit.rax).code(),
        Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE
    );
    assert_eq!(
        log.lock().expect("log")[1],
        Outcome::Data(vec![0xAB; 8]),
        "other lines are intact"
    );
    assert_eq!(
        td.status(&p, L::MemTrack, regs(td.tdr, 0)).code(),
        Code::TD_FATAL
    );
}

#[test]
fn without_encryption_a_host_write_is_what_the_guest_reads() {
    let p = Platform::builder()
        .encrypt_memory(false)
        .build()
        .expect("machine");
    p.bring_up().expect("up");
    let mut td = Td::create(&p, 0x4000_0000, 33, 0, 0);
    td.tables(&p, 0, 0);
    let page = td.add(&p, 0, 0xAB);
    td.finalize(&p);
    p.write_memory(page, &[7; 8]).expect("ram");
    let (program, log) = recorded(vec![GuestOp::Read { gpa: 0, len: 8 }]);
    p.set_guest(td.tdvpr, program);
    td.enter(&p);
    assert_eq!(log.lock().expect("log")[1], Outcome::Data(vec![7; 8]));
}

#[test]
fn memory_under_a_dead_key_cannot_be_read_even_by_a_td_with_the_same_key_id() {
    let p = machine();
    let mut old = Td::create(&p, 0x4000_0000, 33, 0, 1);
    old.tables(&p, 0, 0);
    let page = old.add(&p, 0, 0xAB);
    old.finalize(&p);
    let read = |td: &Td, gpa| {
        let mut r = Regs {
            rax: L::MemRd.number(),
            ..regs(gpa, td.tdr)
        };
        (p.seamcall(0, &mut r).expect("executes"), r.r8)
    };
    assert_eq!(read(&old, 8), (Status::SUCCESS, 0xABAB_ABAB_ABAB_ABAB));
    old.release_key(&p);
    old.reclaim(&p);
    let mut after = [0; 64];
    p.peek_memory(page, &mut after).expect("ram");
    assert_ne!(after, [0xAB; 64], "the key is gone");

    // The same page and key id again: AUG leaves contents, and only ACCEPT makes them the new TD's.
    let mut new = Td::create(&p, 0x4010_0000, 33, 0, 1);
    new.tables(&p, 0, 0);
    new.finalize(&p);
    new.ok(
        &p,
        L::MemPageAug,
        Regs {
            r8: page,
            ..regs(0, new.tdr)
        },
    );
    p.set_guest(new.tdvpr, Script::new([GuestOp::accept(0, 0)]));
    new.enter(&p);
    assert_eq!(
        read(&new, 8),
        (Status::SUCCESS, 0),
        "accepted pages are zero"
    );
}

#[test]
fn a_wrong_private_key_is_detected() {
    let p = machine();
    let mut a = Td::create(&p, 0x4000_0000, 33, 0, 1);
    a.tables(&p, 0, 0);
    let page = a.add(&p, 0, 0x11);
    let mut b = Td::create(&p, 0x4010_0000, 34, 0, 1);
    b.tables(&p, 0, 0);
    b.add(&p, 0, 0x22);
    // The host moves a's ciphertext over b's page: same bytes, other key, other address.
    let mut stolen = [0; 4096];
    p.read_memory(page, &mut stolen).expect("ram");
    let target = p.sept(b.tdr, 0, 0).expect("mapped").entry & 0xF_FFFF_FFFF_F000;
    p.write_memory(target, &stolen).expect("ram");
    assert_eq!(
        b.status(&p, L::MemRd, regs(0, b.tdr)).code(),
        Code::TD_FATAL
    );
    assert_eq!(a.status(&p, L::MemRd, regs(0, a.tdr)), Status::SUCCESS);
}

#[test]
fn an_access_to_a_missing_page_exits_and_completes_after_aug_and_accept() {
    let p = machine();
    let mut td = runnable(&p);
    let (program, log) = recorded(vec![
        GuestOp::accept(0x3000, 0),
        GuestOp::Read {
            gpa: 0x3000,
            len: 4,
        },
        GuestOp::Read {
            gpa: 0x4000,
            len: 4,
        },
    ]);
    p.set_guest(td.tdvpr, program);
    for _ in 0..3 {
        let exit = td.enter(&p);
        assert_eq!(
            (exit.rax, exit.r8),
            (EPT_VIOLATION, 0x3000),
            "the instruction repeats"
        );
    }
    td.aug(&p, 0x3000);
    let exit = td.enter(&p);
    assert_eq!((exit.rax, exit.r8), (EPT_VIOLATION, 0x4000));
    assert_eq!(log.lock().expect("log")[2], Outcome::Data(vec![0; 4]));
}

#[test]
fn a_pending_page_is_a_ve_and_veinfo_tells_which() {
    let p = machine();
    let mut td = runnable(&p);
    td.aug(&p, 0x3000);
    let (program, log) = recorded(vec![
        GuestOp::Read {
            gpa: 0x3008,
            len: 4,
        },
        GuestOp::tdcall(GuestLeaf::VpVeinfoGet, 0, 0),
        GuestOp::accept(0x3000, 0),
        GuestOp::Read {
            gpa: 0x3008,
            len: 4,
        },
    ]);
    p.set_guest(td.tdvpr, program);
    td.enter(&p);
    let log = log.lock().expect("log");
    assert!(matches!(log[1], Outcome::Event(e) if e.vector == 20));
    assert!(matches!(log[2], Outcome::Registers(r) if (r.rax, r.rcx, r.r9) == (0, 48, 0x3008)));
    assert_eq!(log[3].status(), Some(Status::SUCCESS));
    assert_eq!(log[4], Outcome::Data(vec![0; 4]));
}

#[test]
fn with_ve_disabled_a_pending_page_exits_to_the_host() {
    const SEPT_VE_DISABLE: u64 = 1 << 28;
    let p = machine();
    let mut td = Td::create(&p, 0x4000_0000, 33, 0, SEPT_VE_DISABLE);
    td.tables(&p, 0, 0);
    td.finalize(&p);
    td.aug(&p, 0x3000);
    p.set_guest(
        td.tdvpr,
        Script::new([GuestOp::Read {
            gpa: 0x3000,
            len: 4,
        }]),
    );
    let exit = td.enter(&p);
    assert_eq!(
        (exit.rax, exit.rdx & 0xF, exit.r8),
        (EPT_VIOLATION, 6, 0x3000)
    );
}

#[test]
fn zero_step_filtering_keeps_a_vcpu_out_until_the_page_is_mapped() {
    let p = Platform::builder().trace(1000).build().expect("machine");
    p.bring_up().expect("up");
    let mut td = runnable(&p);
    p.set_guest(
        td.tdvpr,
        Script::new([GuestOp::Read {
            gpa: 0x3000,
            len: 4,
        }]),
    );
    let faults = || {
        p.trace()
            .iter()
            .filter(|e| matches!(e.event, TraceEvent::Guest { .. }))
            .count()
    };
    for n in 1..=20 {
        let exit = td.enter(&p);
        assert_eq!((exit.rax, exit.r8), (EPT_VIOLATION, 0x3000));
        assert_eq!(
            faults(),
            n.min(7),
            "six violations are free, the seventh is recorded"
        );
    }
    td.aug(&p, 0x3000);
    let exit = td.enter(&p);
    assert_eq!(
        (exit.rax, exit.r8),
        (EPT_VIOLATION, 0x3000),
        "pending is not mapped"
    );
    assert_eq!(faults(), 7);
    assert_eq!(p.td(td.tdr).expect("td").refcount, [0, 0]);
}

#[test]
fn shared_memory_is_the_hosts_too() {
    const SHARED: u64 = 1 << 47;
    let p = machine();
    let td = runnable(&p);
    p.write_memory(0x5000, b"from the host").expect("ram");
    let (program, log) = recorded(vec![
        GuestOp::Read {
            gpa: SHARED | 0x5000,
            len: 13,
        },
        GuestOp::Write {
            gpa: SHARED | 0x6000,
            data: b"from the guest".to_vec(),
        },
    ]);
    p.set_guest(td.tdvpr, program);
    td.enter(&p);
    assert_eq!(
        log.lock().expect("log")[1],
        Outcome::Data(b"from the host".to_vec())
    );
    let mut seen = [0; 14];
    p.read_memory(0x6000, &mut seen).expect("ram");
    assert_eq!(&seen, b"from the guest");
}

#[test]
fn interrupts_come_before_the_guest_and_a_2m_accept_completes_after_them() {
    let p = machine();
    let mut td = Td::create(&p, 0x4000_0000, 33, 0, 0);
    td.tables(&p, 0x20_0000, 1);
    td.finalize(&p);
    let large = td.large_page(0x20_0000);
    td.ok(
        &p,
        L::MemPageAug,
        Regs {
            r8: large,
            ..regs(0x20_0001, td.tdr)
        },
    );
    let (program, log) = recorded(vec![GuestOp::accept(0x20_0000, 1)]);
    p.set_guest(td.tdvpr, program);
    p.set_pending(0, pending::INTR);
    for _ in 0..3 {
        assert_eq!(td.enter(&p).rax & 0xFFFF, 1, "interrupts come first");
    }
    p.set_pending(0, 0);
    assert_eq!(td.enter(&p).rax, VMCALL);
    assert_eq!(log.lock().expect("log")[1].status(), Some(Status::SUCCESS));
}

#[test]
fn a_kick_and_the_timer_end_an_entry() {
    let p = Platform::builder()
        .guest_steps_per_entry(100)
        .build()
        .expect("machine");
    p.bring_up().expect("up");
    let td = runnable(&p);
    p.set_guest(td.tdvpr, |_: &Outcome| GuestOp::Nop);
    assert_eq!(td.enter(&p).rax, 1, "the timer");
    p.kick(0);
    assert_eq!(td.enter(&p).rax, 1);
}

#[test]
fn an_nmi_comes_between_completions_and_swallows_none() {
    const PEND_NMI: u64 = 0x2000_0000_0000_000B;
    let p = machine();
    let td = runnable(&p);
    let (program, log) = recorded(vec![
        GuestOp::vmcall(1, [7, 0, 0, 0]),
        GuestOp::vmcall(2, [0; 4]), // Not executed: the NMI comes first.
        GuestOp::vmcall(3, [0; 4]),
    ]);
    p.set_guest(td.tdvpr, program);
    assert_eq!(td.enter(&p).r11, 1);
    let nmi = Regs {
        r8: 1,
        r9: 1,
        ..regs(td.tdvpr, PEND_NMI)
    };
    td.ok(&p, L::VpWr, nmi);
    let mut answer = Regs {
        r12: 8,
        ..Regs::leaf(L::VpEnter.number())
    };
    answer.rcx = td.tdvpr;
    p.seamcall(0, &mut answer).expect("executes");
    assert_eq!(answer.r11, 3);
    let log = log.lock().expect("log");
    assert!(matches!(log[0], Outcome::Start(_)));
    assert!(
        matches!(log[1], Outcome::Registers(r) if r.r12 == 8),
        "{log:?}"
    );
    assert!(matches!(log[2], Outcome::Event(e) if e.vector == 2));
    assert_eq!(log.len(), 3);
}

#[test]
fn a_fault_of_the_programs_own_leaves_and_asks_it_anew() {
    const SHARED: u64 = 1 << 47;
    let p = machine();
    let td = runnable(&p);
    let violation = |gpa| {
        GuestOp::Fault(VmExit {
            reason: EPT_VIOLATION as u16,
            qualification: 2,
            gpa,
            ..VmExit::default()
        })
    };
    let (program, log) = recorded(vec![violation(SHARED | 0x5000), violation(SHARED | 0x6000)]);
    p.set_guest(td.tdvpr, program);
    for gpa in [0x5000, 0x6000] {
        let exit = td.enter(&p);
        assert_eq!(
            (exit.rax, exit.rcx, exit.r8),
            (EPT_VIOLATION, 2, SHARED | gpa)
        );
    }
    assert_eq!(td.enter(&p).rax, VMCALL);
    assert_eq!(
        log.lock().expect("log")[1..],
        [Outcome::Done, Outcome::Done]
    );
}

#[test]
fn a_host_that_waits_comes_first_and_a_guest_that_insists_is_thrown_out() {
    let p = machine();
    let mut td = runnable(&p);
    td.aug(&p, 0x3000);
    let entry = LockTarget::SeptEntry {
        tdr: td.tdr,
        gpa: 0x3000,
        level: 0,
    };
    common::holding(&p, entry, LockMode::Exclusive, || {
        let busy = td.status(&p, L::MemRangeBlock, regs(0x3000, td.tdr));
        assert_eq!(busy.code(), Code::OPERAND_BUSY);
    });
    let (program, log) = recorded(vec![GuestOp::accept(0x3000, 0)]);
    p.set_guest(td.tdvpr, program);
    td.enter(&p);
    let status = log.lock().expect("log")[1].status();
    assert_eq!(status.map(Status::code), Some(Code::OPERAND_BUSY));
    // The guest insists for more than a second of TSC.
    p.set_guest(td.tdvpr, |_: &Outcome| GuestOp::accept(0x3000, 0));
    let exit = td.enter(&p);
    assert_eq!(Status(exit.rax).code(), Code::HOST_PRIORITY_BUSY_TIMEOUT);
    // The host takes what it waited for, and the guest is free again.
    td.ok(&p, L::MemSeptRd, regs(0x3000, td.tdr));
    let (program, log) = recorded(vec![GuestOp::accept(0x3000, 0)]);
    p.set_guest(td.tdvpr, program);
    td.enter(&p);
    assert_eq!(log.lock().expect("log")[1].status(), Some(Status::SUCCESS));
}

#[test]
fn injected_faults_come_at_the_call_they_were_armed_for() {
    let p = machine();
    let td = runnable(&p);
    let busy = Code::OPERAND_BUSY.status();
    p.inject(Fault::ForceStatus {
        leaf: L::MemTrack,
        nth: 3,
        status: busy,
    });
    let got: Vec<Status> = (0..4)
        .map(|_| td.status(&p, L::MemTrack, regs(td.tdr, 0)))
        .collect();
    assert_eq!(
        got,
        [Status::SUCCESS, Status::SUCCESS, busy, Status::SUCCESS]
    );
    assert_eq!(p.counts().of("TDH.MEM.TRACK", "OPERAND_BUSY"), 1);
    p.set_offline(0, true);
    let mut r = Regs::leaf(L::MemTrack.number());
    assert!(p.seamcall(0, &mut r).is_err());
    p.set_offline(0, false);
    assert!(p.seamcall(0, &mut r).is_ok());
}

#[test]
fn a_processor_that_goes_offline_leaves_its_td_first() {
    let p = Arc::new(machine());
    let td = runnable(&p);
    let machine = p.clone();
    p.set_guest(td.tdvpr, move |_: &Outcome| {
        machine.set_offline(0, true);
        GuestOp::Nop
    });
    assert_eq!(td.enter(&p).rax, 1);
    assert_eq!(p.td(td.tdr).expect("td").refcount, [0, 0]);
    assert!(p.seamcall(0, &mut Regs::leaf(L::SysRd.number())).is_err());
    p.set_offline(0, false);
    assert_eq!(td.enter(&p).rax, 1);
}

#[test]
fn transient_faults_repeat_with_their_seed_and_a_host_that_retries_gets_through() {
    let life = |seed| {
        let p = machine();
        p.inject(Fault::Transient {
            seed,
            per_mille: 300,
        });
        let mut log = Vec::new();
        let mut run = |leaf: L, o: Regs| loop {
            let mut r = Regs {
                rax: leaf.number(),
                ..o
            };
            let status = p.seamcall(0, &mut r).expect("executes");
            log.push(status);
            if !status.is_error() {
                break;
            }
            let transient = [
                Code::OPERAND_BUSY,
                Code::RND_NO_ENTROPY,
                Code::KEY_GENERATION_FAILED,
            ];
            assert!(transient.contains(&status.code()), "{status}");
        };
        run(L::MngCreate, regs(0x4000_0000, 33));
        run(L::MngKeyConfig, regs(0x4000_0000, 0));
        (0..50).for_each(|_| run(L::PhymemPageRdmd, regs(0x4000_0000, 0)));
        log
    };
    assert_eq!(life(5), life(5));
    assert_ne!(life(5), life(6));
    assert!(life(5).len() > 52 + 5, "some calls did fail");
}

#[test]
fn trace_and_dumps_show_what_happened() {
    let p = Platform::builder().trace(64).build().expect("machine");
    p.bring_up().expect("up");
    let td = runnable(&p);
    td.enter(&p);
    let trace: Vec<String> = p.trace().iter().map(ToString::to_string).collect();
    assert!(
        trace
            .iter()
            .any(|l| l.contains("TDH.VP.ENTER") && l.ends_with("entered"))
    );
    assert!(
        trace
            .iter()
            .any(|l| l.contains("TDG.VP.VMCALL") && l.contains("TD exit"))
    );
    assert!(p.dump_kot().contains("ASSIGNED"));
    assert!(p.dump_pamt().contains("TDVPR"));
    assert!(p.dump_sept(td.tdr).contains("MAPPED"));
    assert!(p.td(td.tdr).expect("td").to_string().contains("RUNNABLE"));
    assert!(
        p.vcpu(td.tdvpr)
            .expect("vcpu")
            .to_string()
            .contains("on lp 0")
    );
}

#[test]
fn a_gpa_beyond_the_width_faults_and_reaches_no_memory() {
    let p = machine();
    let td = runnable(&p);
    for bit in 48..64 {
        let gpa = 1u64 << bit;
        let (program, log) = recorded(vec![
            GuestOp::Read { gpa, len: 8 },
            GuestOp::Write {
                gpa,
                data: vec![0; 8],
            },
            GuestOp::Read { gpa: 0, len: 8 },
        ]);
        p.set_guest(td.tdvpr, program);
        assert_eq!(td.enter(&p).rax, VMCALL, "bit {bit}");
        let log = log.lock().expect("log");
        let faults = log[1..3].iter().all(|o| match o {
            Outcome::Event(event) => event.vector == 14 && event.cr2 == gpa,
            _ => false,
        });
        assert!(faults, "bit {bit}: {:?}", &log[1..3]);
        assert_eq!(log[3], Outcome::Data(vec![0xAB; 8]), "bit {bit}");
    }
}

#[test]
fn an_access_across_the_end_of_the_address_space_does_not_go_on_at_0() {
    let p = machine();
    let td = runnable(&p);
    let (program, log) = recorded(vec![
        GuestOp::Write {
            gpa: u64::MAX - 3,
            data: vec![0; 16],
        },
        GuestOp::Read { gpa: 0, len: 16 },
    ]);
    p.set_guest(td.tdvpr, program);
    assert_eq!(td.enter(&p).rax, VMCALL);
    let log = log.lock().expect("log");
    assert!(matches!(log[1], Outcome::Event(e) if e.vector == 14));
    assert_eq!(log[2], Outcome::Data(vec![0xAB; 16]));
}

#[test]
fn a_shared_gpa_that_is_no_memory_leaves_the_td() {
    const SHARED: u64 = 1 << 47;
    // Beyond the 4 GiB of RAM, and where the key id of a physical address would be.
    for address in [1 << 32, 1 << 46] {
        let p = machine();
        let td = runnable(&p);
        let report = Regs {
            rcx: 0,
            rdx: SHARED | address,
            ..Regs::leaf(GuestLeaf::MrReport.number())
        };
        let (program, _) = recorded(vec![GuestOp::Tdcall(report)]);
        p.set_guest(td.tdvpr, program);
        let exit = td.enter(&p);
        assert_eq!((exit.rax, exit.r8), (EPT_VIOLATION, SHARED | address));
    }
}

#[test]
fn a_physical_address_beyond_52_bits_is_no_memory() {
    let p = machine();
    p.write_memory(0, &[0x5A; 8]).expect("memory");
    for bit in 52..64 {
        let pa = 1u64 << bit;
        let none = Err(soft_tdx_module::MemoryError::OutOfRange { pa });
        assert_eq!(p.write_memory(pa, &[0; 8]), none, "bit {bit}");
        assert_eq!(p.read_memory(pa, &mut [0; 8]), none, "bit {bit}");
        assert_eq!(p.peek_memory(pa, &mut [0; 8]), none, "bit {bit}");
    }
    let mut kept = [0; 8];
    p.read_memory(0, &mut kept).expect("memory");
    assert_eq!(kept, [0x5A; 8]);
}
