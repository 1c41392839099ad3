//! Tables on the terminal and in docs/mirror.md, and plots.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::designs::{Cost, OPERATIONS};
use crate::plot::{Bar, Scale, Series, bars};
use crate::threads::ROUNDS;
use crate::work::{Row, WORK};

/// The measurements, table by table, under their names in docs/mirror.md.
#[derive(Default)]
pub struct Report {
    tables: Vec<(String, String)>,
    work: Vec<(u64, Vec<Row>)>,
    rates: Vec<(&'static str, [f64; 4])>,
    calls: Vec<[Option<Cost>; 5]>,
}

fn bar(value: f64) -> Option<Bar> {
    Some(Bar {
        ns: value,
        low: value,
        high: value,
    })
}

fn number(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Returns whether a row of the work table does the same job as the mirror's. rangemap keeps what is in
/// order as one entry and answers for it without a walk.
fn is_peer(name: &str, what: usize) -> bool {
    let ours = name.starts_with("mirror") || name.starts_with('*');
    let at_random = what == 2 || what == 4;
    !ours && (name != "rangemap" || at_random)
}

impl Report {
    fn table(&mut self, name: &str, text: String) {
        println!("\n{text}");
        self.tables.push((name.to_owned(), text));
    }

    /// The work for a guest of `gib` GiB.
    pub fn work(&mut self, gib: u64, rounds: usize, rows: Vec<Row>) {
        let mut text = format!(
            "{gib} GiB in 4 KiB pages, ns for each page, lower quartile of {rounds} rounds:\n\n| |"
        );
        WORK.iter().for_each(|work| {
            let _ = write!(text, " {work} |");
        });
        text += " KiB/GiB |\n|---|";
        text += &"--:|".repeat(WORK.len() + 1);
        for row in &rows {
            let _ = write!(text, "\n| {} |", row.name);
            for ns in row.ns {
                let _ = write!(text, " {} |", number(ns));
            }
            let _ = write!(text, " {:.0} |", row.kib_per_gib);
        }
        text += "\n| **best mirror row : best peer** |";
        let mut behind = Vec::new();
        for (what, work) in WORK.iter().enumerate() {
            let best = |ours: bool| {
                rows.iter()
                    .filter(|row| {
                        if ours {
                            // One page after the other is what a cursor is for.
                            row.name.starts_with("mirror")
                        } else {
                            is_peer(row.name, what)
                        }
                    })
                    .map(|row| row.ns[what])
                    .fold(f64::INFINITY, f64::min)
            };
            let ratio = best(true) / best(false);
            let _ = write!(text, " {ratio:.2} |");
            if ratio > 1.0 {
                behind.push(*work);
            }
        }
        text += " |\n";
        if behind.is_empty() {
            text += "\nThe mirror is behind no peer here.\n";
        } else {
            let _ = writeln!(text, "\nBehind a peer in this run: {}.", behind.join(", "));
        }
        self.table(&format!("work {gib}"), text);
        self.work.push((gib, rows));
    }

    /// Rates of one and two threads, and the locks alone.
    pub fn threads(
        &mut self,
        rows: Vec<(&'static str, [f64; 4])>,
        locks: Vec<(&'static str, [f64; 2])>,
    ) {
        let mut text = format!(
            "Millions of pages a second, all threads together, best of {ROUNDS} rounds:\n\n\
             | | map, 1 thread | map, 2 | look up, 1 | look up, 2 |\n|---|--:|--:|--:|--:|\n",
        );
        for (name, rates) in &rows {
            let _ = write!(text, "| {name} |");
            for rate in rates {
                let _ = write!(text, " {} |", number(*rate));
            }
            text += "\n";
        }
        self.table("threads", text);
        let mut text = format!(
            "Taking and releasing the reader's side by a call, ns, best of {ROUNDS} rounds:\n\n| | 1 thread | 2 threads |\n|---|--:|--:|\n",
        );
        for (name, [one, two]) in &locks {
            let _ = writeln!(text, "| {name} | {} | {} |", number(*one), number(*two));
        }
        self.table("locks", text);
        self.rates = rows;
    }

    /// The designs, at each cost of a SEAMCALL.
    pub fn designs(&mut self, tables: Vec<(u64, [[Option<Cost>; 5]; 3])>) {
        let cycles: Vec<String> = tables
            .iter()
            .map(|(cycles, _)| cycles.to_string())
            .collect();
        let mut text = format!(
            "SEAMCALLs, exact; in brackets ns where one takes {} cycles:\n\n\
             | | mirror | no mirror, one read for each walk | no mirror, one read for each entry |\n\
             |---|---|---|---|\n",
            cycles.join(" / ")
        );
        for (i, operation) in OPERATIONS.iter().enumerate() {
            let _ = write!(text, "| {operation} |");
            for design in 0..3 {
                let Some((calls, _)) = tables[0].1[design][i] else {
                    text += " impossible once the key is released |";
                    continue;
                };
                let times: Vec<String> = tables
                    .iter()
                    .filter_map(|(_, costs)| costs[design][i])
                    .map(|(_, ns)| {
                        if ns < 20.0 {
                            format!("{ns:.1}")
                        } else {
                            format!("{ns:.0}")
                        }
                    })
                    .collect();
                let calls = (calls * 1000.0).round() / 1000.0;
                let _ = write!(text, " {calls} ({}) |", times.join(" / "));
            }
            text += "\n";
        }
        self.table("designs", text);
        self.calls = tables
            .first()
            .map_or(Vec::new(), |(_, costs)| costs.to_vec());
    }

    /// Writes docs/mirror.md between its markers, and the plots.
    pub fn write(&self) -> Result<(), Box<dyn Error>> {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let file = docs.join("mirror.md");
        let mut text = fs::read_to_string(&file)?;
        for (name, table) in &self.tables {
            let (begin, end) = (
                format!("<!-- begin {name} -->"),
                format!("<!-- end {name} -->"),
            );
            let from = text.find(&begin).ok_or_else(|| format!("no {begin}"))? + begin.len();
            let to = text.find(&end).ok_or_else(|| format!("no {end}"))?;
            text.replace_range(from..to, &format!("\n{}\n", table.trim_end()));
        }
        fs::write(&file, text)?;
        self.plots(&docs.join("plots"))
    }

    fn plots(&self, dir: &Path) -> Result<(), Box<dyn Error>> {
        for (gib, rows) in &self.work {
            let names: Vec<String> = rows.iter().map(|row| row.name.replace('*', "")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let series: Vec<Series> = [0, 1, 4, 5]
                .map(|what| Series {
                    name: WORK[what],
                    bars: rows.iter().map(|row| bar(row.ns[what])).collect(),
                })
                .into();
            bars(
                &dir.join(format!("mirror-{gib}g.svg")),
                &format!("{gib} GiB in 4 KiB pages"),
                "ns for each page, logarithmic",
                Scale::Log,
                &names,
                &series,
            )?;
        }
        if !self.rates.is_empty() {
            self.plot_rates(dir)?;
        }
        if !self.calls.is_empty() {
            self.plot_calls(dir)?;
        }
        Ok(())
    }

    fn plot_rates(&self, dir: &Path) -> Result<(), Box<dyn Error>> {
        let names: Vec<String> = self.rates.iter().map(|(n, _)| n.replace('`', "")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let series: Vec<Series> = [("map, 1 thread", 0), ("map, 2 threads", 1)]
            .map(|(name, i)| Series {
                name,
                bars: self.rates.iter().map(|(_, rates)| bar(rates[i])).collect(),
            })
            .into();
        bars(
            &dir.join("mirror-threads.svg"),
            "Faults of two vCPUs",
            "millions of pages a second, all threads together",
            Scale::Linear,
            &names,
            &series,
        )
    }

    fn plot_calls(&self, dir: &Path) -> Result<(), Box<dyn Error>> {
        let series: Vec<Series> = ["mirror", "one read a walk", "one read an entry"]
            .into_iter()
            .zip(&self.calls)
            .map(|(name, costs)| Series {
                name,
                bars: costs[..4]
                    .iter()
                    .map(|cost| bar(cost.map_or(0.0, |c| c.0)))
                    .collect(),
            })
            .collect();
        bars(
            &dir.join("mirror-calls.svg"),
            "SEAMCALLs with and without a mirror",
            "SEAMCALLs for each page",
            Scale::Linear,
            &[
                "private fault",
                "spurious fault",
                "which entry",
                "to shared, 1/8 present",
            ],
            &series,
        )
    }
}
