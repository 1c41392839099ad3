//! Each call of a guest's way to another platform fails, on either side, at each place where it is made.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test carry_failures` writes the table in docs/migration.md.

mod common;
mod swap_support;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;

use common::*;
use kvm_ops_core::{Error, Fault, FaultPlan, Host, InjectedHost, PspPort, Step, VcpuOps, VmOps};
use kvm_ops_sev::{Failure, SevVm};
use kvm_ops_sim::SimHost;
use soft_amd_sp::{Command, Instruction, Operation, Status};
use swap_support::agent::{Agent, REFUSED, agents_over, charge_of};
use swap_support::{FileStore, contents, leaves_by, waiting};

/// One that has a name, and one without.
const STATUSES: [u64; 2] = [Status::HWERROR_PLATFORM.0 as u64, 0x1234];
/// Codes of RMPUPDATE that no retry changes.
const CODES: [u64; 2] = [2, 99];
const PAGES: u64 = 3;
/// Calls of one kind that fail in turn, beside the last.
const PLACES: u64 = 3;

type Machine = InjectedHost<SimHost>;

const CALLS: [(&str, u64); 10] = [
    ("SNP_PAGE_SWAP_OUT", Command::SNP_PAGE_SWAP_OUT as u64),
    ("SNP_PAGE_SWAP_IN", Command::SNP_PAGE_SWAP_IN as u64),
    ("SNP_PAGE_MD_INIT", Command::SNP_PAGE_MD_INIT as u64),
    ("SNP_GUEST_REQUEST", Command::SNP_GUEST_REQUEST as u64),
    ("SNP_GCTX_CREATE", Command::SNP_GCTX_CREATE as u64),
    ("SNP_ACTIVATE", Command::SNP_ACTIVATE as u64),
    ("SNP_PAGE_RECLAIM", Command::SNP_PAGE_RECLAIM as u64),
    ("RMPUPDATE", FaultPlan::RMPUPDATE),
    ("page from the host", FaultPlan::ALLOC),
    ("ASID into the VMCBs", FaultPlan::BIND_ASID),
];

/// A platform with its agent and its VM.
struct Side {
    host: Machine,
    plan: Arc<FaultPlan>,
    agent: Agent<Machine>,
}

fn sides() -> [Side; 2] {
    let plans = [(), ()].map(|()| Arc::new(FaultPlan::new()));
    let [here, there] =
        [0, 1].map(|n| InjectedHost::new(common::host(31 + n as u64), Arc::clone(&plans[n])));
    let (agent, peer) = agents_over((&here, here.inner()), (&there, there.inner()));
    let [plan, plan_there] = plans;
    [
        Side {
            host: here,
            plan,
            agent,
        },
        Side {
            host: there,
            plan: plan_there,
            agent: peer,
        },
    ]
}

/// The way. After a failure the source takes its guest back.
fn journey(
    [here, there]: &mut [Side; 2],
    from: &SevVm<Machine>,
    to: &SevVm<Machine>,
) -> Option<(&'static str, Error)> {
    let mut file = FileStore::new();
    let failed = match from.depart(&mut file, &mut here.agent) {
        Err(error) => ("depart", error),
        Ok(image) => match to.arrive(&image, &mut file, &mut there.agent) {
            Err(error) => ("arrive", error),
            Ok(()) => {
                from.hand_off().unwrap();
                to.resume(&mut file).unwrap();
                return None;
            }
        },
    };
    from.resume(&mut file)
        .expect("the failure was the only one");
    Some(failed)
}

fn books(side: Side, vm: SevVm<Machine>) -> Vec<String> {
    let Side { host, agent, .. } = side;
    let mut leaks = Vec::new();
    for report in [free(vm), agent.into_report()] {
        leaks.extend(report.leaks.iter().map(|leak| (leak.what, leak.operation)));
    }
    let pages = leaks
        .iter()
        .filter(|(what, _)| matches!(what, kvm_ops_core::Leaked::Page(_)));
    assert_eq!(
        host.inner().pages().unwrap().frames_out(),
        pages.count() as u64
    );
    let keys = leaks
        .iter()
        .filter(|(what, _)| matches!(what, kvm_ops_core::Leaked::Key(_)));
    assert_eq!(
        host.psp().unwrap().asid_pools().in_use(),
        keys.count() as u32
    );
    assert_eq!(host.inner().live_vms(), 0);
    let name = |what| match what {
        kvm_ops_core::Leaked::Page(_) => "page",
        kvm_ops_core::Leaked::Key(_) => "ASID",
        _ => "?",
    };
    leaks
        .iter()
        .map(|(what, by)| format!("{} ({by})", name(*what)))
        .collect()
}

type Row = [String; 3];

fn failed(at: usize, name: &str, call: u64, nth: u64, status: u64) -> Row {
    let what = format!("side {at}: {name} {nth} {status:#x}");
    let mut sides = sides();
    let ram = [(), ()].map(|()| Ram::new(1 << 20));
    let (from, mut old) = charge_of(&sides[0].host, &sides[0].agent.vm, &ram[0], PAGES);
    let (to, mut new) = waiting(&sides[1].host, &ram[1], swap_support::POLICY);
    let before = contents(sides[0].host.inner(), &from, PAGES);
    sides[at].plan.arm(Fault::nth(nth).of(call).status(status));
    let shown = journey(&mut sides, &from, &to);
    assert!(sides[at].plan.disarm(), "{what}: it did not happen");
    if let Some((_, error)) = shown {
        let named = Failure::of(&error).map(|failure| failure.operation.name());
        let expected = match call {
            FaultPlan::ALLOC | FaultPlan::BIND_ASID => Error::NoMemory,
            _ if name == "SNP_GUEST_REQUEST" => Error::Protected(&REFUSED),
            _ => error,
        };
        assert!(
            named == Some(name) || named.is_none() && error == expected,
            "{what}: {error}"
        );
    }
    let (guest, vm, below) = match shown {
        None => ("target", &to, sides[1].host.inner()),
        Some(_) => ("source", &from, sides[0].host.inner()),
    };
    assert_eq!(contents(below, vm, PAGES), before, "{what}");
    match shown {
        None => {
            load(
                &mut new,
                kvm_ops_core::guest::Script::new().output(0x82, &[1]),
            );
            assert!(leaves_by(&mut new, 0x82), "{what}");
            assert_eq!(old.vcpu_run().err(), Some(Error::Poisoned), "{what}");
        }
        Some(_) => {
            assert!(leaves_by(&mut old, 0x81), "{what}");
            let idle = Some(Error::WrongState(Step::Initialized));
            assert_eq!(
                (to.step(), new.vcpu_run().err()),
                (Step::Initialized, idle),
                "{what}"
            );
            assert_eq!(to.account().held(), 0, "{what}");
        }
    }
    drop((old, new));
    let [here, there] = sides;
    let leaks = [books(here, from), books(there, to)].concat();
    let leaks = match leaks.is_empty() {
        true => String::from("nothing"),
        false => leaks.join(", "),
    };
    let step = shown.map_or("the report", |(step, _)| step);
    [step.into(), guest.into(), leaks]
}

/// The calls of a way without failures, on either side.
fn counts() -> [[u64; CALLS.len()]; 2] {
    let mut sides = sides();
    let ram = [(), ()].map(|()| Ram::new(1 << 20));
    let (from, old) = charge_of(&sides[0].host, &sides[0].agent.vm, &ram[0], PAGES);
    let (to, new) = waiting(&sides[1].host, &ram[1], swap_support::POLICY);
    let seen = |sides: &[Side; 2]| {
        [0, 1].map(|at| {
            let below = sides[at].host.inner();
            (sp(below).counters(), below.pages().unwrap().frames_taken())
        })
    };
    let before = seen(&sides);
    assert_eq!(journey(&mut sides, &from, &to), None);
    let after = seen(&sides);
    drop((old, new));
    let [here, there] = sides;
    assert!(books(here, from).is_empty() && books(there, to).is_empty());
    [0, 1].map(|at| {
        CALLS.map(|(_, call)| {
            let operation: Operation = match call {
                FaultPlan::ALLOC => return after[at].1 - before[at].1,
                FaultPlan::BIND_ASID => return at as u64,
                FaultPlan::RMPUPDATE => Instruction::RmpUpdate.into(),
                number => Command::from_id(number as u32).unwrap().into(),
            };
            after[at].0.calls(operation) - before[at].0.calls(operation)
        })
    })
}

fn rows() -> Vec<String> {
    let mut rows = Vec::new();
    for (at, counts) in counts().into_iter().enumerate() {
        for ((name, call), calls) in CALLS.into_iter().zip(counts) {
            let statuses = match call {
                FaultPlan::ALLOC | FaultPlan::BIND_ASID => &[0][..],
                FaultPlan::RMPUPDATE => &CODES,
                _ => &STATUSES,
            };
            let places: BTreeSet<u64> = (1..=calls.min(PLACES)).chain([calls / 2, calls]).collect();
            let mut seen: BTreeSet<Row> = BTreeSet::new();
            for nth in places.into_iter().filter(|nth| *nth > 0) {
                let outcomes: Vec<Row> = (statuses.iter())
                    .map(|status| failed(at, name, call, nth, *status))
                    .collect();
                let same = outcomes.windows(2).all(|pair| pair[0] == pair[1]);
                assert!(same, "{name} {nth}: {outcomes:?}");
                seen.extend(outcomes.into_iter().take(1));
            }
            let side = ["source", "target"][at];
            for [step, guest, leaks] in seen {
                rows.push(format!(
                    "| {side}: {name} | {calls} | {step} | {guest} | {leaks} |"
                ));
            }
        }
    }
    rows
}

#[test]
fn whatever_call_fails_the_guest_runs_on_exactly_one_side_and_the_books_add_up_on_both() {
    let head = "| fails | calls | shows in | the guest | leaks |\n|---|---|---|---|---|\n";
    let mut table = String::from(head);
    for row in rows() {
        writeln!(table, "{row}").unwrap();
    }
    swap_support::compare_table("carry-failures", &table);
}
