//! Tables of failures: the ways in which a call fails, what the ends say of it, and the document that has it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use kvm_ops_core::{Error, Field};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::migrate::MigrateError;
use kvm_ops_tdx::status::{Class, operand};

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
