//! Checks the manual: every page of docs/ is a module of the documentation, and every link of a
//! page works in the repository and in the documentation.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn read(path: impl AsRef<Path>) -> String {
    let path = Path::new(ROOT).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages, with paths from the root.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(Path::new(ROOT).join("docs")).expect("docs");
    let mut pages: Vec<PathBuf> = docs
        .map(|entry| entry.expect("an entry").file_name())
        .filter(|name| name.to_string_lossy().ends_with(".md"))
        .map(|name| Path::new("docs").join(name))
        .collect();
    pages.extend(["README.md", "DESIGN.md"].map(PathBuf::from));
    pages.sort();
    pages
}

/// The text without code blocks.
fn prose(text: &str) -> String {
    let mut code = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The link definitions at the end of a page: label and target.
fn definitions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter_map(|line| {
        let (label, target) = line.strip_prefix('[')?.split_once("]: ")?;
        Some((label.to_owned(), target.to_owned()))
    });
    lines.collect()
}

#[test]
fn every_page_is_in_the_manual() {
    let manual = read("dispatch/src/manual.rs");
    for page in pages() {
        let name = page.to_str().expect("UTF-8");
        // README.md is the front page, and the text of plots.md replaces its plots there.
        if name != "README.md" && name != "docs/plots.md" {
            assert!(manual.contains(&format!("\"{name}\"")), "{name}");
        }
        if name != "README.md" {
            let file = page.file_name().unwrap().to_str().unwrap();
            assert!(manual.contains(&format!("[{file}]: ")), "no link to {file}");
        }
    }
}

#[test]
fn pages_link_by_reference_and_every_target_exists() {
    for page in pages() {
        let text = prose(&read(&page));
        let name = page.display();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            let here = target.starts_with('#') || target.contains("://");
            let plot = page == Path::new("docs/plots.md") && target.starts_with("plots/");
            assert!(
                here || plot,
                "{name}: {target} is dead in the documentation"
            );
        }
        let folder = Path::new(ROOT).join(page.parent().unwrap());
        let defined = definitions(&text);
        for (label, target) in &defined {
            assert!(folder.join(target).is_file(), "{name}: [{label}]: {target}");
        }
        let labels: BTreeSet<_> = defined.into_iter().map(|(label, _)| label).collect();
        for (at, found) in text.match_indices(".md]") {
            // A link text that is followed by its label.
            if text[at + found.len()..].starts_with('[') {
                continue;
            }
            let label = text[..at + 3].rsplit('[').next().unwrap();
            assert!(
                labels.contains(label),
                "{name}: [{label}] has no definition"
            );
        }
    }
}
