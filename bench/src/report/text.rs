//! The text of docs/benchmarks.md. Every number in it comes from the figures.

use std::error::Error;
use std::fmt::Write as _;

use super::{BODIES, FORMS};
use crate::count::Counts;
use crate::designs::fleet::Fleet;
use crate::designs::registry::Body;
use crate::figures::Figures;

const FLEETS: [(Fleet, &str); 6] = [
    (Fleet::Same, "all VMX"),
    (Fleet::SameLast, "all SEV"),
    (Fleet::Mix2, "VMX + TDX"),
    (Fleet::Mix2Amd, "SVM + SEV"),
    (Fleet::Mix4, "all four"),
    (Fleet::Mix4Grouped, "all four, grouped"),
];

struct Lookup<'a>(&'a Figures);

impl Lookup<'_> {
    fn ns(&self, form: &str, body: Body, fleet: Fleet) -> Result<f64, Box<dyn Error>> {
        self.0
            .get(form, body, fleet)
            .map(|t| t.ns)
            .ok_or_else(|| format!("no time of {form}, {}, {}", body.name(), fleet.name()).into())
    }

    /// The time relative to `Box<dyn>`, in percent of difference. A `Box<dyn>` call is the same for
    /// every body.
    fn against_dyn(&self, form: &str, body: Body, fleet: Fleet) -> Result<String, Box<dyn Error>> {
        let ratio = self.ns(form, body, fleet)? / self.ns("box_dyn", Body::Inlined, fleet)?;
        Ok(format!("{:+.0} %", (ratio - 1.0) * 100.0))
    }
}

/// The cost of dispatch beyond a direct call: the rows of the plot of proportions.
pub fn shares(figures: &Figures) -> Result<[f64; 5], Box<dyn Error>> {
    let look = Lookup(figures);
    let direct = look.ns("direct", Body::Inlined, Fleet::Same)?;
    let beyond =
        |form, fleet| Ok::<_, Box<dyn Error>>(look.ns(form, Body::Inlined, fleet)? - direct);
    Ok([
        beyond("enum2x2", Fleet::Same)?,
        beyond("box_dyn", Fleet::Same)?,
        beyond("enum2x2", Fleet::Mix2)?,
        beyond("box_dyn", Fleet::Mix2)?,
        beyond("per_vm_table_retpoline", Fleet::Same)?,
    ])
}

/// Writes the whole document.
pub fn document(figures: &Figures, counts: &Counts) -> Result<String, Box<dyn Error>> {
    let mut out = String::new();
    out.push_str(include_str!("intro.md"));
    writeln!(out, "\n## Where the numbers are from\n")?;
    writeln!(
        out,
        "{}, Linux {}, {}. Counts are callgrind's ({} of bench/counts.toml). Times are nanoseconds \
         for one operation with the loop around it (the loop alone: {:.2} ns): the lower quartile of the {} quieter \
         rounds of {} operations, the mean over four placements of the loop, and in brackets the \
         fastest and the slowest placement. {}\n",
        figures.cpu,
        figures.kernel,
        figures.rustc,
        counts.rustc,
        Lookup(figures).ns("empty", Body::Inlined, Fleet::Same)?,
        figures.rounds,
        figures.operations,
        if figures.aligned_branches {
            "Branches were kept off 32-byte boundaries, because this family of processors has the \
             JCC erratum."
        } else {
            "**Branches were not kept off 32-byte boundaries**; on processors with the JCC erratum \
             the ranges are wide."
        }
    )?;
    reading(&mut out, figures)?;
    times(&mut out, figures)?;
    ratios(&mut out, figures)?;
    count_table(&mut out, counts)?;
    proportion(&mut out, figures)?;
    out.push_str(include_str!("outro.md"));
    Ok(out)
}

fn reading(out: &mut String, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let look = Lookup(figures);
    use Body::{Called, Inlined, Outlined};
    use Fleet::{Mix2, Mix2Amd, Mix4, Mix4Grouped, Same, SameLast};
    writeln!(out, "## Reading\n")?;
    writeln!(
        out,
        "- **One back end costs nothing**: {:.2} ns against {:.2} ns for a direct call, the same \
         instructions and the same size, checked by tests/zero_cost.rs.",
        look.ns("enum1", Inlined, Same)?,
        look.ns("direct", Inlined, Same)?
    )?;
    writeln!(
        out,
        "- **Two back ends, bodies that inline**: {:.2} ns ({} against `Box<dyn>`) on a fleet of \
         one technology, {:.2} ns ({}) with VMX and TDX at random. No indirect branch.",
        look.ns("enum2", Inlined, Same)?,
        look.against_dyn("enum2", Inlined, Same)?,
        look.ns("enum2", Inlined, Mix2)?,
        look.against_dyn("enum2", Inlined, Mix2)?
    )?;
    writeln!(
        out,
        "- **Four back ends in one enum are a jump table**, one indirect branch for each operation: \
         {} with VMX and TDX at random, {} with SVM and SEV. So `AnyVm` is not written that way.",
        look.against_dyn("enum4", Inlined, Mix2)?,
        look.against_dyn("enum4", Inlined, Mix2Amd)?
    )?;
    writeln!(
        out,
        "- **Vendor first, then technology (2x2)** is what `AnyVm` is. A host has one vendor's VMs, \
         so the first compare is always predicted and the second is that of two back ends: {} and \
         {} against `Box<dyn>` on the two mixes a real host can hold, {} and {} on fleets of one \
         technology.",
        look.against_dyn("enum2x2", Inlined, Mix2)?,
        look.against_dyn("enum2x2", Inlined, Mix2Amd)?,
        look.against_dyn("enum2x2", Inlined, Same)?,
        look.against_dyn("enum2x2", Inlined, SameLast)?
    )?;
    writeln!(
        out,
        "- **With a retpoline** a pointer costs {:.1} ns on any fleet, the extra callback layer \
         {:.1} ns; the enum stays at {:.2} ns ({:.1} ns mixed), because it has nothing to guard. A \
         jump table would need the guard as well: the compiler then drops jump tables and emits \
         compares, which is what 2x2 has without any option. Stable Rust has no option for retpolines, \
         so there a flat enum's jump table is an unguarded indirect branch.",
        look.ns("per_vm_table_retpoline", Inlined, Same)?,
        look.ns("layer_retpoline", Inlined, Same)?,
        look.ns("enum2x2", Inlined, Same)?,
        look.ns("enum2x2", Inlined, Mix2)?
    )?;
    writeln!(out, "\n### Where an enum loses\n")?;
    writeln!(
        out,
        "- **All four technologies at random**, which only software platforms can hold: 2x2 {} \
         inlined, {} outlined, {} called. Four random targets cost an indirect branch 0.75 \
         mispredictions and two compares 1.0. The chain of compares comes to {} here, but is {} on \
         a fleet of SEV guests, which it asks last; no form is best on every row. What removes \
         the cost altogether is to visit the fleet technology by technology: {:.2} ns instead of \
         {:.2} ns.",
        look.against_dyn("enum2x2", Inlined, Mix4)?,
        look.against_dyn("enum2x2", Outlined, Mix4)?,
        look.against_dyn("enum2x2", Called, Mix4)?,
        look.against_dyn("enum_chain", Inlined, Mix4)?,
        look.against_dyn("enum_chain", Inlined, SameLast)?,
        look.ns("enum2x2", Inlined, Mix4Grouped)?,
        look.ns("enum2x2", Inlined, Mix4)?
    )?;
    writeln!(
        out,
        "- **Bodies that are not inlined, on predicted fleets.** A pointer goes straight to the body; \
         an arm adds a call and a jump. With three instructions that may not be inlined \
         (*called*, the worst case) two back ends are {} on a fleet of one technology and {} mixed, \
         2x2 {} and {}. A large body goes into the function that dispatches, its only caller \
         (*outlined*): there two back ends are {} and {}, 2x2 {} and {}. In time that is at most \
         {:.1} ns an operation on a fleet of one technology.",
        look.against_dyn("enum2", Called, Same)?,
        look.against_dyn("enum2", Called, Mix2)?,
        look.against_dyn("enum2x2", Called, Same)?,
        look.against_dyn("enum2x2", Called, Mix2)?,
        look.against_dyn("enum2", Outlined, Same)?,
        look.against_dyn("enum2", Outlined, Mix2)?,
        look.against_dyn("enum2x2", Outlined, Same)?,
        look.against_dyn("enum2x2", Outlined, Mix2)?,
        look.ns("enum2x2", Called, Same)? - look.ns("box_dyn", Inlined, Same)?
    )?;
    writeln!(
        out,
        "- **An array of enums is as large as its largest back end for each VM**; a `Box<dyn>` is \
         two words. Boxed, 2x2 takes {:.2} ns and {:.2} ns mixed.\n",
        look.ns("enum2x2_boxed", Inlined, Same)?,
        look.ns("enum2x2_boxed", Inlined, Mix2)?
    )?;
    Ok(())
}

fn header(out: &mut String, what: &str) -> Result<(), Box<dyn Error>> {
    write!(out, "| {what} |")?;
    for (_, name) in FLEETS {
        write!(out, " {name} |")?;
    }
    writeln!(out, "\n|---|{}", "---:|".repeat(FLEETS.len()))?;
    Ok(())
}

fn times(out: &mut String, figures: &Figures) -> Result<(), Box<dyn Error>> {
    writeln!(out, "## Times\n")?;
    writeln!(out, "Plot: [every VM of one technology][plots.md].\n")?;
    writeln!(out, "Plot: [mixed fleets][plots.md].\n")?;
    writeln!(out, "Plot: [with retpolines][plots.md].\n")?;
    for body in BODIES {
        header(out, &format!("ns, body {}", body.name()))?;
        for (form, name) in FORMS {
            if figures.get(form, body, Fleet::Same).is_none() {
                continue;
            }
            write!(out, "| {} |", escape(name))?;
            for (fleet, _) in FLEETS {
                match figures.get(form, body, fleet) {
                    Some(t) => write!(out, " {:.2} ({:.2} - {:.2}) |", t.ns, t.low, t.high)?,
                    None => out.push_str(" |"),
                }
            }
            out.push('\n');
        }
        out.push('\n');
    }
    Ok(())
}

fn ratios(out: &mut String, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let look = Lookup(figures);
    writeln!(
        out,
        "### Against `Box<dyn>`\n\nTime as a share of that of `Box<dyn>` on the same fleet; **bold** \
         where the form loses by more than 2 %. The direct call's row says what is left to win.\n"
    )?;
    header(out, "form, body")?;
    for body in BODIES {
        for (form, name) in FORMS {
            if form.contains("retpoline")
                || form == "box_dyn"
                || figures.get(form, body, Fleet::Same).is_none()
                || (body != Body::Inlined && !form.starts_with("enum") && form != "direct")
            {
                continue;
            }
            write!(out, "| {}, {} |", escape(name), body.name())?;
            for (fleet, _) in FLEETS {
                match figures.get(form, body, fleet) {
                    Some(t) => {
                        let ratio = t.ns / look.ns("box_dyn", Body::Inlined, fleet)?;
                        let bold = if ratio > 1.02 { "**" } else { "" };
                        write!(out, " {bold}{ratio:.2}{bold} |")?;
                    }
                    None => out.push_str(" |"),
                }
            }
            out.push('\n');
        }
    }
    out.push('\n');
    Ok(())
}

fn count_table(out: &mut String, counts: &Counts) -> Result<(), Box<dyn Error>> {
    writeln!(
        out,
        "## Counts\n\nFor one operation beyond the loop around it: instructions / indirect branches \
         / mispredictions as callgrind's simple predictor sees them. A direct call's row is the \
         operation itself.\n"
    )?;
    for body in BODIES {
        header(out, &format!("body {}", body.name()))?;
        for (form, name) in FORMS {
            if counts.get(form, body, Fleet::Same).is_none() {
                continue;
            }
            write!(out, "| {} |", escape(name))?;
            for (fleet, _) in FLEETS {
                match counts.get(form, body, fleet) {
                    Some(c) => write!(
                        out,
                        " {:.1} / {:.0} / {:.2} |",
                        c.instructions, c.indirect, c.mispredicted
                    )?,
                    None => out.push_str(" |"),
                }
            }
            out.push('\n');
        }
        out.push('\n');
    }
    Ok(())
}

fn proportion(out: &mut String, figures: &Figures) -> Result<(), Box<dyn Error>> {
    let Some(kvm) = figures.kvm else {
        return Ok(());
    };
    let [enum_same, dyn_same, enum_mixed, dyn_mixed, retpoline] = shares(figures)?;
    let share = |ns: f64, of: f64| format!("{:.2} %", ns / of * 100.0);
    writeln!(
        out,
        "## In proportion\n\nOn the same machine, in the same run: the shortest KVM ioctl \
         (`KVM_CHECK_EXTENSION`) takes {:.0} ns, a VM exit to user space and back {:.1} us, each \
         in the fastest round. (The machine is itself a VM, so exits are dearer than on bare metal.)\n",
        kvm.ioctl,
        kvm.exit / 1000.0
    )?;
    writeln!(
        out,
        "| dispatch, beyond a direct call | ns | of the ioctl | of the exit |"
    )?;
    writeln!(out, "|---|---:|---:|---:|")?;
    for (name, ns) in [
        ("enum 2x2, predicted", enum_same),
        ("`Box<dyn>`, predicted", dyn_same),
        ("enum 2x2, VMX + TDX at random", enum_mixed),
        ("`Box<dyn>`, VMX + TDX at random", dyn_mixed),
        ("table per VM, retpoline", retpoline),
    ] {
        writeln!(
            out,
            "| {name} | {ns:.2} | {} | {} |",
            share(ns, kvm.ioctl),
            share(ns, kvm.exit)
        )?;
    }
    writeln!(out, "\nPlot: [dispatch in proportion][plots.md].\n")?;
    Ok(())
}

fn escape(name: &str) -> String {
    match name.split_once('<') {
        Some(_) => format!("`{name}`"),
        None => name.to_owned(),
    }
}
