//! The retry table in docs/tdx.md is the one in the code. `BLESS=1` rewrites it.

use std::fmt::Write as _;
use std::path::Path;

use kvm_ops_tdx::retry::{Action, LONGEST_WAIT, RULES, Verdict};

const BEGIN: &str = "<!-- retry -->\n";
const END: &str = "<!-- /retry -->\n";

fn table() -> String {
    let mut text = String::from(
        "| status | leaf | reaction | after the last try | reason |\n|---|---|---|---|---|\n",
    );
    for rule in RULES {
        let leaves: Vec<&str> = rule.leaves.iter().map(|leaf| leaf.name()).collect();
        let alone = RULES.iter().filter(|r| r.class == rule.class).count() == 1;
        let of = match (leaves.is_empty(), alone) {
            (true, true) => "any".into(),
            (true, false) => "any other".into(),
            (false, _) => leaves.join(", "),
        };
        let done = match rule.action {
            Action::Done => "done".into(),
            Action::Retry(n) => format!("again at once, {n} times"),
            Action::BackOff(n) => format!("back off and again, {n} times"),
            Action::KickAndRetry => "kick, once more".into(),
            Action::Resume(n) => format!("resume, {n} times"),
            Action::Restart(n) => format!("from the start, {n} times"),
            Action::GiveUp => "nothing".into(),
        };
        let verdict = match (rule.action, rule.verdict) {
            (Action::Done, _) => "",
            (_, Verdict::Busy) => "`Busy`",
            (_, Verdict::Again) => "`Again`",
            (_, Verdict::Refused) => "`Firmware(status)`",
            (_, Verdict::Poison) => "`Firmware(status)`, poisoned",
        };
        let name = rule.class.name().unwrap_or("?");
        let _ = writeln!(
            text,
            "| {name} | {of} | {done} | {verdict} | {} |",
            rule.why
        );
    }
    text
}

#[test]
fn the_retry_table_in_the_document_is_the_one_in_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tdx.md");
    let text = std::fs::read_to_string(&path).expect("docs/tdx.md");
    let (head, rest) = text.split_once(BEGIN).expect("a marker");
    let (_, tail) = rest.split_once(END).expect("a marker");
    let expected = format!("{head}{BEGIN}{}{END}{tail}", table());
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &expected).expect("docs is writable");
    } else {
        assert!(text == expected, "docs/tdx.md is out of date");
    }
    assert!(text.contains(&LONGEST_WAIT.to_string()));
}
