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

/// The figures of all processors. A number in the text is one for each, in their order.
struct Lookup<'a>(&'a [Figures]);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn time(figures: &Figures, form: &str, body: Body, fleet: Fleet) -> Result<f64> {
    let time = figures.get(form, body, fleet).map(|t| t.ns);
    time.ok_or_else(|| format!("no time of {form}, {}, {}", body.name(), fleet.name()).into())
}

/// The time as a share of that of `Box<dyn>` on the same fleet. A `Box<dyn>` call is the same for
/// every body.
fn share(figures: &Figures, form: &str, body: Body, fleet: Fleet) -> Result<f64> {
    Ok(time(figures, form, body, fleet)? / time(figures, "box_dyn", Body::Inlined, fleet)?)
}

impl Lookup<'_> {
    fn each(&self, number: impl Fn(&Figures) -> Result<String>) -> Result<String> {
        let numbers: Result<Vec<_>> = self.0.iter().map(number).collect();
        Ok(numbers?.join(" / "))
    }

    fn ns(&self, form: &str, body: Body, fleet: Fleet) -> Result<String> {
        self.each(|figures| Ok(format!("{:.2}", time(figures, form, body, fleet)?)))
    }

    fn share(&self, form: &str, body: Body, fleet: Fleet) -> Result<String> {
        self.each(|figures| Ok(format!("{:.2}", share(figures, form, body, fleet)?)))
    }

    /// The least and the greatest share of a form over these fleets and bodies.
    fn range(&self, form: &str, bodies: &[Body], fleets: &[Fleet]) -> Result<String> {
        self.each(|figures| {
            let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
            for (body, fleet) in bodies
                .iter()
                .flat_map(|b| fleets.iter().map(move |f| (b, f)))
            {
                let share = share(figures, form, *body, *fleet)?;
                (low, high) = (low.min(share), high.max(share));
            }
            Ok(format!("{low:.2} to {high:.2}"))
        })
    }

    /// The cells of a form's rows in which it loses, for each processor.
    fn losses(&self, form: &str) -> Result<String> {
        let mut out = Vec::new();
        for figures in self.0 {
            let mut cells = Vec::new();
            for (body, (fleet, name)) in BODIES.iter().flat_map(|b| FLEETS.map(|f| (*b, f))) {
                let share = share(figures, form, body, fleet)?;
                if share > LOSES {
                    cells.push(format!("{name}, {}, {share:.2}", body.name()));
                }
            }
            let cells = match cells.len() {
                0 => "in no cell".to_owned(),
                n => format!(
                    "in {n} of {}: {}",
                    BODIES.len() * FLEETS.len(),
                    cells.join("; ")
                ),
            };
            out.push(format!("on the {} {cells}", name(figures)));
        }
        Ok(out.join("; "))
    }
}

/// A form loses where it takes more than this share of the time of `Box<dyn>`.
const LOSES: f64 = 1.02;

/// A processor's name, without marks and clock rates.
pub fn name(figures: &Figures) -> String {
    let name = figures.cpu.replace("(R)", "").replace("(TM)", "");
    let name = name.split('@').next().unwrap_or_default();
    name.replace(" Processor", "").trim().to_owned()
}

/// The cost of dispatch beyond a direct call: the rows of the plot of proportions.
pub fn shares(figures: &Figures) -> Result<[f64; 5]> {
    let ns = |form, fleet| time(figures, form, Body::Inlined, fleet);
    let direct = ns("direct", Fleet::Same)?;
    Ok([
        ns("enum2x2", Fleet::Same)? - direct,
        ns("box_dyn", Fleet::Same)? - direct,
        ns("enum2x2", Fleet::Mix2)? - direct,
        ns("box_dyn", Fleet::Mix2)? - direct,
        ns("per_vm_table_retpoline", Fleet::Same)? - direct,
    ])
}

/// Writes the whole document.
pub fn document(figures: &[Figures], counts: &Counts) -> Result<String> {
    let mut out = String::new();
    out.push_str(include_str!("intro.md"));
    sources(&mut out, figures, counts)?;
    reading(&mut out, figures)?;
    ratios(&mut out, figures)?;
    writeln!(
        out,
        "## Times\n\nPlots of each processor: [every VM of one technology][plots.md], [mixed \
         fleets][plots.md], [with retpolines][plots.md].\n"
    )?;
    for figures in figures {
        times(&mut out, figures)?;
    }
    count_table(&mut out, counts)?;
    proportion(&mut out, figures)?;
    out.push_str(include_str!("outro.md"));
    Ok(out)
}

fn sources(out: &mut String, figures: &[Figures], counts: &Counts) -> Result<()> {
    writeln!(
        out,
        "\n## Where the numbers are from\n\n\
         | | processor | Linux | compiler | quieter rounds | loop alone, ns | branches |\n\
         |---|---|---|---|---:|---:|---|"
    )?;
    for figures in figures {
        writeln!(
            out,
            "| {} | {} | {} | {} | {} | {:.2} | {} |",
            name(figures),
            figures.cpu,
            figures.kernel,
            figures.rustc,
            figures.rounds,
            time(figures, "empty", Body::Inlined, Fleet::Same)?,
            if figures.aligned_branches {
                "kept off 32-byte boundaries"
            } else {
                "as they come"
            }
        )?;
    }
    let names: Vec<String> = figures.iter().map(name).collect();
    writeln!(
        out,
        "\n**Numbers with a slash are those of both processors: {}.** Times are nanoseconds for one \
         operation with the loop around it: the lower quartile of the quieter rounds of {} operations, the \
         mean over four placements of the loop, and in brackets the fastest and the slowest placement. \
         Branches are kept off 32-byte boundaries because Intel processors of that family have the JCC \
         erratum. Counts are callgrind's ({} of bench/counts.toml).\n",
        names.join(" / "),
        figures.first().map_or(0, |f| f.operations),
        counts.rustc,
    )?;
    Ok(())
}

fn reading(out: &mut String, figures: &[Figures]) -> Result<()> {
    let look = Lookup(figures);
    use Body::{Called, Inlined, Outlined};
    use Fleet::{Mix2, Mix2Amd, Mix4, Mix4Grouped, Same, SameLast};
    let real = [Same, SameLast, Mix2, Mix2Amd];
    writeln!(
        out,
        "## Reading\n\nShares are of the time of `Box<dyn>` on the same fleet and processor: below 1 \
         is faster.\n"
    )?;
    writeln!(
        out,
        "- **One back end costs nothing**: {} ns against {} ns for a direct call, the same \
         instructions and the same size, checked by tests/zero_cost.rs.",
        look.ns("enum1", Inlined, Same)?,
        look.ns("direct", Inlined, Same)?
    )?;
    writeln!(
        out,
        "- **Two back ends, bodies that inline**: {} of `Box<dyn>` on a fleet of one technology, {} \
         with VMX and TDX at random. No indirect branch.",
        look.share("enum2", Inlined, Same)?,
        look.share("enum2", Inlined, Mix2)?
    )?;
    writeln!(
        out,
        "- **Four back ends in one enum are a jump table**, one indirect branch for each operation: \
         {} with VMX and TDX at random, {} with SVM and SEV, where 2x2 takes {} and {}. So \
         `AnyVm` is not written that way.",
        look.share("enum4", Inlined, Mix2)?,
        look.share("enum4", Inlined, Mix2Amd)?,
        look.share("enum2x2", Inlined, Mix2)?,
        look.share("enum2x2", Inlined, Mix2Amd)?
    )?;
    writeln!(
        out,
        "- **Vendor first, then technology (2x2)** is what `AnyVm` is. A host has one vendor's VMs, \
         so the first compare is always predicted and the second is that of two back ends. On the fleets \
         that one host can hold it takes {} inlined, {} outlined, {} called. The two processors disagree: \
         what one shows is no rule for the other.",
        look.range("enum2x2", &[Inlined], &real)?,
        look.range("enum2x2", &[Outlined], &real)?,
        look.range("enum2x2", &[Called], &real)?
    )?;
    writeln!(
        out,
        "- **With a retpoline** a pointer costs {} ns on any fleet, the extra callback layer \
         {} ns; the enum stays at {} ns ({} ns mixed), because it has nothing to guard. A \
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
        "- **2x2 loses** (more than {LOSES} of `Box<dyn>`) {}.",
        look.losses("enum2x2")?
    )?;
    writeln!(
        out,
        "- **All four technologies at random**, which only software platforms can hold: 2x2 {} \
         inlined, {} outlined, {} called. No other order of compares repairs these cells without a \
         price. Four targets can be told apart by compares in two shapes only: halves, which miss 1/2 + 1/2 \
         = 1.0 times an operation, or one after another, which misses 1/4 + 1/4 + 1/4 = 0.75 times, as often \
         as an indirect branch does and the least that is possible. That chain comes to {} inlined, {} \
         outlined, {} called. Its price is up to three compares for the technology that it asks last: a \
         fleet of SEV guests takes {} inlined and {} called, where 2x2 takes {} and {}. It loses {}. A target \
         picked by a conditional move is an indirect branch again. What removes the misses altogether is to \
         visit the fleet technology by technology: {} ns instead of {} ns.",
        look.share("enum2x2", Inlined, Mix4)?,
        look.share("enum2x2", Outlined, Mix4)?,
        look.share("enum2x2", Called, Mix4)?,
        look.share("enum_chain", Inlined, Mix4)?,
        look.share("enum_chain", Outlined, Mix4)?,
        look.share("enum_chain", Called, Mix4)?,
        look.share("enum_chain", Inlined, SameLast)?,
        look.share("enum_chain", Called, SameLast)?,
        look.share("enum2x2", Inlined, SameLast)?,
        look.share("enum2x2", Called, SameLast)?,
        look.losses("enum_chain")?,
        look.ns("enum2x2", Inlined, Mix4Grouped)?,
        look.ns("enum2x2", Inlined, Mix4)?
    )?;
    writeln!(
        out,
        "- **Bodies that are not inlined.** A pointer goes straight to the body; an arm adds a call and \
         a jump. With three instructions that may not be inlined (*called*, the worst case) two back ends \
         are {} on a fleet of one technology and {} mixed, 2x2 {} and {}. A large body goes into the \
         function that dispatches, its only caller (*outlined*): there two back ends are {} and {}, 2x2 {} \
         and {}.",
        look.share("enum2", Called, Same)?,
        look.share("enum2", Called, Mix2)?,
        look.share("enum2x2", Called, Same)?,
        look.share("enum2x2", Called, Mix2)?,
        look.share("enum2", Outlined, Same)?,
        look.share("enum2", Outlined, Mix2)?,
        look.share("enum2x2", Outlined, Same)?,
        look.share("enum2x2", Outlined, Mix2)?,
    )?;
    writeln!(
        out,
        "- **An array of enums is as large as its largest back end for each VM**; a `Box<dyn>` is \
         two words. Boxed, 2x2 takes {} ns and {} ns mixed.\n",
        look.ns("enum2x2_boxed", Inlined, Same)?,
        look.ns("enum2x2_boxed", Inlined, Mix2)?
    )?;
    Ok(())
}

fn header(out: &mut String, what: &str) -> Result<()> {
    write!(out, "| {what} |")?;
    for (_, name) in FLEETS {
        write!(out, " {name} |")?;
    }
    writeln!(out, "\n|---|{}", "---:|".repeat(FLEETS.len()))?;
    Ok(())
}

fn times(out: &mut String, figures: &Figures) -> Result<()> {
    writeln!(out, "### {}\n", name(figures))?;
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

fn ratios(out: &mut String, figures: &[Figures]) -> Result<()> {
    let names: Vec<String> = figures.iter().map(name).collect();
    writeln!(
        out,
        "## Against `Box<dyn>`, side by side\n\nTime as a share of that of `Box<dyn>` on the same fleet: \
         {}; **bold** where the form loses by more than 2 %. The direct call's row says what is left to \
         win.\n",
        names.join(" / ")
    )?;
    header(out, "form, body")?;
    for (body, (form, name)) in BODIES.iter().flat_map(|b| FORMS.map(|f| (*b, f))) {
        let called = body != Body::Inlined && !form.starts_with("enum") && form != "direct";
        let absent = figures
            .iter()
            .any(|f| f.get(form, body, Fleet::Same).is_none());
        if form.contains("retpoline") || form == "box_dyn" || called || absent {
            continue;
        }
        write!(out, "| {}, {} |", escape(name), body.name())?;
        for (fleet, _) in FLEETS {
            let cell = |figures| {
                let ratio = share(figures, form, body, fleet).ok()?;
                let bold = if ratio > LOSES { "**" } else { "" };
                Some(format!("{bold}{ratio:.2}{bold}"))
            };
            let cells: Option<Vec<String>> = figures.iter().map(cell).collect();
            write!(out, " {} |", cells.unwrap_or_default().join(" / "))?;
        }
        out.push('\n');
    }
    out.push('\n');
    Ok(())
}

fn count_table(out: &mut String, counts: &Counts) -> Result<()> {
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

fn proportion(out: &mut String, figures: &[Figures]) -> Result<()> {
    writeln!(
        out,
        "## In proportion\n\nOn the same machine, in the same run: the shortest KVM ioctl \
         (`KVM_CHECK_EXTENSION`) and a VM exit to user space and back, each in the fastest round. (The \
         machines are VMs themselves, so exits are dearer than on bare metal.)\n"
    )?;
    for figures in figures {
        let Some(kvm) = figures.kvm else {
            continue;
        };
        writeln!(
            out,
            "| {}: dispatch, beyond a direct call | ns | of an ioctl of {:.0} ns | of an exit of {:.1} us |\n\
             |---|---:|---:|---:|",
            name(figures),
            kvm.ioctl,
            kvm.exit / 1000.0
        )?;
        let names = [
            "enum 2x2, predicted",
            "`Box<dyn>`, predicted",
            "enum 2x2, VMX + TDX at random",
            "`Box<dyn>`, VMX + TDX at random",
            "table per VM, retpoline",
        ];
        for (name, ns) in names.into_iter().zip(shares(figures)?) {
            let of = |whole: f64| format!("{:.2} %", ns / whole * 100.0);
            writeln!(
                out,
                "| {name} | {ns:.2} | {} | {} |",
                of(kvm.ioctl),
                of(kvm.exit)
            )?;
        }
        out.push('\n');
    }
    writeln!(out, "Plot: [dispatch in proportion][plots.md].\n")?;
    Ok(())
}

fn escape(name: &str) -> String {
    match name.split_once('<') {
        Some(_) => format!("`{name}`"),
        None => name.to_owned(),
    }
}
