//! Launch digests, compared with other programs.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use super::plot::{self, Bar, Scale, Series};
use crate::measurement::{Contender, Digest, Hashes, Measurement};

/// Writes the document's section, from the runs on one or several machines.
pub fn section(runs: &[Measurement], old: &Hashes) -> Result<String, Box<dyn Error>> {
    let first = runs.first().ok_or("no figures of launch digests")?;
    let mut out = String::new();
    writeln!(
        out,
        "\n# Launch digests compared\n\n\
         What a guest owner computes before a launch, from the same image: {} of {} bytes, {} vCPUs, \
         QEMU's EPYC-v4. Printed by\n\n\
         ```text\n\
         cargo run --release --manifest-path bench/peers/Cargo.toml -- --out bench/figures/MACHINE/measurement.json\n\
         ```\n\n\
         Times are those of the clock, the read of the file included: the lower quartile of the rounds, in \
         each of which every program computed every digest, in random order. *Processors* is the time on \
         all processors together. *Times ours* is the median of the rounds' own ratios, with their \
         quartiles: other programs ran on the machine. **The digests of all programs were equal** in every round, or the command would have \
         failed. *Alone* is the hash of as many bytes in memory, without an image: no program can be \
         faster with that hash.\n",
        first.image, first.bytes, first.vcpus
    )?;
    for run in runs {
        table(&mut out, run)?;
    }
    writeln!(out, "Plot: [launch digests][plots.md].\n\n## Reading\n")?;
    reading(&mut out, runs)?;
    without_sha(&mut out, old)?;
    Ok(out)
}

/// A run in a few words.
fn title(m: &Measurement) -> String {
    let build = if m.openssl {
        "feature `openssl`"
    } else {
        "default features"
    };
    match &m.hidden {
        Some(hidden) => format!("{}, {build}, {hidden}", m.cpu),
        None => format!("{}, {build}", m.cpu),
    }
}

fn table(out: &mut String, m: &Measurement) -> Result<(), Box<dyn Error>> {
    writeln!(
        out,
        "## {}\n\n{} processors, Linux {}, {}, {} rounds.\n",
        title(m),
        m.processors,
        m.kernel,
        m.rustc,
        m.rounds
    )?;
    for skipped in &m.skipped {
        writeln!(out, "**Skipped:** {skipped}\n")?;
    }
    writeln!(
        out,
        "| digest | program | ms | processors, ms | image MB/s | times ours |\n\
         |---|---|---:|---:|---:|---:|"
    )?;
    for digest in &m.digests {
        for (place, time) in digest.times.iter().enumerate() {
            writeln!(
                out,
                "| {} | {} | {:.2} | {:.2} | {:.0} | {} |",
                digest.technology,
                time.name,
                time.ns / 1e6,
                time.processor_ns / 1e6,
                m.bytes as f64 / time.ns * 1e3,
                ratio(time, place),
            )?;
        }
    }
    let hashes: Vec<String> = m
        .hashes
        .iter()
        .map(|hash| format!("{} of {} {:.0}", hash.hash, hash.by, hash.mb_per_second))
        .collect();
    writeln!(
        out,
        "\nThe hashes over the image as one message, MB/s: {}.\n",
        hashes.join(", ")
    )?;
    Ok(())
}

fn ratio(time: &Contender, place: usize) -> String {
    if place == 0 {
        return "1".to_owned();
    }
    format!(
        "{:.2} ({:.2} - {:.2})",
        time.ratio, time.ratio_low, time.ratio_high
    )
}

/// True for another program, which `alone` is not.
fn is_program(time: &Contender) -> bool {
    !time.name.contains("alone")
}

/// The rows in which another program is faster in three of four rounds.
fn behind(m: &Measurement) -> Vec<String> {
    let rows = m.digests.iter().flat_map(|digest| {
        let others = digest.times.iter().skip(1).filter(|time| is_program(time));
        others.map(move |time| (digest, time))
    });
    rows.filter(|(_, time)| time.ratio_high < 1.0)
        .map(|(digest, time)| format!("{} by {} ({:.2})", digest.technology, time.name, time.ratio))
        .collect()
}

fn reading(out: &mut String, runs: &[Measurement]) -> Result<(), Box<dyn Error>> {
    writeln!(
        out,
        "A row is behind if the other program took less time in three rounds of four.\n"
    )?;
    for m in runs {
        let rows = behind(m);
        let rows = match rows.len() {
            0 => "no row is behind another program".to_owned(),
            _ => format!("**behind**: {}", rows.join(", ")),
        };
        let snp = find(m, "SEV-SNP")?;
        let fastest = snp.times.iter().skip(1).map(|time| time.ratio);
        let fastest = fastest.fold(f64::INFINITY, f64::min);
        let mrtd = find(m, "TDX (MRTD)")?;
        let alone = mrtd.times.iter().find(|time| !is_program(time));
        writeln!(
            out,
            "- {}: {rows}. SNP takes {:.2} of the time of the fastest other program. Hashing as many bytes takes \
             {:.2} of the time of MRTD; the rest is the read of the file and the making of the records.",
            title(m),
            1.0 / fastest,
            alone.map_or(f64::NAN, |time| time.ratio)
        )?;
    }
    writeln!(
        out,
        "- **SNP** is pages that are messages of their own. Equal pages are hashed once, several at \
         once in the lanes of vector registers, and on all processors; the others hash page after page. What stays serial is the chain: a record a page.\n\
         - **SEV, SEV-ES and MRTD** are one message each, which can be neither split nor shared out. There \
         the hash decides, and the feature `openssl` of soft-amd-sp and kvm-ops-tdvf takes OpenSSL's, as the \
         crate `sev` and the Python tool do. Without the feature the crate sha2 hashes, which needs no C \
         library. For SHA-256 both use a processor's SHA instructions, which every processor with SEV has."
    )?;
    if let Some(ns) = runs.first().and_then(|m| m.python_process) {
        writeln!(
            out,
            "- The Python tool is timed inside a process that runs already. As a command, start included, \
             it takes {:.0} ms for SNP.",
            ns / 1e6
        )?;
    }
    writeln!(
        out,
        "- For MRTD there was no other program to compare with; the value for Debian's image is held \
         against one computed independently by the tests of kvm-ops-tdvf."
    )?;
    Ok(())
}

/// What the default build loses on a processor without SHA instructions.
fn without_sha(out: &mut String, old: &Hashes) -> Result<(), Box<dyn Error>> {
    let speed = |by: &str| {
        let mut hashes = old.hashes.iter().filter(|hash| hash.hash == "SHA-256");
        let found = hashes.find(|hash| hash.by.contains(by));
        found.map(|hash| hash.mb_per_second).ok_or("no SHA-256")
    };
    let (sha2, openssl) = (speed("sha2")?, speed("OpenSSL")?);
    writeln!(
        out,
        "- **Without SHA instructions the default build is behind** in the rows of SEV and SEV-ES, because \
         the crate sha2 is: on the {} ({}) its SHA-256 does {sha2:.0} MB/s and OpenSSL's {openssl:.0}. The \
         feature `openssl` is the answer there, as the run with hidden instructions shows. The digests of \
         this version were not measured on that processor.\n",
        old.cpu, old.rustc
    )?;
    Ok(())
}

fn find<'a>(m: &'a Measurement, technology: &str) -> Result<&'a Digest, Box<dyn Error>> {
    let found = m.digests.iter().find(|d| d.technology == technology);
    found.ok_or_else(|| format!("no digest of {technology}").into())
}

/// Draws the digests of a run as bars.
pub fn draw(m: &Measurement, plots: &Path) -> Result<(), Box<dyn Error>> {
    let names: Vec<&str> = m.digests.iter().map(|d| d.technology.as_str()).collect();
    let of = |wanted: &str| {
        let bar = |d: &Digest| {
            let time = d.times.iter().find(|t| t.name.contains(wanted))?;
            Some(Bar::exact(time.ns / 1e6))
        };
        m.digests.iter().map(bar).collect::<Vec<_>>()
    };
    let either = |a: Vec<Option<Bar>>, b: Vec<Option<Bar>>| a.into_iter().zip(b);
    let ours = either(of("soft-amd-sp"), of("kvm-ops-tdvf")).map(|(a, b)| a.or(b));
    plot::bars(
        &plots.join("measurement.svg"),
        &format!("Launch digest of one image of firmware, {}", m.cpu),
        "ms",
        Scale::Linear,
        &names,
        &[
            Series {
                name: "this project",
                bars: ours.collect(),
            },
            Series {
                name: "crate sev",
                bars: of("crate sev"),
            },
            Series {
                name: "sev-snp-measure",
                bars: of("sev-snp-measure"),
            },
            Series {
                name: "hash alone",
                bars: of("alone"),
            },
        ],
    )
}
