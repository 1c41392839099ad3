//! What the committed transcripts of format 2 cover, beside all that was recorded: the page docs/coverage.md.
//!
//! The committed transcripts replay without a difference (tests/conformance.rs), so an event in them is one that
//! this module answers as the recorded one did. `BLESS=1` writes the page anew.

#![cfg(feature = "conform")]

#[path = "common/unreplayed.rs"]
mod unreplayed;

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// How often each status of a leaf occurs, by category and leaf.
type Counts = BTreeMap<(String, String), BTreeMap<String, u64>>;

/// Archives, and the category that the recordings count them as.
const ARCHIVES: [(&str, &str); 4] = [
    ("metadata", "metadata"),
    ("op-states", "metadata"),
    ("migration", "migration"),
    ("partition", "partition"),
];

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/tdx2")
}

fn is_call(leaf: &str) -> bool {
    ["TDH.", "TDG.", "VMEXIT."]
        .iter()
        .any(|p| leaf.starts_with(p))
}

/// Calls and exits of all recordings.
fn recorded() -> Counts {
    let table = std::fs::read_to_string(vectors().join("coverage.csv")).expect("coverage.csv");
    let mut counts = Counts::new();
    for row in table.lines().skip(1) {
        let columns: Vec<&str> = row.split(',').collect();
        let [category, leaf, status, count] = columns[..] else {
            panic!("four columns: {row}");
        };
        if is_call(leaf) {
            let count: u64 = count.parse().expect("a count");
            *counts
                .entry((category.into(), leaf.into()))
                .or_default()
                .entry(status.into())
                .or_default() += count;
        }
    }
    counts
}

/// Leaf and status of a transcript's line, named as coverage.csv does.
fn event(line: &Value) -> Option<(String, String)> {
    let text = |key: &str| line[key].as_str();
    let leaf = match text("kind")? {
        "vmexit" => format!("VMEXIT.{}", line["reason"]),
        _ => text("name").filter(|name| is_call(name))?.to_owned(),
    };
    let status = match (line["vm"].as_u64(), text("status")) {
        (Some(vm), _) => format!("entered L2 {vm}"),
        (None, Some(status)) => status.to_owned(),
        (None, None) => text("result")?.to_owned(),
    };
    Some((leaf, status))
}

/// Calls and exits of the committed transcripts.
fn replayed() -> Counts {
    let mut counts = Counts::new();
    for (archive, category) in ARCHIVES {
        let path = vectors().join(format!("{archive}.tar.zst"));
        let packed = std::fs::File::open(path).expect("archive");
        let mut text = Vec::new();
        ruzstd::decoding::StreamingDecoder::new(packed)
            .expect("zstd")
            .read_to_end(&mut text)
            .expect("zstd");
        let mut files = tar::Archive::new(&text[..]);
        for file in files.entries().expect("tar") {
            let mut lines = String::new();
            file.expect("tar")
                .read_to_string(&mut lines)
                .expect("UTF-8");
            for line in lines.lines() {
                let line: Value = serde_json::from_str(line).expect("a line of JSON");
                if let Some((leaf, status)) = event(&line) {
                    *counts
                        .entry((category.to_owned(), leaf))
                        .or_default()
                        .entry(status)
                        .or_default() += 1;
                }
            }
        }
    }
    counts
}

fn page(recorded: &Counts, replayed: &Counts) -> String {
    let none = BTreeMap::new();
    let mut out = String::from(
        "# Coverage of the recordings, second part\n\n\
         Calls and VM exits of format 2 (`tests/vectors/tdx2`), leaf by leaf: how many were recorded, and how many of\n\
         them are in the transcripts that the tests replay. The last column names statuses that only the other\n\
         recordings have; no transcript here says whether this module gives them in the right place. Where a test of\n\
         this crate gets the status, its file is named. Those of format 1 are all replayed.\n\
         `BLESS=1 cargo test -p soft-tdx-module --features conform --test coverage` writes this page.\n",
    );
    let mut title = "";
    for ((category, leaf), statuses) in recorded {
        if category != title {
            title = category;
            let _ = write!(
                out,
                "\n## {category}\n\n| leaf | events | replayed | statuses | replayed | not replayed |\n|---|---:|---:|---:|---:|---|\n"
            );
        }
        let here = replayed
            .get(&(category.clone(), leaf.clone()))
            .unwrap_or(&none);
        let missing: Vec<String> = statuses
            .keys()
            .filter(|status| !here.contains_key(*status))
            .map(|status| {
                let name = status.replace('|', " ");
                match unreplayed::reached_by(leaf, status) {
                    Some(test) => format!("`{name}` (tests/{test})"),
                    None => format!("`{name}`"),
                }
            })
            .collect();
        let _ = writeln!(
            out,
            "| {leaf} | {} | {} | {} | {} | {} |",
            statuses.values().sum::<u64>(),
            here.values().sum::<u64>(),
            statuses.len(),
            statuses.len() - missing.len(),
            missing.join(", ")
        );
    }
    out
}

#[test]
fn every_replayed_event_was_counted_and_the_page_says_which_were_not_replayed() {
    let (recorded, replayed) = (recorded(), replayed());
    for (leaf, statuses) in &replayed {
        for (status, count) in statuses {
            let all = recorded.get(leaf).and_then(|s| s.get(status));
            assert!(
                all.is_some_and(|all| all >= count),
                "{leaf:?} {status}: {count} of {all:?}"
            );
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/coverage.md");
    let expected = page(&recorded, &replayed);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &expected).expect("writable");
    }
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(page, expected, "run with BLESS=1");
}
