//! The report of a migration.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvm_ops::Kind;
use kvm_ops::sev::migrate::{Phase, Progress};
use serde::Serialize;

use super::guest::Told;
use super::meter::{Meter, Rates};
use super::summary::Equal;
use crate::units;

/// The report, as printed.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    mode: &'static str,
    technology: &'static str,
    memory_bytes: u64,
    seconds: f64,
    downtime_seconds: f64,
    pages: u64,
    link_bytes: u64,
    megabytes_per_second: f64,
    rounds: u32,
    /// Streams of a TD's pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) streams: Option<u16>,
    /// Pages that travelled while the guest was stopped.
    pages_stopped: u64,
    /// The rates when the guest was stopped, and the downtime to be expected then.
    #[serde(skip_serializing_if = "Option::is_none")]
    at_stop: Option<AtStop>,
    /// The pages that followed the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    post_copy: Option<PostCopy>,
    /// The parts of a TD's identity that are the same at both hosts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) equal: Option<Equal>,
    /// Pages that the arrived guest found as it had written them, and otherwise.
    pages_as_written: u64,
    pages_otherwise: u64,
    /// Every step, and the owner of the guest at that time.
    steps: Vec<Step>,
    /// Commands and RMP instructions that a move needed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) commands: Option<u64>,
    /// The guest's count at departure.
    pub(super) count_at_source: u64,
    pub(super) count_first_at_target: Option<u64>,
    pub(super) count_last_at_target: Option<u64>,
    pub(super) leaks: usize,
    #[serde(skip)]
    pub(super) downtime: Duration,
    #[serde(skip)]
    stopped: Option<Instant>,
    #[serde(skip)]
    runs_there: Option<Instant>,
    #[serde(skip)]
    pages_before_stop: u64,
    #[serde(skip)]
    left: u64,
}

#[derive(Debug, Serialize)]
struct AtStop {
    pages_left: u64,
    sent_megabytes_per_second: f64,
    dirtied_megabytes_per_second: f64,
    expected_downtime_seconds: f64,
}

/// Pages that came once the guest ran at its target.
#[derive(Debug, Serialize)]
struct PostCopy {
    pages_late: u64,
    /// Those of them that the guest waited for.
    pages_on_demand: u64,
    seconds: f64,
    megabytes_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Step {
    phase: String,
    owner: String,
}

impl AtStop {
    fn new(rates: Rates, left: u64) -> Self {
        let expected = left as f64 * 4096.0 / rates.sent;
        Self {
            pages_left: left,
            sent_megabytes_per_second: rates.sent / 1e6,
            dirtied_megabytes_per_second: rates.dirtied / 1e6,
            expected_downtime_seconds: expected,
        }
    }
}

impl Report {
    pub(super) fn new(mode: &'static str, memory: u64, kind: Kind) -> Self {
        Self {
            mode,
            technology: match kind {
                Kind::Of(tech) => tech.name(),
                _ => "",
            },
            memory_bytes: memory,
            seconds: 0.0,
            downtime_seconds: 0.0,
            pages: 0,
            link_bytes: 0,
            megabytes_per_second: 0.0,
            rounds: 0,
            streams: None,
            pages_stopped: 0,
            at_stop: None,
            post_copy: None,
            equal: None,
            pages_as_written: 0,
            pages_otherwise: 0,
            steps: Vec::new(),
            commands: None,
            count_at_source: 0,
            count_first_at_target: None,
            count_last_at_target: None,
            leaks: 0,
            downtime: Duration::ZERO,
            stopped: None,
            runs_there: None,
            pages_before_stop: 0,
            left: 0,
        }
    }

    /// Records a phase that was reached.
    pub(super) fn step(&mut self, phase: Phase) {
        let (name, owner) = (phase.to_string(), phase.owner().to_string());
        if self.steps.last().map(|last| &last.phase) != Some(&name) {
            self.steps.push(Step { phase: name, owner });
        }
    }

    pub(super) fn seen(&mut self, progress: &Progress, meter: &Meter, at: Instant) {
        self.step(progress.phase);
        if progress.phase < Phase::Stopped {
            self.pages_before_stop = progress.pages;
            self.left = progress.left;
            return;
        }
        if self.stopped.is_none() {
            self.stopped = Some(at);
            self.at_stop = meter.rates().map(|rates| AtStop::new(rates, self.left));
        }
        self.pages_stopped = progress.pages - progress.late - self.pages_before_stop;
        if progress.phase == Phase::PostCopy {
            self.runs_there.get_or_insert(at);
        }
        let end = self.runs_there.unwrap_or(at);
        self.downtime = self.stopped.map_or(Duration::ZERO, |since| end - since);
        if let Some(since) = self.runs_there {
            self.followed(progress, at - since);
        }
    }

    /// Records the pages that followed the guest in that time.
    pub(super) fn followed(&mut self, progress: &Progress, took: Duration) {
        let seconds = took.as_secs_f64();
        let bytes = (progress.late * 4096) as f64;
        self.post_copy = Some(PostCopy {
            pages_late: progress.late,
            pages_on_demand: progress.on_demand,
            seconds,
            megabytes_per_second: if seconds > 0.0 {
                bytes / 1e6 / seconds
            } else {
                0.0
            },
        });
    }

    /// Records what an arrived guest tells of its pages.
    pub(super) fn pages_told(&mut self, told: &Told) {
        self.pages_as_written = told.checked.load(Ordering::Relaxed);
        self.pages_otherwise = told.wrong.load(Ordering::Relaxed);
    }

    pub(super) fn finish(
        &mut self,
        took: Duration,
        down: Duration,
        pages: u64,
        bytes: u64,
        round: u32,
    ) {
        self.seconds = took.as_secs_f64();
        self.downtime_seconds = down.as_secs_f64();
        self.pages = pages;
        self.link_bytes = bytes;
        self.rounds = round + u32::from(pages > 0);
        if self.seconds > 0.0 {
            self.megabytes_per_second = (pages * 4096) as f64 / 1e6 / self.seconds;
        }
    }

    pub(super) fn counts(&mut self, source: u64, first: u64, last: u64) {
        self.count_at_source = source;
        self.count_first_at_target = Some(first);
        self.count_last_at_target = Some(last);
    }

    /// Returns true if the guest continued from its last count with all its pages, as the TD that it was, and no
    /// teardown leaked.
    pub(super) fn is_whole(&self) -> bool {
        let went_on = match (self.count_first_at_target, self.count_last_at_target) {
            (Some(first), Some(last)) => first > self.count_at_source && last > first,
            _ => true,
        };
        let is_same = self.equal.is_none_or(Equal::all) && self.pages_otherwise == 0;
        went_on && is_same && self.leaks == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |seconds: f64| units::time(Duration::from_secs_f64(seconds));
        writeln!(
            f,
            "{} of a {} guest with {}: {}",
            self.mode,
            self.technology,
            units::size(self.memory_bytes),
            time(self.seconds)
        )?;
        if let Some(commands) = self.commands {
            writeln!(f, "  commands      {commands}, no page copied")?;
        }
        if self.pages > 0 {
            let rounds = match &self.post_copy {
                // The epochs are those around the start token.
                Some(late) if late.pages_late == self.pages => String::new(),
                _ => format!(" in {}", units::plural(self.rounds.into(), "round")),
            };
            writeln!(
                f,
                "  pages         {}{rounds}, {:.1} MB/s, {} on the link",
                self.pages,
                self.megabytes_per_second,
                units::size(self.link_bytes)
            )?;
        }
        if let Some(streams) = self.streams {
            writeln!(f, "  streams       {streams}")?;
        }
        if let Some(rates) = &self.at_stop {
            writeln!(
                f,
                "  at the stop   {:.1} MB/s sent, {:.1} MB/s dirtied; {} left, {} to be expected",
                rates.sent_megabytes_per_second,
                rates.dirtied_megabytes_per_second,
                units::plural(rates.pages_left, "page"),
                time(rates.expected_downtime_seconds)
            )?;
        }
        if let Some(late) = &self.post_copy {
            writeln!(
                f,
                "  post-copy     {} late in {}, {:.1} MB/s; {} on demand",
                units::plural(late.pages_late, "page"),
                time(late.seconds),
                late.megabytes_per_second,
                late.pages_on_demand
            )?;
        }
        if self.mode != "receive" {
            let pages = match self.pages_stopped {
                0 => String::new(),
                pages => format!(", {}", units::plural(pages, "page")),
            };
            writeln!(f, "  downtime      {}{pages}", time(self.downtime_seconds))?;
        }
        let steps: Vec<_> = self
            .steps
            .iter()
            .map(|step| format!("{} ({})", step.phase, step.owner))
            .collect();
        writeln!(f, "  owner         {}", steps.join(" > "))?;
        if let (Some(first), Some(last)) = (self.count_first_at_target, self.count_last_at_target) {
            let before = match self.count_at_source {
                0 => String::new(),
                count => format!("to {count} before, and "),
            };
            writeln!(
                f,
                "  the guest     counted {before}from {first} to {last} after"
            )?;
        }
        if self.pages_as_written + self.pages_otherwise > 0 {
            writeln!(
                f,
                "  its pages     {} as written, {} otherwise",
                self.pages_as_written, self.pages_otherwise
            )?;
        }
        if let Some(equal) = self.equal {
            writeln!(f, "  the same      {equal}")?;
        }
        write!(f, "  leaks         {}", self.leaks)
    }
}
