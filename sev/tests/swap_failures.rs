//! Each call of a guest's way to a file and back fails, at each place where it is made, with each plausible status.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test swap_failures` writes the table in docs/migration.md.

mod common;
mod swap_support;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use common::*;
use kvm_ops_core::{Error, Fault, FaultPlan, Host, InjectedHost, Leaked, PspPort, Step, VmOps};
use kvm_ops_sev::{Failure, SevVm, SwapSlot, SwapStore};
use kvm_ops_sim::SimHost;
use soft_amd_sp::{Command, Instruction, Operation, Status};
use swap_support::{FileStore, contents, guest, leaves_by};

/// Statuses that commands give for reasons that a host cannot rule out, and one without a name.
const STATUSES: [u64; 5] = [
    Status::INVALID_PARAM.0 as u64,
    Status::INVALID_MDATA_ENTRY.0 as u64,
    Status::BAD_MEASUREMENT.0 as u64,
    Status::HWERROR_PLATFORM.0 as u64,
    0x1234,
];
/// Codes of RMPUPDATE that no retry changes.
const CODES: [u64; 3] = [1, 2, 99];
/// Enough for two pages of records, and the one of theirs.
const PAGES: u64 = 65;
/// Calls of one kind that fail in turn, beside the last ones.
const PLACES: u64 = 4;

type Machine = InjectedHost<SimHost>;

/// The calls of the way, by name.
const CALLS: [(&str, u64); 6] = [
    ("SNP_PAGE_SWAP_OUT", Command::SNP_PAGE_SWAP_OUT as u64),
    ("SNP_PAGE_SWAP_IN", Command::SNP_PAGE_SWAP_IN as u64),
    ("SNP_PAGE_MD_INIT", Command::SNP_PAGE_MD_INIT as u64),
    ("SNP_PAGE_RECLAIM", Command::SNP_PAGE_RECLAIM as u64),
    ("RMPUPDATE", FaultPlan::RMPUPDATE),
    ("page from the host", FaultPlan::ALLOC),
];

/// The outcome of one failure: where it shows, what becomes of the guest, and the leaks.
type Row = [String; 3];

/// Out and back, again after each failure. Returns where it failed first.
fn there_and_back(vm: &SevVm<Machine>, file: &mut FileStore) -> Option<(&'static str, Error)> {
    let first = match vm.suspend(file) {
        Ok(_) => match vm.resume(file) {
            Ok(()) => return None,
            Err(error) => ("resume", error),
        },
        Err(error) => ("suspend", error),
    };
    if vm.step() == Step::Runnable {
        vm.resume(file).expect("the failure was the only one");
    }
    Some(first)
}

fn failed(name: &str, call: u64, nth: u64, status: u64) -> Option<Row> {
    let what = format!("{name} {nth} {status:#x}");
    let plan = Arc::new(FaultPlan::new());
    let host: Machine = InjectedHost::new(common::host(1), Arc::clone(&plan));
    let ram = Ram::new(1 << 20);
    let (vm, mut vcpu) = guest(&host, &ram, PAGES);
    let (before, held) = (contents(host.inner(), &vm, PAGES), vm.account().held());
    let mut file = FileStore::new();
    plan.arm(Fault::nth(nth).of(call).status(status));
    let shown = there_and_back(&vm, &mut file);
    if !plan.disarm() {
        assert!(shown.is_none());
        return None;
    }
    if let Some((_, error)) = shown {
        match Failure::of(&error) {
            Some(failure) => {
                assert_eq!(failure.operation.name(), name, "{what}");
                assert_eq!(u64::from(failure.code), status, "{what}");
            }
            None => assert_eq!((name, error), ("page from the host", Error::NoMemory)),
        }
    }
    let guest = match vm.step() {
        Step::Runnable => {
            assert_eq!(contents(host.inner(), &vm, PAGES), before, "{what}");
            assert!(leaves_by(&mut vcpu, 0x81), "{what}");
            assert_eq!(vm.account().held(), held, "{what}");
            "runs on"
        }
        Step::Poisoned => "lost, poisoned",
        other => panic!("{what}: {other:?}"),
    };
    drop(vcpu);
    let report = free(vm);
    let pages = report
        .leaks
        .iter()
        .filter(|l| matches!(l.what, Leaked::Page(_)));
    let (pages, all) = (pages.count(), report.leaks.len());
    assert_eq!((pages, host.inner().live_vms()), (all, 0), "{what}");
    assert_eq!(
        host.inner().pages().unwrap().frames_out(),
        all as u64,
        "{what}"
    );
    assert_eq!(host.psp().unwrap().asid_pools().in_use(), 0, "{what}");
    let leaks = match all {
        0 => String::from("nothing"),
        1 => format!("page ({})", report.leaks[0].operation),
        n => panic!("{what}: {n} leaks"),
    };
    let step = shown.map_or("the report", |(step, _)| step);
    Some([step.into(), guest.into(), leaks])
}

/// The number of calls of each kind on the way.
fn counts() -> [u64; CALLS.len()] {
    let (host, ram) = (common::host(1), Ram::new(1 << 20));
    let (vm, vcpu) = guest(&host, &ram, PAGES);
    let (before, taken) = (sp(&host).counters(), host.pages().unwrap().frames_taken());
    let mut file = FileStore::new();
    vm.suspend(&mut file).unwrap();
    vm.resume(&mut file).unwrap();
    let after = sp(&host).counters();
    let pages = host.pages().unwrap().frames_taken() - taken;
    drop(vcpu);
    free_clean(vm);
    CALLS.map(|(_, call)| {
        let operation: Operation = match call {
            FaultPlan::ALLOC => return pages,
            FaultPlan::RMPUPDATE => Instruction::RmpUpdate.into(),
            number => Command::from_id(number as u32).unwrap().into(),
        };
        after.calls(operation) - before.calls(operation)
    })
}

fn rows() -> Vec<String> {
    let mut rows = Vec::new();
    for ((name, call), calls) in CALLS.into_iter().zip(counts()) {
        let statuses = match call {
            FaultPlan::ALLOC => &[0][..],
            FaultPlan::RMPUPDATE => &CODES,
            _ => &STATUSES,
        };
        let last = calls.saturating_sub(PLACES) + 1..=calls;
        let places = (1..=calls.min(PLACES)).chain([calls / 2]).chain(last);
        let mut seen: BTreeMap<Row, u64> = BTreeMap::new();
        for nth in places.filter(|nth| *nth > 0) {
            let outcomes: Vec<Row> = statuses
                .iter()
                .map(|status| failed(name, call, nth, *status).expect("that many calls are made"))
                .collect();
            // One rule for all statuses: the host does not interpret them.
            assert!(
                outcomes.windows(2).all(|pair| pair[0] == pair[1]),
                "{name} {nth}: {outcomes:?}"
            );
            *seen.entry(outcomes[0].clone()).or_default() += 1;
        }
        for [step, guest, leaks] in seen.into_keys() {
            rows.push(format!("| {name} | {calls} | {step} | {guest} | {leaks} |"));
        }
    }
    rows
}

#[test]
fn whatever_call_fails_the_guest_runs_on_or_is_reported_lost_and_the_books_add_up() {
    let mut table =
        String::from("| fails | calls | shows in | the guest | leaks |\n|---|---|---|---|---|\n");
    for row in rows() {
        writeln!(table, "{row}").unwrap();
    }
    swap_support::compare_table("swap-failures", &table);
}

/// The store has no room, and then firmware does not take the page back; or it refuses the page, and then does not let go of it.
#[test]
fn two_failures_at_once_poison_the_vm_and_the_books_add_up() {
    for (call, then) in [
        (None, Command::SNP_PAGE_SWAP_IN),
        (Some(Command::SNP_PAGE_SWAP_OUT), Command::SNP_PAGE_RECLAIM),
    ] {
        let plan = Arc::new(FaultPlan::new());
        let host: Machine = InjectedHost::new(common::host(1), Arc::clone(&plan));
        let ram = Ram::new(1 << 20);
        let (vm, vcpu) = guest(&host, &ram, 4);
        let status = u64::from(Status::HWERROR_PLATFORM.0);
        let calls = call.into_iter().chain([then]);
        calls.for_each(|call| plan.arm(Fault::nth(1).of(call as u64).status(status)));
        let failed = match call {
            Some(_) => vm.suspend(&mut FileStore::new()),
            None => vm.suspend(&mut NoRoom),
        };
        assert!(plan.disarm());
        // The error is of what the guest suffers from.
        let named = Failure::of(&failed.unwrap_err()).unwrap().operation.name();
        assert_eq!(named, call.unwrap_or(then).name());
        assert_eq!(vm.step(), Step::Poisoned);
        drop(vcpu);
        free_clean(vm);
        nothing_left(host.inner());
    }
}

struct NoRoom;

impl SwapStore for NoRoom {
    fn put(&mut self, _: SwapSlot, _: &[u8]) -> kvm_ops_core::Result<()> {
        Err(Error::NoMemory)
    }

    fn get(&mut self, _: SwapSlot, _: &mut [u8]) -> kvm_ops_core::Result<()> {
        Err(Error::NoMemory)
    }
}
