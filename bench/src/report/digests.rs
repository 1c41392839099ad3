//! Launch digests, compared with other programs.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use super::plot::{self, Bar, Scale, Series};
use crate::measurement::{Contender, Digest, Hash, Measurement};

/// The speed of a program's hash: the crate sha2 for ours, OpenSSL for the others.
fn hash_of<'a>(m: &'a Measurement, digest: &Digest, ours: bool) -> Option<&'a Hash> {
    let mut of_kind = m.hashes.iter().filter(|h| h.hash == digest.hash);
    if ours { of_kind.next() } else { of_kind.nth(1) }
}

/// The time of the hash alone for a digest's bytes, in milliseconds.
fn alone(digest: &Digest, hash: &Hash) -> f64 {
    digest.hashed as f64 / hash.mb_per_second / 1e3
}

/// Writes the document's section.
pub fn section(m: &Measurement) -> Result<String, Box<dyn Error>> {
    let mut out = String::new();
    writeln!(
        out,
        "\n# Launch digests compared\n\n\
         What a guest owner computes before a launch, from the same image: {} of {} bytes, {} vCPUs, \
         QEMU's EPYC-v4. Printed by\n\n\
         ```text\n\
         cargo run --release --manifest-path bench/peers/Cargo.toml -- --out bench/figures/measurement.json\n\
         ```\n\n\
         {}, Linux {}, {}. Processor time of the computing thread, the read of the file included: the \
         lower quartile of {} rounds, in each of which every program computed every digest. *Times \
         ours* is the median of the rounds' own ratios, with their quartiles. **The digests of all \
         programs were equal** in every round, or the command would have failed.\n",
        m.image, m.bytes, m.vcpus, m.cpu, m.kernel, m.rustc, m.rounds
    )?;
    for skipped in &m.skipped {
        writeln!(out, "**Skipped:** {skipped}\n")?;
    }
    writeln!(
        out,
        "| digest | program | ms | image MB/s | times ours | its hash alone, ms | share of that |\n\
         |---|---|---:|---:|---:|---:|---:|"
    )?;
    for digest in &m.digests {
        for (place, time) in digest.times.iter().enumerate() {
            let ms = time.ns / 1e6;
            let hash = hash_of(m, digest, place == 0).ok_or("no speed of a hash")?;
            let limit = alone(digest, hash);
            writeln!(
                out,
                "| {} | {} | {ms:.2} | {:.0} | {} | {limit:.2} | {:.0} % |",
                digest.technology,
                time.name,
                m.bytes as f64 / ms / 1e3,
                ratio(time, place),
                limit / ms * 100.0
            )?;
        }
    }
    writeln!(out, "\nPlot: [launch digests][plots.md].\n")?;
    writeln!(
        out,
        "| hash alone, over the image as one message | MB/s |\n|---|---:|"
    )?;
    for hash in &m.hashes {
        writeln!(
            out,
            "| {} of {} | {:.0} |",
            hash.hash, hash.by, hash.mb_per_second
        )?;
    }
    writeln!(out, "\n## Reading\n")?;
    reading(&mut out, m)?;
    Ok(out)
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

fn reading(out: &mut String, m: &Measurement) -> Result<(), Box<dyn Error>> {
    let find = |technology| m.digests.iter().find(|d| d.technology == technology);
    let (Some(sev), Some(snp)) = (find("SEV"), find("SEV-SNP")) else {
        return Err("no digests of SEV and SEV-SNP".into());
    };
    let rate = |digest, ours| {
        hash_of(m, digest, ours)
            .map(|h| h.mb_per_second)
            .ok_or("no speed of a hash")
    };
    let more = |digest: &Digest| (digest.hashed as f64 / m.bytes as f64 - 1.0) * 100.0;
    writeln!(
        out,
        "- **The hash decides.** Most of the time is hashing, and no program can be faster than its \
         hash: *share of that* is what is left to win without another one. There is more to hash \
         than the image: {:.0} % more for SNP (a record a page, and each page padded as a message of its \
         own), {:.0} % for MRTD (384 bytes for each 256).",
        more(snp),
        find("TDX (MRTD)").map_or(0.0, more)
    )?;
    let slower = rate(sev, false)? / rate(sev, true)?;
    let verdict = if slower > 1.05 {
        "slower"
    } else {
        "not slower"
    };
    writeln!(
        out,
        "- **This project's digests are {verdict} than those of programs that hash with OpenSSL** on this \
         processor: OpenSSL's SHA-256 is {slower:.1} times as fast as the crate sha2's, its SHA-384 {:.1} \
         times. The processor has no instructions for SHA-256, which every processor with SEV has and \
         both libraries use. **That was not measured.**",
        rate(snp, false)? / rate(snp, true)?
    )?;
    if let Some(ns) = m.python_process {
        writeln!(
            out,
            "- The Python tool hashes with OpenSSL too, and is timed inside a process that runs \
             already. As a command, start included, it takes {:.0} ms for SNP.",
            ns / 1e6
        )?;
    }
    writeln!(
        out,
        "- For MRTD there was no other program to compare with; the value for Debian's image is held \
         against one computed independently by the tests of kvm-ops-tdvf.\n"
    )?;
    Ok(())
}

/// Draws the digests as bars.
pub fn draw(m: &Measurement, plots: &Path) -> Result<(), Box<dyn Error>> {
    let names: Vec<&str> = m.digests.iter().map(|d| d.technology.as_str()).collect();
    let exact = |ms| Bar {
        ns: ms,
        low: ms,
        high: ms,
    };
    let of = |place: usize| {
        let times = m.digests.iter().map(|d| d.times.get(place));
        times.map(|t| t.map(|t| exact(t.ns / 1e6))).collect()
    };
    let limits = m.digests.iter().map(|d| {
        let hash = hash_of(m, d, true)?;
        Some(exact(alone(d, hash)))
    });
    plot::bars(
        &plots.join("measurement.svg"),
        "Launch digest of one image of firmware",
        "ms of processor time",
        Scale::Linear,
        &names,
        &[
            Series {
                name: "this project",
                bars: of(0),
            },
            Series {
                name: "crate sev",
                bars: of(1),
            },
            Series {
                name: "sev-snp-measure",
                bars: of(2),
            },
            Series {
                name: "hash alone (sha2)",
                bars: limits.collect(),
            },
        ],
    )
}
