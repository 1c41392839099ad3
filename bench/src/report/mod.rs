//! Writes docs/benchmarks.md and its plots from the committed figures.

mod digests;
mod fleet;
mod journeys;
mod lives;
mod plot;
mod text;

use std::error::Error;
use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;

use self::plot::{Bar, Scale, Series};
use crate::count::Counts;
use crate::designs::fleet::Fleet;
use crate::designs::registry::Body;
use crate::figures::Figures;
use crate::fleet::Fleets;
use crate::journeys::Journeys;
use crate::lives::figures::Lives;
use crate::measurement::{Hashes, Measurement};

/// The forms in the order of the tables, with their names for readers.
const FORMS: [(&str, &str); 18] = [
    ("direct", "direct call"),
    ("enum1", "enum, 1 back end"),
    ("enum2", "enum, 2 back ends"),
    ("enum2x2", "enum 2x2 (AnyVm)"),
    ("enum2x2_boxed", "enum 2x2, boxed"),
    ("enum4", "enum, 4 back ends"),
    ("enum4_sparse", "enum 4, sparse tags"),
    ("enum_chain", "enum chain"),
    ("tag_table", "tag-indexed table"),
    ("box_dyn", "Box<dyn VmOps>"),
    ("per_vm_table", "table per VM"),
    ("main_c_static_call", "wrappers, static call"),
    ("main_c", "wrappers, global table"),
    ("layer", "extra callback layer"),
    ("per_vm_table_retpoline", "table per VM, retpoline"),
    ("tag_table_retpoline", "tag-indexed table, retpoline"),
    ("main_c_retpoline", "wrappers, retpoline"),
    ("layer_retpoline", "extra layer, retpoline"),
];

const BODIES: [Body; 3] = [Body::Inlined, Body::Outlined, Body::Called];

/// The machines with figures of the dispatch, in the order of the tables: folders of bench/figures.
const MACHINES: [&str; 2] = ["intel-xeon", "amd-epyc"];

/// The runs of launch digests.
const DIGESTS: [&str; 3] = [
    "amd-epyc/measurement.json",
    "amd-epyc/measurement-default.json",
    "amd-epyc/measurement-no-sha.json",
];

/// The hashes on a processor without SHA instructions.
const OLD_HASHES: &str = "intel-xeon/hashes.json";

/// The lives of VMs, a fleet that grows, and TDs that migrate.
const LIVES: &str = "intel-xeon/lives.json";
const FLEET: &str = "amd-epyc/fleet.json";
const JOURNEYS: &str = "amd-epyc/journeys.json";

/// Writes the document and its plots.
pub fn write(root: &Path) -> Result<(), Box<dyn Error>> {
    let from = root.join("bench/figures");
    let machines = MACHINES.map(|machine| Figures::read(&from.join(machine).join("dispatch.json")));
    let machines: Vec<Figures> = machines.into_iter().collect::<Result<_, _>>()?;
    let counts = Counts::read(&root.join("bench/counts.toml"))?;
    let digests = DIGESTS.map(|file| read(&from.join(file)));
    let digests: Vec<Measurement> = digests.into_iter().collect::<Result<_, _>>()?;
    let old_hashes: Hashes = read(&from.join(OLD_HASHES))?;
    let of_lives: Lives = read(&from.join(LIVES))?;
    let of_fleet: Fleets = read(&from.join(FLEET))?;
    let of_journeys: Journeys = read(&from.join(JOURNEYS))?;
    let plots = root.join("docs/plots");
    fs::create_dir_all(&plots)?;
    let document = [
        include_str!("contents.md").to_owned(),
        text::document(&machines, &counts)?,
        digests::section(&digests, &old_hashes)?,
        lives::section(&of_lives)?,
        fleet::section(&of_fleet)?,
        journeys::section(&of_journeys)?,
    ];
    let page = format!(
        "{}\n[migration.md]: migration.md\n[plots.md]: plots.md\n",
        document.concat()
    );
    fs::write(root.join("docs/benchmarks.md"), page)?;
    if let Some(run) = digests.first() {
        digests::draw(run, &plots)?;
    }
    lives::draw(&of_lives, &plots)?;
    journeys::draw(&of_journeys, &plots)?;
    for (machine, figures) in MACHINES.iter().zip(&machines) {
        draw(machine, figures, &plots)?;
    }
    Ok(())
}

fn read<T: DeserializeOwned>(file: &Path) -> Result<T, Box<dyn Error>> {
    let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", file.display()).into())
}

fn bar(figures: &Figures, form: &str, body: Body, fleet: Fleet) -> Option<Bar> {
    figures.get(form, body, fleet).map(|t| Bar {
        ns: t.ns,
        low: t.low,
        high: t.high,
    })
}

fn draw(machine: &str, figures: &Figures, plots: &Path) -> Result<(), Box<dyn Error>> {
    let label = "ns for one operation, loop included (line: range over placements of the loop)";
    let titled = |title: &str| format!("{title}, {}", text::name(figures));
    let plain: Vec<_> = FORMS
        .iter()
        .filter(|(form, _)| !form.contains("retpoline"))
        .collect();
    let names: Vec<&str> = plain.iter().map(|(_, name)| *name).collect();

    let series = |name, body, fleet| Series {
        name,
        bars: plain
            .iter()
            .map(|(form, _)| bar(figures, form, body, fleet))
            .collect(),
    };
    plot::bars(
        &plots.join(format!("one-technology-{machine}.svg")),
        &titled("Every VM of one technology: all branches predicted"),
        label,
        Scale::Linear,
        &names,
        &[
            series("body inlined", Body::Inlined, Fleet::Same),
            series("body outlined", Body::Outlined, Fleet::Same),
            series("body called", Body::Called, Fleet::Same),
        ],
    )?;

    let mixed: Vec<_> = plain
        .iter()
        .filter(|(form, _)| !matches!(*form, "direct" | "enum1"))
        .collect();
    let names: Vec<&str> = mixed.iter().map(|(_, name)| *name).collect();
    let series = |name, fleet| Series {
        name,
        bars: mixed
            .iter()
            .map(|(form, _)| bar(figures, form, Body::Inlined, fleet))
            .collect(),
    };
    plot::bars(
        &plots.join(format!("mixed-{machine}.svg")),
        &titled("Mixed fleets, VMs visited at random: mispredictions decide (bodies inlined)"),
        label,
        Scale::Linear,
        &names,
        &[
            series("VMX + TDX", Fleet::Mix2),
            series("SVM + SEV", Fleet::Mix2Amd),
            series("all four", Fleet::Mix4),
            series("all four, grouped", Fleet::Mix4Grouped),
        ],
    )?;

    let guarded: Vec<_> = FORMS
        .iter()
        .filter(|(form, _)| matches!(*form, "enum2" | "enum2x2") || form.contains("retpoline"))
        .collect();
    let names: Vec<&str> = guarded.iter().map(|(_, name)| *name).collect();
    let series = |name, fleet| Series {
        name,
        bars: guarded
            .iter()
            .map(|(form, _)| bar(figures, form, Body::Inlined, fleet))
            .collect(),
    };
    plot::bars(
        &plots.join(format!("retpoline-{machine}.svg")),
        &titled("With retpolines: an enum has no indirect branch to guard"),
        label,
        Scale::Linear,
        &names,
        &[
            series("one technology", Fleet::Same),
            series("VMX + TDX", Fleet::Mix2),
            series("all four", Fleet::Mix4),
        ],
    )?;

    let Some(kvm) = figures.kvm else {
        return Ok(());
    };
    let exact = |ns| Some(Bar::exact(ns));
    let rows = text::shares(figures)?;
    let names = [
        "enum 2x2, predicted",
        "Box<dyn>, predicted",
        "enum 2x2, VMX + TDX",
        "Box<dyn>, VMX + TDX",
        "table per VM, retpoline",
        "shortest KVM ioctl",
        "VM exit to user space",
    ];
    let bars = rows
        .into_iter()
        .chain([kvm.ioctl, kvm.exit])
        .map(exact)
        .collect();
    plot::bars(
        &plots.join(format!("proportion-{machine}.svg")),
        &titled("Dispatch beside what it leads to (logarithmic)"),
        "ns beyond a direct call; ioctl and exit: whole",
        Scale::Log,
        &names,
        &[Series { name: "", bars }],
    )
}
