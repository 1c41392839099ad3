//! The cost of the choice of a technology, measured in the compiled code.
//!
//! A small program (bench/probe) is built in release mode with several sets of features, in a
//! separate target directory. The tests read its disassembly and its symbols; valgrind counts the
//! benchmark's designs. If a tool is missing, the test prints that and passes.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod tools;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use tools::{cargo, have, stdout};

fn target_dir() -> PathBuf {
    tools::target_dir("zero_cost")
}

/// Builds the probe with these features and returns its path. The builds share their dependencies,
/// so they run one at a time, and each program is kept under a separate name.
fn probe(features: &str) -> PathBuf {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);

    let target = target_dir();
    let mut build = cargo();
    build.args([
        "build",
        "--release",
        "--quiet",
        "--package",
        "kvm-ops-probe",
    ]);
    build
        .args([
            "--no-default-features",
            "--features",
            features,
            "--target-dir",
        ])
        .arg(&target);
    stdout(build);
    let program = target.join(format!("probe-{}", features.replace(',', "-")));
    // Not copied: a child that another test starts meanwhile would hold the copy open for writing, and the copy could not start then.
    fs::rename(target.join("release/kvm-ops-probe"), &program).expect("the probe was built");
    program
}

/// The functions of a program by demangled name, one instruction per line, without addresses.
fn functions(program: &Path) -> BTreeMap<String, Vec<String>> {
    let mut objdump = Command::new("objdump");
    objdump
        .args(["-d", "-C", "--no-show-raw-insn", "--no-addresses"])
        .arg(program);
    let mut functions = BTreeMap::new();
    let mut current = None;
    for line in stdout(objdump).lines() {
        if let Some(name) = line.strip_prefix('<').and_then(|l| l.strip_suffix(">:")) {
            current = Some(name.to_owned());
            functions.insert(name.to_owned(), Vec::new());
        } else if line.is_empty() {
            current = None;
        } else if let Some(code) = current.as_ref().and_then(|name| functions.get_mut(name)) {
            code.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    functions
}

/// A function's code without its name and without the padding after it.
fn normalised(name: &str, code: &[String]) -> Vec<String> {
    let mut code: Vec<String> = code.iter().map(|l| l.replace(name, "itself")).collect();
    while code
        .last()
        .is_some_and(|l| l.starts_with("nop") || l.starts_with("int3") || l.contains("nopw"))
    {
        code.pop();
    }
    code
}

/// Returns true for an indirect branch: a jump through a jump table, or a call through a pointer. A
/// call through a fixed slot of the global offset table is not counted: position-independent code
/// reaches other libraries that way.
fn is_indirect(instruction: &str) -> bool {
    let branch = ["jmp", "call", "notrack jmp", "notrack call"]
        .iter()
        .any(|b| {
            instruction
                .strip_prefix(b)
                .is_some_and(|rest| rest.trim_start().starts_with('*'))
        });
    branch && !instruction.contains("(%rip)")
}

/// The dispatching functions of a probe: its functions over `AnyVm`, and those of the enums that
/// were not inlined into them.
fn dispatchers(functions: &BTreeMap<String, Vec<String>>) -> BTreeMap<&str, &[String]> {
    functions
        .iter()
        .filter(|(name, _)| {
            let of_enum = ["AnyVm<", "IntelVm<", "AmdVm<"]
                .iter()
                .any(|e| name.contains(e));
            name.starts_with("any_") || (of_enum && name.contains("VmOps"))
        })
        .map(|(name, code)| (name.as_str(), code.as_slice()))
        .collect()
}

fn sizes(program: &Path) -> BTreeMap<String, usize> {
    stdout(Command::new(program))
        .lines()
        .map(|line| {
            let (name, size) = line.split_once(' ').expect("a name and a size");
            (name.to_owned(), size.parse().expect("a size"))
        })
        .collect()
}

#[test]
fn one_back_end_costs_what_a_direct_call_costs() {
    if !have("objdump") {
        return;
    }
    let program = probe("vmx");
    let functions = functions(&program);
    let mut compared = 0;
    for (name, code) in &functions {
        let Some(op) = name.strip_prefix("any_") else {
            continue;
        };
        let direct = format!("direct_{op}");
        // LLVM may have merged the two already: one jumps to the other, or they share a body.
        let merged = code
            .first()
            .is_some_and(|l| *l == format!("jmp <{direct}>"));
        if let Some(other) = functions.get(&direct).filter(|_| !merged) {
            let reversed = other.first().is_some_and(|l| *l == format!("jmp <{name}>"));
            if !reversed {
                assert_eq!(normalised(name, code), normalised(&direct, other), "{op}");
            }
        }
        compared += 1;
    }
    // Functions with equal code may have been merged under one of their names.
    let mut nm = Command::new("nm");
    nm.arg(&program);
    let symbols = stdout(nm);
    assert_eq!(symbols.matches(" any_").count(), 10);
    assert_eq!(symbols.matches(" direct_").count(), 10);
    assert!(compared > 0, "the probe's functions are there");
}

/// The probe's ports are opaque to the compiler, so it contains the complete back ends, and the
/// dispatch leads to real code.
#[test]
fn the_probe_has_the_back_ends_whole() {
    if !have("objdump") {
        return;
    }
    let functions = functions(&probe("vmx,tdx,svm,sev"));
    for (part, least) in [
        ("kvm_ops_tdx::", 40),
        ("kvm_ops_sev::", 40),
        ("kvm_ops_mmu::", 5),
    ] {
        let found = functions.keys().filter(|name| name.contains(part)).count();
        assert!(found >= least, "{part}: {found} functions");
    }
}

#[test]
fn no_build_has_an_indirect_branch_in_its_dispatch() {
    if !have("objdump") {
        return;
    }
    for features in ["vmx,tdx", "svm,sev", "vmx,tdx,svm,sev"] {
        let functions = functions(&probe(features));
        let dispatchers = dispatchers(&functions);
        assert!(
            dispatchers.len() >= 4,
            "{features}: {:?}",
            dispatchers.keys()
        );
        for (name, code) in dispatchers {
            let indirect: Vec<_> = code.iter().filter(|l| is_indirect(l)).collect();
            assert!(indirect.is_empty(), "{features}: {name}: {indirect:?}");
        }
    }
}

#[test]
fn indirect_branches_are_recognised() {
    for line in [
        "jmp *%rax",
        "call *0x18(%rcx)",
        "notrack jmp *%r11",
        "jmp *(%rax,%rcx,8)",
    ] {
        assert!(is_indirect(line), "{line}");
    }
    for line in [
        "jmp <any_id+0x10>",
        "call <f>",
        "call *0x2f52(%rip) # <memcpy>",
        "je <f>",
    ] {
        assert!(!is_indirect(line), "{line}");
    }
}

#[test]
fn an_enum_is_its_largest_back_end_and_at_most_one_tag_for_each_choice() {
    for (features, tags) in [
        ("vmx", 0),
        ("vmx,tdx", 1),
        ("svm,sev", 1),
        ("vmx,tdx,svm,sev", 2),
    ] {
        let mut sizes = sizes(&probe(features));
        let any = sizes.remove("any").expect("the size of AnyVm");
        let largest = *sizes.values().max().expect("a back end");
        assert!(largest <= any, "{features}: {any} is less than {sizes:?}");
        assert!(
            any <= largest + tags * size_of::<usize>(),
            "{features}: {any}, {sizes:?}"
        );
    }
}

/// The crates that a build with this set of features may hold.
fn allowed(features: &str) -> BTreeSet<String> {
    let sets: Vec<_> = features.split(',').chain(["kvm-ops"]).collect();
    let lines = include_str!("outside/crates.txt").lines();
    lines
        .filter_map(|line| line.split_once(':'))
        .filter(|(set, _)| sets.contains(set))
        .flat_map(|(_, crates)| crates.split_whitespace())
        .map(str::to_owned)
        .collect()
}

/// The crates of a set of features, from `cargo tree`.
fn tree(features: &str) -> BTreeSet<String> {
    let mut tree = cargo();
    tree.args(["tree", "--package", "kvm-ops", "--edges", "normal"]);
    tree.args(["--prefix", "none", "--no-default-features"]);
    tree.args(["--features", features, "--format", "{lib}"]);
    let crates = stdout(tree);
    let names = crates.lines().map(|line| line.trim_end_matches(" (*)"));
    names.map(str::to_owned).collect()
}

#[test]
fn a_build_has_the_crates_on_its_list_and_no_other() {
    for features in ["vmx", "svm", "tdx", "sev", "vmx,tdx", "svm,sev"] {
        let allowed = allowed(features);
        let found = tree(features);
        let foreign: Vec<_> = found.difference(&allowed).collect();
        assert!(
            foreign.is_empty(),
            "{features}: {foreign:?} is not on the list"
        );
        let technology = format!("kvm_ops_{}", features.split(',').next().unwrap_or(features));
        assert!(found.contains(&technology), "{features}: {found:?}");
    }
}

#[test]
fn a_build_without_tdx_has_no_symbol_of_it() {
    if !have("nm") {
        return;
    }
    let mut nm = Command::new("nm");
    nm.arg("-C").arg(probe("vmx"));
    let symbols = stdout(nm).to_lowercase();
    assert!(symbols.contains("any_id"));
    for other in ["tdx", "svmvm", "sevvm", "kvm_ops_svm", "kvm_ops_sev"] {
        let found: Vec<_> = symbols
            .lines()
            .filter(|line| line.contains(other))
            .collect();
        assert!(found.is_empty(), "{found:#?}");
    }
}

/// Compares instructions and indirect branches of every design with bench/counts.toml. A single
/// back end and a direct call must be exactly equal.
#[test]
fn counts_are_as_committed() {
    if !have("valgrind") {
        return;
    }
    let mut count = cargo();
    count.args(["run", "--release", "--quiet", "--package", "kvm-ops-bench"]);
    count
        .args(["--no-default-features", "--target-dir"])
        .arg(target_dir());
    count.args(["--", "count", "--check", "bench/counts.toml"]);
    println!("{}", stdout(count));
}
