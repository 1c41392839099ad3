//! The report of a migration.

use std::fmt;
use std::time::{Duration, Instant};

use kvm_ops::Kind;
use kvm_ops::sev::migrate::{Phase, Progress};
use serde::Serialize;

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
}

#[derive(Debug, Serialize)]
struct Step {
    phase: String,
    owner: String,
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
            steps: Vec::new(),
            commands: None,
            count_at_source: 0,
            count_first_at_target: None,
            count_last_at_target: None,
            leaks: 0,
            downtime: Duration::ZERO,
            stopped: None,
        }
    }

    /// Records a phase that was reached.
    pub(super) fn step(&mut self, phase: Phase) {
        let (name, owner) = (phase.to_string(), phase.owner().to_string());
        if self.steps.last().map(|last| &last.phase) != Some(&name) {
            self.steps.push(Step { phase: name, owner });
        }
    }

    pub(super) fn seen(&mut self, progress: &Progress, at: Instant) {
        self.step(progress.phase);
        if progress.phase >= Phase::Stopped {
            let since = *self.stopped.get_or_insert(at);
            self.downtime = at - since;
        }
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

    /// Returns true if the guest continued from its last count and no teardown leaked.
    pub(super) fn is_whole(&self) -> bool {
        let went_on = match (self.count_first_at_target, self.count_last_at_target) {
            (Some(first), Some(last)) => first > self.count_at_source && last > first,
            _ => true,
        };
        went_on && self.leaks == 0
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
            writeln!(
                f,
                "  pages         {} in {}, {:.1} MB/s, {} on the link",
                self.pages,
                units::plural(self.rounds.into(), "round"),
                self.megabytes_per_second,
                units::size(self.link_bytes)
            )?;
        }
        if self.mode != "receive" {
            writeln!(f, "  downtime      {}", time(self.downtime_seconds))?;
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
        write!(f, "  leaks         {}", self.leaks)
    }
}
