//! Rates of a migration under way.

use std::time::{Duration, Instant};

use kvm_ops::sev::migrate::{Phase, Progress};

use crate::units;

const PAGE: f64 = 4096.0;

/// The time over which rates are taken: the guest's behaviour of a minute ago tells little.
const SPAN: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
struct Moment {
    at: Instant,
    pages: u64,
    left: u64,
}

/// Watches a migration, and tells how fast it is and what is to be expected.
#[derive(Debug, Default)]
pub(super) struct Meter {
    /// Where the rates are taken from.
    from: Option<Moment>,
    /// Where the next ones will be taken from.
    next: Option<Moment>,
    rates: Option<Rates>,
    /// Where the rate of pages that follow their guest is taken from.
    follows: Option<Moment>,
    following: Option<f64>,
}

/// The rates of a migration, in bytes for each second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    /// Of pages that travel.
    pub(super) sent: f64,
    /// Of pages that the guest writes, and that must travel again.
    pub(super) dirtied: f64,
    /// The time that the rest would take if the guest were stopped now.
    pub(super) downtime: Duration,
}

impl Meter {
    /// Takes note of a moment. Rates are those of copying, while the guest runs.
    pub(super) fn seen(&mut self, progress: &Progress, at: Instant) {
        if progress.phase == Phase::PostCopy {
            return self.followed(progress, at);
        }
        if progress.phase != Phase::Copying {
            return;
        }
        let (pages, left) = (progress.pages, progress.left);
        let now = Moment { at, pages, left };
        let from = *self.from.get_or_insert(now);
        let next = *self.next.get_or_insert(now);
        if at - next.at >= SPAN {
            (self.from, self.next) = (Some(next), Some(now));
        }
        let seconds = (at - from.at).as_secs_f64();
        let moved = pages.saturating_sub(from.pages);
        if moved == 0 || seconds <= 0.0 {
            return;
        }
        // What was left, less what was sent, would be left; the rest was written meanwhile.
        let written = (left + pages).saturating_sub(from.left + from.pages);
        let sent = moved as f64 * PAGE / seconds;
        self.rates = Some(Rates {
            sent,
            dirtied: written as f64 * PAGE / seconds,
            downtime: Duration::try_from_secs_f64(left as f64 * PAGE / sent)
                .unwrap_or(Duration::MAX),
        });
    }

    fn followed(&mut self, progress: &Progress, at: Instant) {
        let (pages, left) = (progress.late, progress.left);
        let from = *self.follows.get_or_insert(Moment { at, pages, left });
        let seconds = (at - from.at).as_secs_f64();
        if seconds > 0.0 && pages > from.pages {
            self.following = Some((pages - from.pages) as f64 * PAGE / seconds);
        }
    }

    /// The bytes for each second of pages that follow their guest, once some have.
    pub(super) const fn following(&self) -> Option<f64> {
        self.following
    }

    /// The rates, once something has travelled.
    pub(super) const fn rates(&self) -> Option<Rates> {
        self.rates
    }
}

impl std::fmt::Display for Rates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.1} MB/s, {:.1} MB/s dirtied, downtime would be {}",
            self.sent / 1e6,
            self.dirtied / 1e6,
            units::time(self.downtime)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(phase: Phase, pages: u64, left: u64) -> Progress {
        let mut progress = Progress::new(phase);
        (progress.pages, progress.left) = (pages, left);
        progress
    }

    #[test]
    fn what_is_left_beyond_what_was_sent_was_written_meanwhile() {
        let mut meter = Meter::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        meter.seen(&progress(Phase::New, 0, 0), at(0));
        meter.seen(&progress(Phase::Copying, 0, 1000), at(0));
        assert_eq!(meter.rates(), None);
        // 600 pages went, and 100 of them were written again.
        meter.seen(&progress(Phase::Copying, 600, 500), at(1000));
        let rates = meter.rates().unwrap();
        assert_eq!(rates.sent, 600.0 * PAGE);
        assert_eq!(rates.dirtied, 100.0 * PAGE);
        assert_eq!(rates.downtime.as_millis(), 833);
        // While the guest is stopped nothing is measured.
        meter.seen(&progress(Phase::Stopped, 1100, 0), at(1500));
        assert_eq!(meter.rates(), Some(rates));
    }

    #[test]
    fn pages_that_follow_their_guest_have_a_rate_of_their_own() {
        let mut meter = Meter::default();
        let start = Instant::now();
        for (late, seconds) in [(0, 0), (100, 1), (600, 2)] {
            let mut progress = progress(Phase::PostCopy, 1000 + late, 600 - late);
            progress.late = late;
            meter.seen(&progress, start + Duration::from_secs(seconds));
        }
        assert_eq!(meter.following(), Some(300.0 * PAGE));
        assert_eq!(meter.rates(), None);
    }

    #[test]
    fn rates_follow_the_last_seconds() {
        let mut meter = Meter::default();
        let start = Instant::now();
        for second in 0..20u64 {
            // A burst at the beginning, and ten pages a second since.
            let pages = 10_000 + 10 * second;
            let at = start + Duration::from_secs(second);
            meter.seen(&progress(Phase::Copying, pages, 0), at);
        }
        assert_eq!(meter.rates().unwrap().sent, 10.0 * PAGE);
    }
}
