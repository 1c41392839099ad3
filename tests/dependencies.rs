//! `docs/dependencies.md` names every type of a dependency that is in the public API of a crate, and
//! no other. The public API is as `tests/api` has it, which `.ci/outside` holds against the packages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

type Types = BTreeMap<String, BTreeSet<String>>;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The crates of this project and of the standard library.
fn is_foreign(path: &str) -> bool {
    let first = path.split("::").next().unwrap_or(path);
    let own = ["kvm_ops", "soft_amd_sp", "soft_tdx_module"];
    // Associated functions of a primitive type are listed under its name.
    let standard = ["alloc", "core", "crate", "self", "std", "u32", "u64"];
    !own.iter().any(|prefix| first.starts_with(prefix)) && !standard.contains(&first)
}

/// The paths in a line of a listing: `a::b::C`, without what stands around them.
fn paths(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
        .map(|word| word.trim_matches(':'))
        .filter(|word| word.contains("::"))
        .filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
}

fn recorded() -> Types {
    let mut types = Types::new();
    for entry in fs::read_dir(Path::new(ROOT).join("tests/api")).expect("listings") {
        let file = entry.expect("a file").path();
        let listing = fs::read_to_string(&file).expect("text");
        let stem = file.file_stem().and_then(|name| name.to_str());
        let name = stem.expect("the name of a crate").replace('_', "-");
        let foreign = listing.lines().flat_map(paths).filter(|p| is_foreign(p));
        let found: BTreeSet<_> = foreign.map(str::to_owned).collect();
        if !found.is_empty() {
            types.insert(name, found);
        }
    }
    types
}

/// The rows `| crate | types | reason |` of the page's first section.
fn documented(page: &str) -> Types {
    let mut types = Types::new();
    let section = page.split("\n## ").nth(1).expect("a section");
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, listed, reason] = cells[..] else {
            panic!("three cells: {line}");
        };
        assert!(reason.split_whitespace().count() >= 4, "no reason: {line}");
        let names = listed.split('`').filter(|part| part.contains("::"));
        let known = types.entry(name.trim_matches('`').to_owned()).or_default();
        known.extend(names.map(str::to_owned));
    }
    types
}

#[test]
fn the_page_names_every_type_of_a_dependency_and_no_other() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/dependencies.md")).expect("the page");
    assert_eq!(documented(&page), recorded());
}

#[test]
fn types_of_dependencies_are_recognised() {
    let line =
        "pub fn kvm_ops_x::A::f(&self, &[dep::b::C<core::u8>]) -> Result<dep::D, std::io::Error>";
    let found: Vec<_> = paths(line).filter(|path| is_foreign(path)).collect();
    assert_eq!(found, ["dep::b::C", "dep::D"]);
}
