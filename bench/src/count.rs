//! Exact counts from callgrind.
//!
//! One run of valgrind covers every design. callgrind collects only inside `counted_loop`, and
//! writes one file at each call of a marker; the files are in the order of the runs.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs, process};

use serde::{Deserialize, Serialize};

use crate::designs::fleet::Fleet;
use crate::designs::form::EMPTY_OP;
use crate::designs::registry::{Body, Entry, FORMS};

/// The number of operations counted for each design.
const OPS: usize = 8192;

/// The cost of one operation, without the loop around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Count {
    /// Instructions.
    pub instructions: f64,
    /// Indirect branches, calls included.
    pub indirect: f64,
    /// Branches, direct and indirect, that callgrind's simple predictor mispredicts.
    pub mispredicted: f64,
}

/// Counts by `form.body.fleet`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// The compiler of the measured code.
    pub rustc: String,
    /// The permitted relative deviation of the instructions under another compiler.
    pub tolerance: f64,
    /// The counts of every design.
    pub count: BTreeMap<String, BTreeMap<Body, BTreeMap<Fleet, Count>>>,
}

impl Counts {
    /// The counts of one design.
    pub fn get(&self, form: &str, body: Body, fleet: Fleet) -> Option<&Count> {
        self.count.get(form)?.get(&body)?.get(&fleet)
    }

    /// Reads a committed file.
    pub fn read(file: &Path) -> Result<Self, Box<dyn Error>> {
        let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        toml::from_str(&text).map_err(|e| format!("{}: {e}", file.display()).into())
    }
}

fn runs() -> impl Iterator<Item = (&'static Entry, Fleet)> {
    FORMS
        .iter()
        .flat_map(|entry| entry.fleets().map(move |fleet| (entry, fleet)))
}

/// Runs every design once, for callgrind to observe.
pub fn loops() {
    for (entry, fleet) in runs() {
        let run = (entry.build)(&fleet.techs());
        let order = fleet.order(0);
        black_box(run(0, &order[..OPS]));
        kvm_ops_bench_mark();
    }
}

/// callgrind writes its totals when this is called. It has a C name because `--dump-before` accepts
/// no pattern.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn kvm_ops_bench_mark() {
    black_box(());
}

fn rustc() -> String {
    env!("KVM_OPS_BENCH_RUSTC").to_owned()
}

fn measure() -> Result<Counts, Box<dyn Error>> {
    let dir = env::temp_dir().join(format!("kvm-ops-bench-{}", process::id()));
    fs::create_dir_all(&dir)?;
    let counts = measure_in(&dir);
    fs::remove_dir_all(&dir)?;
    counts
}

fn measure_in(dir: &Path) -> Result<Counts, Box<dyn Error>> {
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "--branch-sim=yes", "--quiet"])
        .args(["--toggle-collect=*counted_loop*", "--dump-before=kvm_ops_bench_mark"])
        .arg(format!("--callgrind-out-file={}", dir.join("out").display()))
        .arg(env::current_exe()?)
        .arg("loops")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|error| {
            format!("cannot run valgrind: {error} (hint: it is in the package `valgrind` of Debian, Ubuntu and Fedora)")
        })?;
    if !status.success() {
        return Err(format!("valgrind failed: {status}").into());
    }

    let mut raw = Vec::new();
    for (number, (entry, fleet)) in (1..).zip(runs()) {
        raw.push((entry, fleet, totals(&dir.join(format!("out.{number}")))?));
    }
    let empty = raw
        .iter()
        .find(|(entry, ..)| entry.form == "empty")
        .map(|&(.., totals)| totals)
        .ok_or("the empty loop was not counted")?;

    let mut counts = Counts {
        rustc: rustc(),
        tolerance: 0.25,
        ..Counts::default()
    };
    for (entry, fleet, totals) in raw {
        let net = |i: usize| (totals[i] - empty[i]) / OPS as f64;
        let round = |x: f64| (x * 100.0).round() / 100.0 + 0.0;
        let count = Count {
            instructions: round(net(0) + EMPTY_OP),
            indirect: round(net(3)),
            mispredicted: round(net(2) + net(4)),
        };
        let bodies = counts.count.entry(entry.form.to_owned()).or_default();
        bodies.entry(entry.body).or_default().insert(fleet, count);
    }
    Ok(counts)
}

/// Reads Ir, Bc, Bcm, Bi and Bim from a callgrind file.
fn totals(file: &Path) -> Result<[f64; 5], Box<dyn Error>> {
    let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let line = |key: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(key))
            .map(str::trim)
    };
    if line("events:") != Some("Ir Bc Bcm Bi Bim") {
        return Err(format!("unexpected events: {:?}", line("events:")).into());
    }
    let totals = line("summary:").or(line("totals:")).ok_or("no totals")?;
    let mut numbers = [0.0; 5];
    for (number, word) in numbers.iter_mut().zip(totals.split_whitespace()) {
        *number = word.parse()?;
    }
    Ok(numbers)
}

/// Prints the counts.
pub fn print() -> Result<(), Box<dyn Error>> {
    let counts = measure()?;
    println!(
        "{:<24} {:<9} {:<13} {:>6} {:>6} {:>6}",
        "form", "body", "fleet", "Ir", "Bi", "misp"
    );
    for (entry, fleet) in runs() {
        if let Some(count) = counts.get(entry.form, entry.body, fleet) {
            println!(
                "{:<24} {:<9} {:<13} {:>6.2} {:>6.2} {:>6.2}",
                entry.form,
                entry.body.name(),
                fleet.name(),
                count.instructions,
                count.indirect,
                count.mispredicted
            );
        }
    }
    Ok(())
}

/// Writes the counts to a file.
pub fn write(file: &Path) -> Result<(), Box<dyn Error>> {
    let text = format!(
        "# What one operation costs beyond the loop around it, from callgrind.\n\
         # Written by `cargo run --release -p kvm-ops-bench -- count --write bench/counts.toml`.\n\n{}",
        toml::to_string(&measure()?)?
    );
    fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()).into())
}

/// Compares the counts with a file.
///
/// Two checks are exact with any compiler: a single back end costs the same as a direct call, and
/// every design has the recorded number of indirect branches. Instructions are compared within the
/// file's tolerance, because LLVM versions choose different ones; with the same compiler they must
/// be equal too.
pub fn check(file: &Path) -> Result<(), Box<dyn Error>> {
    let want = Counts::read(file)?;
    let have = measure()?;
    let tolerance = if want.rustc == have.rustc {
        0.0
    } else {
        want.tolerance
    };
    let mut wrong = String::new();

    for body in [Body::Inlined, Body::Called, Body::Outlined] {
        let [direct, one] =
            ["direct", "enum1"].map(|form| have.get(form, body, Fleet::Same).copied());
        if direct.is_none() || direct != one {
            writeln!(
                wrong,
                "one back end, {}: {one:?}, a direct call: {direct:?}",
                body.name()
            )?;
        }
    }
    for (entry, fleet) in runs() {
        let name = format!("{} {} {}", entry.form, entry.body.name(), fleet.name());
        let (Some(want), Some(have)) = (
            want.get(entry.form, entry.body, fleet),
            have.get(entry.form, entry.body, fleet),
        ) else {
            writeln!(wrong, "{name}: not in {}", file.display())?;
            continue;
        };
        // Counts are rounded to hundredths.
        if (want.indirect - have.indirect).abs() > 0.011 {
            writeln!(
                wrong,
                "{name}: {} indirect branches, not {}",
                have.indirect, want.indirect
            )?;
        }
        let off = (want.instructions - have.instructions).abs();
        if off > 0.011 + tolerance * want.instructions.max(4.0) {
            writeln!(
                wrong,
                "{name}: {} instructions, not {}",
                have.instructions, want.instructions
            )?;
        }
    }
    if wrong.is_empty() {
        println!("{} counts are as in {}", runs().count(), file.display());
        Ok(())
    } else {
        Err(format!("counts differ from {}\n{wrong}", file.display()).into())
    }
}
