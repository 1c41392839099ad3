//! Programs of L1 and of L2 VMs in one TD: entries, exits to L1 and to the host, and the way back.

mod common;
#[path = "common/unreplayed.rs"]
mod unreplayed;

use common::{Td, machine, regs};
use soft_tdx_module::{
    Code, GuestEvent, GuestFlow, GuestLeaf, GuestOp, HostLeaf as L, Outcome, Platform, Regs,
    Status, VmExit, pending,
};
use std::sync::{Arc, Mutex};

/// Pages of the TD: state and virtual APIC page of the L2 VM, and one that L1 shares with it.
const STATE: u64 = 0x1000;
const VAPIC: u64 = 0x2000;
const SHARED: u64 = 0x3000;
const LENT_LATER: u64 = 0x4000;
const VM: u8 = 1;
const RIP_OFFSET: u64 = 136;
const VMCALL: u64 = 77;
const HLT: u64 = 12;
const EPT_VIOLATION: u64 = 48;
/// Bits 33:32 of RCX of a TD exit.
const EXIT_OF_VM_1: u64 = 1 << 32;

/// Fields of a vCPU: virtual APIC page in the VMCS of VM 1, its L2_CTLS, L2_DEBUG_CTLS and MSR bitmaps.
const L2_VAPIC: u64 = 0x2424_0003_0000_2012;
const L2_CTLS: u64 = 0xA020_0003_0000_0051;
const L2_DEBUG_CTLS: u64 = 0xA020_0003_0000_0055;
const L2_MSR_BITMAPS: u64 = 0x2520_0003_0000_0000;
const CTL_VMCALL: u64 = 2;

const DEBUG: u64 = 1;

fn tdcall(leaf: GuestLeaf, rcx: u64, rdx: u64, r8: u64, r9: u64) -> GuestOp {
    GuestOp::Tdcall(Regs {
        rcx,
        rdx,
        r8,
        r9,
        ..Regs::leaf(leaf.number())
    })
}

fn vp_wr(field: u64, value: u64, mask: u64) -> GuestOp {
    tdcall(GuestLeaf::VpWr, 0, field, value, mask)
}

/// Read and write for VM 1.
fn lend(gpa: u64) -> GuestOp {
    tdcall(GuestLeaf::MemPageAttrWr, gpa, 0x8003 << 16, 0x7F << 16, 0)
}

fn write_word(gpa: u64, value: u64) -> GuestOp {
    GuestOp::Write {
        gpa,
        data: value.to_le_bytes().to_vec(),
    }
}

fn set_rip(rip: u64) -> GuestOp {
    write_word(STATE + RIP_OFFSET, rip)
}

/// Operations of L1 before it enters VM 1 for the first time.
fn prepare() -> Vec<GuestOp> {
    vec![
        vp_wr(L2_VAPIC, VAPIC, u64::MAX),
        lend(SHARED),
        set_rip(0x10_0000),
    ]
}

fn enter() -> GuestOp {
    GuestOp::enter_l2(VM, STATE)
}

/// A TD with one L2 VM and five private pages.
fn partitioned(p: &Platform, attributes: u64) -> Td {
    let mut td = Td::partitioned(p, 0x4000_0000, 33, 0, attributes, 1);
    td.l2_tables(p);
    for gpa in [0, STATE, VAPIC, SHARED, LENT_LATER] {
        td.add(p, gpa, 0);
    }
    td.finalize(p);
    td
}

type Log = Arc<Mutex<Vec<Outcome>>>;

/// A program of `ops` that records each outcome, then asks its host to halt it.
fn recorded(ops: Vec<GuestOp>) -> (impl FnMut(&Outcome) -> GuestOp + Send, Log) {
    let log = Log::default();
    let into = log.clone();
    let mut ops = ops.into_iter();
    let program = move |last: &Outcome| {
        into.lock().expect("log").push(last.clone());
        ops.next().unwrap_or_else(|| GuestOp::vmcall(12, [0; 4]))
    };
    (program, log)
}

/// Gives both programs to the vCPU.
fn programs(p: &Platform, td: &Td, l1: Vec<GuestOp>, l2: Vec<GuestOp>) -> (Log, Log) {
    let (l1, l1_log) = recorded(l1);
    let (l2, l2_log) = recorded(l2);
    p.set_guest(td.tdvpr, l1);
    p.set_l2_guest(td.tdvpr, VM.into(), l2);
    (l1_log, l2_log)
}

/// Registers that L1 found after its TDG.VP.ENTERs.
fn exits(log: &Log) -> Vec<Regs> {
    let log = log.lock().expect("log");
    let registers = log.iter().filter_map(|o| match o {
        Outcome::Registers(r) => Some(*r),
        _ => None,
    });
    // L1's own TDCALLs return 0 and leave RCX alone; an exit always has the VM's code segment in RSI.
    registers.filter(|r| r.rsi != 0).collect()
}

#[test]
fn an_l2_vm_runs_on_memory_that_l1_lends_it_and_halts_into_l1() {
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [
        prepare(),
        vec![
            write_word(SHARED, 41),
            enter(),
            // Past HLT.
            set_rip(0x20_0000),
            enter(),
            GuestOp::Read {
                gpa: SHARED,
                len: 8,
            },
        ],
    ]
    .concat();
    let l2 = vec![
        GuestOp::Read {
            gpa: SHARED,
            len: 8,
        },
        write_word(SHARED, 42),
        GuestOp::hlt(),
        GuestOp::hlt(),
    ];
    let (l1_log, l2_log) = programs(&p, &td, l1, l2);
    assert_eq!(td.enter(&p).rax, VMCALL, "l1 is through");
    let reasons: Vec<u64> = exits(&l1_log).iter().map(|r| r.rax).collect();
    assert_eq!(reasons, [HLT, HLT]);
    let seen = l1_log.lock().expect("log").last().cloned();
    assert_eq!(seen, Some(Outcome::Data(42u64.to_le_bytes().to_vec())));
    let l2_log = l2_log.lock().expect("log");
    assert_eq!(l2_log[1], Outcome::Data(41u64.to_le_bytes().to_vec()));
    assert_eq!(l2_log[3], Outcome::Done, "the first HLT is done");
}

#[test]
fn an_instruction_is_executed_again_until_l1_moves_rip() {
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [prepare(), vec![enter(), enter(), enter()]].concat();
    let (l1_log, l2_log) = programs(&p, &td, l1, vec![GuestOp::hlt()]);
    td.enter(&p);
    let reasons: Vec<u64> = exits(&l1_log).iter().map(|r| r.rax).collect();
    assert_eq!(reasons, [HLT, HLT, HLT]);
    assert_eq!(
        l2_log.lock().expect("log").len(),
        1,
        "the program was asked once"
    );
}

#[test]
fn l1_is_told_of_a_page_it_has_not_lent_and_lends_it() {
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [
        prepare(),
        vec![
            write_word(LENT_LATER, 7),
            enter(),
            lend(LENT_LATER),
            enter(),
        ],
    ]
    .concat();
    let l2 = vec![
        GuestOp::Read {
            gpa: LENT_LATER,
            len: 8,
        },
        GuestOp::hlt(),
    ];
    let (l1_log, l2_log) = programs(&p, &td, l1, l2);
    td.enter(&p);
    let exits = exits(&l1_log);
    assert_eq!((exits[0].rax, exits[0].r8), (EPT_VIOLATION, LENT_LATER));
    assert_eq!(exits[0].rcx & 7, 1, "a read");
    assert_eq!(exits[1].rax, HLT);
    let read = l2_log.lock().expect("log")[1].clone();
    assert_eq!(read, Outcome::Data(7u64.to_le_bytes().to_vec()));
}

#[test]
fn the_host_is_told_of_a_page_it_has_blocked_and_l2_goes_on_when_it_is_back() {
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [prepare(), vec![enter()]].concat();
    let (l1_log, _) = programs(&p, &td, l1, vec![write_word(SHARED, 1), GuestOp::hlt()]);
    // L1 has made the alias; then the host blocks the page before the VM gets to it.
    p.set_guest(td.tdvpr, recorded(prepare()).0);
    td.enter(&p);
    td.ok(&p, L::MemRangeBlock, regs(SHARED, td.tdr));
    td.ok(&p, L::MemTrack, regs(td.tdr, 0));
    let (l1, _) = recorded(vec![enter()]);
    p.set_guest(td.tdvpr, l1);
    let exit = td.enter(&p);
    assert_eq!(exit.rax, EPT_VIOLATION);
    assert_eq!((exit.rcx, exit.r8), (EXIT_OF_VM_1 | 2, SHARED));
    assert_eq!(td.enter(&p).rax, EPT_VIOLATION, "it is still blocked");
    td.ok(&p, L::MemRangeUnblock, regs(SHARED, td.tdr));
    assert_eq!(td.enter(&p).rax, VMCALL, "l2 halted, then l1 was through");
    drop(l1_log);
}

#[test]
fn a_call_of_l2_goes_to_the_host_if_l1_lets_it() {
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [
        prepare(),
        vec![vp_wr(L2_CTLS, CTL_VMCALL, CTL_VMCALL), enter()],
    ]
    .concat();
    let call = GuestOp::vmcall(5, [1, 2, 3, 4]);
    let (l1_log, l2_log) = programs(&p, &td, l1, vec![call, GuestOp::hlt()]);
    let exit = td.enter(&p);
    assert_eq!((exit.rax, exit.r11, exit.r12), (VMCALL, 5, 1));
    assert_eq!(exit.rcx, EXIT_OF_VM_1 | 0xFC00);
    // The host's answer reaches L2, which then halts into L1.
    let mut answer = Regs {
        rax: L::VpEnter.number(),
        r10: 99,
        ..regs(td.tdvpr, 0)
    };
    p.seamcall(0, &mut answer).expect("executes");
    assert_eq!(answer.rax, VMCALL, "l1 is through");
    assert_eq!(answer.rcx & EXIT_OF_VM_1, 0);
    let got = match &l2_log.lock().expect("log")[1] {
        Outcome::Registers(r) => (r.rax, r.r10),
        other => panic!("{other:?}"),
    };
    assert_eq!(got, (0, 99));
    assert_eq!(exits(&l1_log)[0].rax, HLT);
}

#[test]
fn the_host_can_have_l1_go_on_after_an_exit_of_l2() {
    const RESUME_L1: u64 = 1 << 53;
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [
        prepare(),
        vec![vp_wr(L2_CTLS, CTL_VMCALL, CTL_VMCALL), enter(), enter()],
    ]
    .concat();
    let call = GuestOp::vmcall(5, [1, 2, 3, 4]);
    let (l1_log, l2_log) = programs(&p, &td, l1, vec![call, GuestOp::hlt()]);
    td.enter(&p);
    let mut r = Regs {
        rax: L::VpEnter.number(),
        r10: 98,
        ..regs(td.tdvpr | RESUME_L1, 0)
    };
    p.seamcall(0, &mut r).expect("executes");
    assert_eq!(r.rax, VMCALL, "l1 is through");
    let exits = exits(&l1_log);
    let routed = Status(exits[0].rax);
    assert_eq!(
        routed,
        Code::L2_EXIT_HOST_ROUTED_TDVMCALL.detail(VMCALL as u32)
    );
    assert_eq!(exits[1].rax, HLT);
    // The call itself is complete, with what the host answered.
    match &l2_log.lock().expect("log")[1] {
        Outcome::Registers(r) => assert_eq!((r.rax, r.r10), (0, 98)),
        other => panic!("{other:?}"),
    }
    let status = td.status(&p, L::VpEnter, regs(td.tdvpr | RESUME_L1, 0));
    assert_eq!(status, Code::OPERAND_INVALID.detail(1), "l1 runs already");
}

#[test]
fn an_interrupt_of_the_host_leaves_l2_where_it_is() {
    let p = machine();
    let td = partitioned(&p, 0);
    let l1 = [prepare(), vec![enter()]].concat();
    let (l1_log, _) = programs(&p, &td, l1, vec![GuestOp::Nop, GuestOp::hlt()]);
    let (tdvpr, lp) = (td.tdvpr, td.lp);
    let p = Arc::new(p);
    let machine = p.clone();
    p.set_l2_guest(tdvpr, VM.into(), move |last: &Outcome| {
        if matches!(last, Outcome::Start(_)) {
            machine.set_pending(lp, pending::INTR);
            return GuestOp::Nop;
        }
        GuestOp::hlt()
    });
    let exit = td.enter(&p);
    assert_eq!((exit.rax, exit.rcx), (1, EXIT_OF_VM_1));
    p.set_pending(0, 0);
    assert_eq!(td.enter(&p).rax, VMCALL);
    assert_eq!(exits(&l1_log)[0].rax, HLT);
}

/// The host, as a debugger, asks for exits of VM 1.
fn set_debug_controls(p: &Platform, td: &Td, value: u64) {
    let mut r = Regs {
        rax: L::VpWr.number(),
        r8: value,
        r9: 7,
        ..regs(td.tdvpr, L2_DEBUG_CTLS)
    };
    let status = p.seamcall(0, &mut r).expect("executes");
    assert_eq!(status, Status::SUCCESS);
}

/// For each of these the transcripts lack at least one of the two statuses.
#[test]
fn a_debugger_is_told_the_reason_of_each_exit_that_l1_would_get() {
    for reason in unreplayed::DEBUGGED_EXITS {
        let p = machine();
        let td = partitioned(&p, DEBUG);
        let l1 = [prepare(), vec![enter()]].concat();
        let exit = VmExit {
            reason,
            ilen: 2,
            ..VmExit::default()
        };
        let (l1_log, _) = programs(&p, &td, l1, vec![GuestOp::Instruction(exit)]);
        for (control, name) in unreplayed::DEBUGGED {
            set_debug_controls(&p, &td, control);
            let status = Status(td.enter(&p).rax);
            let told = format!("{}|{}", status.code().status(), status.detail());
            assert_eq!(told, format!("{name}|{reason}"));
        }
        assert_eq!(exits(&l1_log).len(), 0);
        set_debug_controls(&p, &td, 0);
        assert_eq!(td.enter(&p).rax, VMCALL, "L1 halts after the exit");
        let [found] = exits(&l1_log)[..] else {
            panic!("one exit to L1")
        };
        assert_eq!(found.rax as u16, reason);
    }
}

#[test]
fn a_debugger_is_told_of_a_call_of_l2_before_l1_is() {
    let p = machine();
    let td = partitioned(&p, DEBUG);
    let l1 = [prepare(), vec![enter()]].concat();
    let (l1_log, _) = programs(&p, &td, l1, vec![GuestOp::vmcall(12, [0; 4])]);
    let [_, (to_l1, name)] = unreplayed::DEBUGGED;
    set_debug_controls(&p, &td, to_l1);
    let status = Status(td.enter(&p).rax);
    let told = format!("{}|EXIT:{}", status.code().status(), status.detail());
    assert_eq!(told, format!("{name}|EXIT:{VMCALL}"));
    assert_eq!(exits(&l1_log).len(), 0);
    set_debug_controls(&p, &td, 0);
    assert_eq!(td.enter(&p).rax, VMCALL);
    assert_eq!(exits(&l1_log).len(), 1);
}

#[test]
fn a_debugger_sees_every_exit_of_l2_first() {
    let p = machine();
    let td = partitioned(&p, DEBUG);
    let write = |value| set_debug_controls(&p, &td, value);
    let l1 = [prepare(), vec![enter()]].concat();
    let (l1_log, _) = programs(&p, &td, l1, vec![GuestOp::hlt()]);
    write(1);
    let before = Status(td.enter(&p).rax);
    assert_eq!(before, Code::TD_EXIT_BEFORE_L2_ENTRY.status());
    write(4);
    let every = Status(td.enter(&p).rax);
    assert_eq!(every, Code::TD_EXIT_ON_L2_VM_EXIT.detail(HLT as u32));
    write(2);
    let to_l1 = Status(td.enter(&p).rax);
    assert_eq!(to_l1, Code::TD_EXIT_ON_L2_TO_L1.detail(HLT as u32));
    write(0);
    assert_eq!(td.enter(&p).rax, VMCALL);
    assert_eq!(exits(&l1_log).len(), 1);
}

#[test]
fn l1_gets_the_msr_accesses_it_asks_for_and_the_module_answers_others() {
    const SGX_KEY_HASH: u64 = 0x8C;
    const XAPIC_DISABLE_STATUS: u64 = 0xBD;
    const PLATFORM_INFO: u64 = 0xCE;
    const ARCH_CAPABILITIES: u64 = 0x10A;
    let p = machine();
    let td = partitioned(&p, 0);
    // Reads of all MSRs below 0x100 are left to the module.
    let mut l1 = prepare();
    l1.extend((0..4).map(|word| vp_wr(L2_MSR_BITMAPS + word, 0, u64::MAX)));
    p.set_guest(td.tdvpr, recorded(l1).0);
    td.enter(&p);
    let mut r = Regs {
        rax: L::VpEnter.number(),
        ..regs(td.tdvpr, 0)
    };
    p.seamcall_step(td.lp, &mut r).expect("executes");
    let play = |registers, event| {
        let flow = p.guest_event(td.lp, registers, event, 0).expect("inside");
        match flow {
            GuestFlow::Resume {
                vm,
                guest,
                injected,
                ..
            } => (vm, guest.rax, injected),
            GuestFlow::Exit { host } => panic!("exit to the host: {host:?}"),
        }
    };
    let exit = |reason| {
        GuestEvent::Exit(VmExit {
            reason,
            ..VmExit::default()
        })
    };
    // From L1 into the VM, which reads the MSR; if it goes on, it halts.
    let rdmsr = |address| {
        let enter = Regs {
            rax: GuestLeaf::VpEnter.number(),
            ..regs(1 << 52, STATE)
        };
        play(enter, GuestEvent::Tdcall { mode_64bit: true });
        let then = play(regs(address, 0), exit(31));
        if then.0 != 0 {
            play(Regs::default(), exit(12));
        }
        then
    };
    assert_eq!(rdmsr(XAPIC_DISABLE_STATUS), (VM, 1, None));
    let (vm, _, injected) = rdmsr(SGX_KEY_HASH);
    assert_eq!((vm, injected.map(|e| e.vector)), (VM, Some(13)));
    assert_eq!(rdmsr(PLATFORM_INFO), (0, 31, None), "#VE if l1 did it");
    assert_eq!(rdmsr(ARCH_CAPABILITIES), (0, 31, None), "asked for");
}

#[test]
fn corrupted_state_of_l2_is_a_machine_check_of_the_td() {
    let p = machine();
    let mut td = Td::partitioned(&p, 0x4000_0000, 33, 0, 0, 1);
    td.tables(&p, 0, 0);
    let state = td.add(&p, STATE, 0);
    td.add(&p, VAPIC, 0);
    td.finalize(&p);
    p.write_memory(state, &[1]).expect("ram");
    let l1 = vec![vp_wr(L2_VAPIC, VAPIC, u64::MAX), enter()];
    p.set_guest(td.tdvpr, recorded(l1).0);
    let status = Status(td.enter(&p).rax);
    assert_eq!(status.code(), Code::NON_RECOVERABLE_TD_NON_ACCESSIBLE);
    assert!(p.td(td.tdr).expect("td").fatal);
}
