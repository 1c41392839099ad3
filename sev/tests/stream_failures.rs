//! Each call of a SEV or SEV-ES guest's way over a byte stream fails in every plausible way, one at a time: the guest runs on
//! exactly one side, and pages, ASIDs and handles add up on both.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test stream_failures` writes the tables in docs/migration.md.

mod common;
mod stream_support;
mod swap_support;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use kvm_ops_core::{Error, Fault, FaultPlan, Tech};
use kvm_ops_sev::migrate::Flow;
use soft_amd_sp::{Command, Status};
use stream_support::{Pair, Then, word};

/// The guests, and whether their machines have an RMP.
const GUESTS: [(&str, Tech, bool); 2] = [("SEV", Tech::Sev, false), ("SEV-ES", Tech::SevEs, true)];

const STATUSES: [Status; 12] = [
    Status::HWERROR_PLATFORM,
    Status::INVALID_PLATFORM_STATE,
    Status::INVALID_GUEST,
    Status::INVALID_GUEST_STATE,
    Status::INVALID_LEN,
    Status::INVALID_CERTIFICATE,
    Status::BAD_SIGNATURE,
    Status::BAD_MEASUREMENT,
    Status::POLICY_FAILURE,
    Status::ASID_OWNED,
    Status::DFFLUSH_REQUIRED,
    Status::RESOURCE_LIMIT,
];
/// One without a name.
const NAMELESS: u64 = 0x1234;
/// Codes of RMPUPDATE that no retry changes.
const CODES: [u64; 2] = [2, 99];
/// A call fails at each of so many places, and then at some up to the last one.
const EACH: u64 = 8;
const PLACES: u64 = 60;

/// The calls of the ports beside the commands.
const PORTS: [(&str, u64); 8] = [
    ("RMPUPDATE", FaultPlan::RMPUPDATE),
    ("PSMASH", FaultPlan::PSMASH),
    ("page from the host", FaultPlan::ALLOC),
    ("ASID into the VMCBs", FaultPlan::BIND_ASID),
    ("entry of the nested tables", FaultPlan::MAP_ENCRYPTED),
    ("slot of the VM", FaultPlan::SET_SLOT),
    ("shared range", FaultPlan::SET_SHARED),
    ("VM of the host", FaultPlan::CREATE_VM),
];

/// A way in which a call fails.
type Failure = (String, Fault);

fn failures(call: u64, nth: u64) -> Vec<Failure> {
    let fault = || Fault::nth(nth).of(call);
    let status = |status: &Status| {
        let name = status.name().expect("a name");
        (name.into(), fault().status(status.0.into()))
    };
    let port = [("busy", Error::Busy), ("no memory", Error::NoMemory)]
        .map(|(name, error)| (name.into(), fault().error(error)));
    match call {
        FaultPlan::RMPUPDATE | FaultPlan::PSMASH => CODES
            .map(|code| (format!("code {code}"), fault().status(code)))
            .into(),
        call if call < FaultPlan::ALLOC => {
            let mut all = Vec::from_iter(STATUSES.iter().map(status));
            all.push((format!("{NAMELESS:#x}"), fault().status(NAMELESS)));
            all.push(("not issued".into(), fault().error(Error::NoMemory)));
            all
        }
        _ => port.into(),
    }
}

/// The failures of a row in words: all statuses, or all but the one that a new link may mend, are named as one.
fn in_words(mut names: BTreeSet<String>) -> String {
    let statuses = failures(Command::ACTIVATE as u64, 1);
    let statuses = statuses.into_iter().map(|(name, _)| name);
    let mut rest: BTreeSet<_> = statuses.filter(|name| name != "not issued").collect();
    rest.retain(|name| !names.contains(name));
    let all = match rest.pop_first() {
        None => "any status",
        Some(name) if name == "BAD_MEASUREMENT" && rest.is_empty() => {
            "any status but BAD_MEASUREMENT"
        }
        Some(_) => return Vec::from_iter(names).join(", "),
    };
    names.retain(|name| name == "not issued");
    let all = [String::from(all)].into_iter().chain(names);
    Vec::from_iter(all).join(", ")
}

/// What both ends say, who has the guest, and what leaks.
type Outcome = [String; 4];

/// A way on which a call fails; `back` cancels it when only SEND_FINISH is left, and the fault is one of the way back. `None` if the
/// call was not made.
fn outcome((tech, snp): (Tech, bool), side: usize, back: bool, fault: Fault) -> Option<Outcome> {
    let mut pair = Pair::new(tech, snp);
    let plan = std::sync::Arc::clone(&pair.sides[side].plan);
    let before = plan.happened();
    if !back {
        plan.arm(fault);
    }
    let journey = pair.journey([None, None], None, Then::AnotherLink, &mut || match back {
        true => {
            plan.arm(fault);
            Flow::Cancel
        }
        false => Flow::GoOn,
    });
    plan.disarm();
    let happened = plan.happened() > before;
    let mut at = String::from(pair.runs_at());
    assert!(at == "source" || pair.shared_page_came());
    if journey.links > 1 {
        at += ", next link";
    }
    if back {
        let next = pair.journey([None, None], None, Then::AnotherLink, &mut || Flow::GoOn);
        match next.said {
            [Ok(()), Ok(())] => at += &format!(", then {}", pair.runs_at()),
            _ => {
                assert_eq!(pair.runs_at(), "source");
                let [sent, received] = next.said.each_ref().map(word);
                at += &format!(", then source: {sent}; {received}");
            }
        }
    }
    let leaked = pair.end();
    let [sent, received] = journey.said.each_ref().map(word);
    happened.then_some([sent, received, at, leaked])
}

/// The commands of a way without failures, or of its way back, at one side.
fn commands((tech, snp): (Tech, bool), side: usize, back: bool) -> Vec<(&'static str, u64)> {
    let mut pair = Pair::new(tech, snp);
    let below = pair.sides[side].host.inner().clone();
    let counts = || {
        Command::ALL
            .iter()
            .map(|c| common::sp(&below).counters().calls(*c))
    };
    let before = RefCell::new(Vec::from_iter(counts()));
    pair.journey([None, None], None, Then::AnotherLink, &mut || match back {
        true => {
            *before.borrow_mut() = counts().collect();
            Flow::Cancel
        }
        false => Flow::GoOn,
    });
    let made = counts()
        .zip(before.into_inner())
        .map(|(now, then)| now > then);
    let made = Command::ALL.iter().zip(made).filter(|(_, made)| *made);
    let made = made.map(|(command, _)| (command.name(), *command as u64));
    let made = made.collect();
    pair.end();
    made
}

fn rows(back: bool) -> Vec<String> {
    let mut rows = Vec::new();
    for side in 0..2 {
        // Which failures of a call lead to an outcome, and the guests for which that is so.
        let mut seen: BTreeMap<(String, Outcome, String), Vec<&str>> = BTreeMap::new();
        let mut order = Vec::new();
        for (guest, tech, snp) in GUESTS {
            let commands = commands((tech, snp), side, back);
            for (name, call) in commands.into_iter().chain(PORTS) {
                let mut found: BTreeMap<Outcome, BTreeSet<String>> = BTreeMap::new();
                let mut nth = 1;
                while nth <= PLACES {
                    let mut all = failures(call, nth);
                    if nth > 1 {
                        // They are not told apart: one is enough for the other places.
                        all.truncate(1);
                    }
                    let mut made = false;
                    for (with, fault) in all {
                        if let Some(outcome) = outcome((tech, snp), side, back, fault) {
                            made = true;
                            found.entry(outcome).or_default().insert(with);
                        }
                    }
                    if !made {
                        break;
                    }
                    nth += 1 + nth / EACH;
                }
                for (outcome, names) in found {
                    let names = in_words(names);
                    let key = (
                        format!("{}: {name}", ["source", "target"][side]),
                        outcome,
                        names,
                    );
                    if !order.contains(&key) {
                        order.push(key.clone());
                    }
                    seen.entry(key).or_default().push(guest);
                }
            }
        }
        for key in order {
            let guests = seen[&key].join(", ");
            let (call, [sent, received, at, leaked], names) = key;
            rows.push(format!(
                "| {call} | {guests} | {names} | {sent} | {received} | {at} | {leaked} |\n"
            ));
        }
    }
    rows
}

const HEAD: &str = "| fails | guest | with | `Sender` says | `Receiver` says | the guest | leaked |\n|---|---|---|---|---|---|---|\n";

#[test]
fn whatever_call_fails_the_guest_runs_on_one_side_and_the_books_add_up() {
    let table = HEAD.to_owned() + &rows(false).concat();
    swap_support::compare_table("sev-stream-failures", &table);
}

#[test]
fn whatever_call_of_the_way_back_fails_the_guest_runs_on_at_its_source() {
    let rows = rows(true);
    assert!(
        rows.iter().all(|row| row.contains("| source, then ")),
        "{rows:?}"
    );
    let table = HEAD.to_owned() + &rows.concat();
    swap_support::compare_table("sev-way-back", &table);
}
