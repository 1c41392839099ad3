//! Tables of failures: the ways in which a call fails, what the ends say of it, what becomes of each message, and the
//! document that has it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use kvm_ops_core::{Error, Field};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::{MigrateError, StreamKey};
use kvm_ops_tdx::status::{Class, operand};

use super::link::{Fate, Plan};
use crate::common::Injected;

const FOR_EVER: u64 = u64::MAX;
/// Bit 61 of a status word.
const FATAL: u64 = 1 << 61;

pub const SIDES: [&str; 2] = ["source", "target"];

/// A way in which a call fails: name, answer, times.
pub type Failure = (&'static str, Injected, u64);

/// What both ends say and who has the guest, and the failures that lead there.
pub type Outcomes = BTreeMap<[String; 3], Vec<&'static str>>;

/// The ways in which a leaf can fail.
pub fn failures(side: usize, leaf: Leaf) -> Vec<Failure> {
    let status = |class: Class, detail| Injected::Status(class.with(detail).get());
    let mut all = vec![
        (
            "OPERAND_INVALID",
            status(Class::OPERAND_INVALID, operand::R8),
            1,
        ),
        (
            "OPERAND_BUSY once",
            status(Class::OPERAND_BUSY, operand::OP_STATE),
            1,
        ),
        (
            "OPERAND_BUSY for ever",
            status(Class::OPERAND_BUSY, operand::OP_STATE),
            FOR_EVER,
        ),
        (
            "not called",
            Injected::Port(Error::Invalid(Field::Cpu, 99)),
            1,
        ),
    ];
    if matches!(
        leaf,
        Leaf::ExportStateImmutable | Leaf::ImportStateImmutable
    ) {
        all.push(("RND_NO_ENTROPY once", status(Class::RND_NO_ENTROPY, 0), 1));
        all.push((
            "RND_NO_ENTROPY for ever",
            status(Class::RND_NO_ENTROPY, 0),
            FOR_EVER,
        ));
    }
    let has_no_bundle = [Leaf::ImportEnd, Leaf::ImportCommit, Leaf::ImportAbort].contains(&leaf);
    if side == 1 && leaf.name().starts_with("TDH.IMPORT.") && !has_no_bundle {
        let mac = Class::OPERAND_INVALID.with(operand::R8).get() | FATAL;
        all.push(("fatal", Injected::Status(mac), 1));
    }
    all
}

/// What an end says.
pub fn word<T>(ended: &Result<T, MigrateError>) -> String {
    match ended {
        Ok(_) => "done".into(),
        Err(MigrateError::Failed { operation, error }) => match error {
            Error::Firmware(_) => format!("{operation}: the status"),
            error => format!("{operation}: {error}"),
        },
        Err(MigrateError::Refused(refusal)) => format!("refused: {}", refusal.reason),
        Err(MigrateError::Lost(refusal)) => format!("lost: {}", refusal.reason),
        // The other end refused to begin.
        Err(MigrateError::WrongPhase) => "nothing".into(),
        Err(error) => error.to_string(),
    }
}

/// The table of calls and their failures between two markers of the document.
pub fn document_calls(marker: &str, rows: Vec<(String, Outcomes)>) {
    let mut table = String::from(
        "| call | fails with | `Sender` says | `Receiver` says | the guest |\n|---|---|---|---|---|\n",
    );
    for (call, outcomes) in rows {
        for ([sent, received, owner], names) in outcomes {
            let names = names.join(", ");
            let _ = writeln!(
                table,
                "| {call} | {names} | {sent} | {received} | {owner} |"
            );
        }
    }
    document(marker, &table);
}

/// The key of a link that has one.
pub const KEY: StreamKey = StreamKey::new([0x5a; 32]);

/// The messages, by the numbers of their kinds.
const MESSAGES: [(u8, &str); 24] = [
    (1, "Hello"),
    (2, "Resume"),
    (3, "Ready"),
    (4, "Bundle"),
    (5, "Shared"),
    (6, "RoundEnd"),
    (7, "RoundOk"),
    (8, "Prepare"),
    (9, "Prepared"),
    (10, "Start"),
    (11, "Done"),
    (12, "Returned"),
    (13, "Cancel"),
    (14, "Refuse"),
    (15, "ExitState"),
    (16, "Sync"),
    (17, "Synced"),
    (18, "HelloPostCopy"),
    (19, "Running"),
    (20, "Left"),
    (21, "Complete"),
    (22, "Wanted"),
    (23, "Absent"),
    (24, "Lost"),
];

/// What becomes of a message: column, and the fates in it. One byte that is changed is at the beginning of a bundle, the
/// other in its MBMD.
const FATES: [(&str, &[Fate]); 5] = [
    ("lost", &[Fate::Lost]),
    ("late", &[Fate::Late]),
    ("twice", &[Fate::Twice]),
    ("changed", &[Fate::Changed(0), Fate::Changed(20)]),
    ("cut", &[Fate::Cut]),
];

/// The table of the messages of a session, whose kinds `frames` has for each side. `end` makes one of them meet its fate, over
/// a link with this key or without, and says who has the guest.
pub fn document_messages(
    marker: &str,
    frames: &[Vec<u8>; 2],
    end: impl Fn([Option<Plan>; 2], Option<StreamKey>, &str) -> String + Sync,
) {
    let ends = |side: usize, nth: usize, fates: &[Fate], key: Option<StreamKey>| {
        let mut ends = BTreeSet::new();
        for fate in fates {
            let what = format!("{fate:?} frame {nth} of side {side}, key {}", key.is_some());
            let mut plans = [None, None];
            plans[side] = Some(Plan { nth, fate: *fate });
            ends.insert(end(plans, key.clone(), &what));
        }
        Vec::from_iter(ends).join(" or ")
    };
    let sides = frames.iter().enumerate();
    let all = sides.flat_map(|(side, kinds)| (0..kinds.len()).map(move |nth| (side, nth)));
    let cell = |(side, nth), fates| {
        let [open, keyed] = [None, Some(KEY)].map(|key| ends(side, nth, fates, key));
        match open == keyed {
            true => open,
            false => format!("{open}; with a key {keyed}"),
        }
    };
    // Some columns wait for messages that do not come.
    let columns = std::thread::scope(|scope| {
        let threads = FATES.map(|(_, fates)| {
            let (all, cell) = (all.clone(), &cell);
            scope.spawn(move || Vec::from_iter(all.map(|message| cell(message, fates))))
        });
        threads.map(|thread| thread.join().expect("no panic"))
    });
    let heads = FATES.map(|(name, _)| name).join(" | ");
    let mut table = format!("| message | {heads} |\n|---|---|---|---|---|---|\n");
    for (row, (side, nth)) in all.enumerate() {
        let (kinds, kind) = (&frames[side], frames[side][nth]);
        let name = MESSAGES.iter().find(|(number, _)| *number == kind);
        let (_, name) = name.unwrap_or_else(|| panic!("kind {kind}"));
        let which = match kinds[..nth]
            .iter()
            .filter(|before| **before == kind)
            .count()
        {
            0 => String::new(),
            n => format!(" {}", n + 1),
        };
        let cells = columns.each_ref().map(|column| &*column[row]).join(" | ");
        let _ = writeln!(table, "| {}: {name}{which} | {cells} |", SIDES[side]);
    }
    document(marker, &table);
}

/// The owner, and whether that took another link than the first.
pub fn owner_after(owner: &str, links: usize) -> String {
    match links {
        1 => owner.to_owned(),
        _ => format!("{owner}, next link"),
    }
}

/// Compares the table between two markers of the document with this one, or writes it there.
pub fn document(marker: &str, table: &str) {
    // Several tests write to one document.
    static DOCUMENT: Mutex<()> = Mutex::new(());
    let _turn = DOCUMENT.lock().unwrap_or_else(PoisonError::into_inner);
    let (begin, end) = (
        format!("<!-- {marker} -->\n"),
        format!("<!-- /{marker} -->\n"),
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/migration.md");
    let text = std::fs::read_to_string(&path).expect("docs/migration.md");
    let (head, rest) = text.split_once(&begin).expect("a marker");
    let (_, tail) = rest.split_once(&end).expect("a marker");
    let expected = format!("{head}{begin}{table}{end}{tail}");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &expected).expect("docs is writable");
    } else {
        assert!(
            text == expected,
            "docs/migration.md is out of date:\n{table}"
        );
    }
}
