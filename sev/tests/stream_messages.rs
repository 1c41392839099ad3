//! Each message of a SEV or SEV-ES guest's way is lost, late, repeated, changed or cut: the guest runs on exactly one side.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test stream_messages` writes the table in docs/migration.md.

mod common;
mod stream_support;
mod swap_support;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::thread;

use kvm_ops_core::Tech;
use kvm_ops_sev::migrate::{Flow, StreamKey};
use stream_support::link::{Fate, Plan};
use stream_support::{Pair, Then};

const KEY: StreamKey = StreamKey::new([7; 32]);

/// Names of the kinds of records.
const KINDS: [&str; 18] = [
    "", "Hello", "Resume", "Offer", "Start", "Ready", "Private", "Shared", "Absent", "Vcpu",
    "RoundEnd", "RoundOk", "Prepare", "Prepared", "Commit", "Done", "Cancel", "Refuse",
];

/// What becomes of a message, and of the link: column, fates, and whether another link follows. A byte is changed at the begin of
/// the payload, in the header of a packet, and in its data.
const FATES: [(&str, &[Fate], Then); 6] = [
    ("lost", &[Fate::Lost], Then::AnotherLink),
    ("late", &[Fate::Late], Then::AnotherLink),
    ("twice", &[Fate::Twice], Then::AnotherLink),
    (
        "changed",
        &[Fate::Changed(0), Fate::Changed(20), Fate::Changed(100)],
        Then::AnotherLink,
    ),
    ("cut", &[Fate::Cut], Then::AnotherLink),
    ("cut, no other link", &[Fate::Cut], Then::NoLink),
];

/// A way on which one message meets a fate, and where the guest is then.
fn met(tech: Tech, key: Option<StreamKey>, plans: [Option<Plan>; 2], then: Then) -> String {
    let mut pair = Pair::new(tech, true);
    let journey = pair.journey(plans, key.clone(), then, &mut || Flow::GoOn);
    let side = pair.runs_at();
    let changes = plans
        .iter()
        .flatten()
        .any(|plan| matches!(plan.fate, Fate::Changed(_)));
    // Without a key nobody notices what is changed on purpose in a shared page.
    assert!(side != "target" || key.is_none() && changes || pair.shared_page_came());
    assert_eq!(pair.end(), "nothing");
    let how = match (journey.fenced, journey.links) {
        (true, _) => ", taken over",
        (false, 1) => "",
        _ => ", next link",
    };
    format!("{side}{how}")
}

/// A cell of the table.
fn cell(tech: Tech, side: usize, nth: usize, fates: &[Fate], then: Then) -> String {
    let with = |key: Option<StreamKey>| {
        let ends = fates.iter().map(|fate| {
            let mut plans = [None, None];
            plans[side] = Some(Plan { nth, fate: *fate });
            met(tech, key.clone(), plans, then)
        });
        let ends: BTreeSet<_> = ends.collect();
        Vec::from_iter(ends).join(" or ")
    };
    let open = with(None);
    // A message that does not come has no tag to look at.
    if matches!(fates, [Fate::Lost] | [Fate::Late]) {
        return open;
    }
    match with(Some(KEY)) {
        keyed if keyed == open => open,
        keyed => format!("{open}; with a key {keyed}"),
    }
}

/// Side, number and name of each message.
fn messages(tech: Tech) -> Vec<(usize, usize, String)> {
    let mut pair = Pair::new(tech, true);
    let journey = pair.journey([None, None], None, Then::NoLink, &mut || Flow::GoOn);
    assert_eq!(pair.runs_at(), "target");
    assert_eq!(pair.end(), "nothing");
    let mut all = Vec::new();
    for (side, kinds) in journey.kinds.iter().enumerate() {
        for (nth, kind) in kinds.iter().enumerate() {
            let same = kinds[..nth].iter().filter(|before| *before == kind).count();
            let which = match same {
                0 => String::new(),
                same => format!(" {}", same + 1),
            };
            let name = KINDS[usize::from(*kind)];
            all.push((
                side,
                nth,
                format!("{}: {name}{which}", ["source", "target"][side]),
            ));
        }
    }
    all
}

#[test]
fn whatever_happens_to_a_message_the_guest_runs_on_exactly_one_side() {
    // The messages of a SEV guest are the same, but for the one with its registers.
    let es = messages(Tech::SevEs);
    let sev = messages(Tech::Sev);
    assert_eq!(es, sev);
    let registers = sev.into_iter().filter(|(.., name)| name.contains("Vcpu"));
    let registers = registers.map(|(side, nth, name)| (Tech::Sev, side, nth, name + " of SEV"));
    let all = es
        .into_iter()
        .map(|(side, nth, name)| (Tech::SevEs, side, nth, name));
    let all = Vec::from_iter(all.chain(registers));
    // Some columns wait for messages that do not come.
    let columns = thread::scope(|scope| {
        let threads = FATES.map(|(_, fates, then)| {
            let all = &all;
            scope.spawn(move || {
                let cells = all.iter();
                let cells = cells.map(|(tech, side, nth, _)| cell(*tech, *side, *nth, fates, then));
                Vec::from_iter(cells)
            })
        });
        threads.map(|thread| thread.join().expect("no panic"))
    });
    let heads = FATES.map(|(name, ..)| name).join(" | ");
    let mut table = format!("| message | {heads} |\n|---|---|---|---|---|---|---|\n");
    for (row, (.., name)) in all.iter().enumerate() {
        let cells = columns.each_ref().map(|column| &*column[row]).join(" | ");
        writeln!(table, "| {name} | {cells} |").unwrap();
    }
    swap_support::compare_table("sev-messages", &table);
}
