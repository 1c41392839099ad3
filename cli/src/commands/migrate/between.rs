//! Journeys between two hosts.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvm_ops::sev::migrate::{Phase, Progress};
use kvm_ops::sim::SimHost;
use kvm_ops_machine::Machine;

use super::arrival::Came;
use super::beside::Ran;
use super::guest::Told;
use super::link::{self, Address, Bound, Link, Waiting};
use super::meter::Meter;
use super::report::Report;
use super::snp::SnpHost;
use super::summary::Equal;
use super::td::TdHost;
use super::{Kinds, Session, WARM_UP, leaks};
use crate::failure::{Failure, Outcome};
use crate::term;

/// A host at either end.
enum Side {
    Sev(SimHost),
    Snp(Box<SnpHost>),
    Td(Box<TdHost>),
}

impl Side {
    /// Tears down what is the host's, and returns the number of leaks.
    fn leaks(self) -> usize {
        match self {
            Self::Sev(_) => 0,
            Self::Snp(host) => host.leaks(),
            Self::Td(host) => host.leaks(),
        }
    }
}

/// A guest that has gone.
pub(super) struct Sent {
    pub(super) progress: Progress,
    /// What is the same at both hosts, of a TD.
    pub(super) equal: Option<Equal>,
    /// The time from the target's word that the guest runs to its first instruction, of a post-copy.
    pub(super) resumed_after: Option<Duration>,
}

/// A guest that has come.
struct Arrived {
    machine: Machine<SimHost>,
    progress: Progress,
    equal: Option<Equal>,
    /// What it did before all of its pages had come.
    ran: Option<Ran>,
}

impl Session<'_> {
    fn side(&self) -> Outcome<Side> {
        match self.guest.tech {
            Kinds::Tdx => Ok(Side::Td(Box::new(self.td_host()?))),
            Kinds::SevSnp => Ok(Side::Snp(Box::new(self.snp_host()?))),
            Kinds::Sev | Kinds::SevEs => self.guest.sev_host().map(Side::Sev),
        }
    }

    fn leaving(&self, side: &Side) -> Outcome<Machine<SimHost>> {
        match side {
            Side::Sev(host) => self.guest.source(host),
            Side::Snp(host) => host.source(self.guest),
            Side::Td(host) => host.source(self.guest.memory),
        }
    }

    /// Takes a guest from one of the links that come.
    fn arrive(
        &self,
        side: &mut Side,
        next: impl FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Arrived> {
        match side {
            Side::Sev(host) => {
                let mut machine = self.guest.target(host)?;
                let progress = self.receive_sev(&mut machine, host, next)?;
                Ok(Arrived {
                    machine,
                    progress,
                    equal: None,
                    ran: None,
                })
            }
            Side::Snp(host) => {
                let (machine, progress) = self.receive_snp(host, next)?;
                Ok(Arrived {
                    machine,
                    progress,
                    equal: None,
                    ran: None,
                })
            }
            Side::Td(host) => {
                let Came {
                    mut machine,
                    journey,
                } = self.receive_td(host, next)?;
                if journey.ran.is_none() {
                    machine.take_arrived_vcpus(1).map_err(|error| {
                        Failure::because("the guest came without its vCPU", error)
                    })?;
                }
                Ok(Arrived {
                    machine,
                    progress: journey.progress,
                    equal: journey.equal,
                    ran: journey.ran,
                })
            }
        }
    }

    pub(super) fn between(&self) -> Outcome<Report> {
        let (mut here, mut there) = (self.side()?, self.side()?);
        let (hand_over, waiting) = mpsc::channel();
        let connect = move || {
            let (near, far) = UnixStream::pair()?;
            // A target that is gone hears nothing, which the link tells.
            let _ = hand_over.send(far);
            Ok(Link::of_pair(near, self.bound.clone())?)
        };
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let mut from = self.leaving(&here)?;
        let (sent, received) = thread::scope(|scope| {
            let there = &mut there;
            let receiving =
                scope.spawn(move || self.arrive(there, |bound| link::handed_over(&waiting, bound)));
            let sent = self.depart("hosts", &mut here, &mut from, connect, &mut || Err(gone()));
            (sent, receiving.join())
        });
        let mut report = sent?;
        let Ok(received) = received else {
            return Err(Failure::new("the receiving thread panicked"));
        };
        let mut received = received?;
        let (first, end, told) = self.ran(&mut received)?;
        report.counts(report.count_at_source, first, end);
        report.pages_told(&told);
        report.leaks = leaks(from) + leaks(received.machine) + here.leaks() + there.leaks();
        Ok(report)
    }

    /// Runs a guest on that came, if it did not while its pages followed. Returns its first and last count there,
    /// and what it tells of its pages.
    fn ran(&self, arrived: &mut Arrived) -> Outcome<(u64, u64, Arc<Told>)> {
        match &arrived.ran {
            Some(ran) => Ok((ran.first, ran.last, Arc::clone(&ran.told))),
            None => self.run_on(&mut arrived.machine),
        }
    }

    pub(super) fn send(&self, address: &Address) -> Outcome<Report> {
        let mut side = self.side()?;
        let mut from = self.leaving(&side)?;
        let connect = || link::connect(address, &self.bound);
        let mut relink = || link::reach(address, &self.bound);
        let mut report = self.depart("send", &mut side, &mut from, connect, &mut relink)?;
        report.leaks = leaks(from) + side.leaks();
        Ok(report)
    }

    pub(super) fn receive(&self, address: &Address) -> Outcome<Report> {
        let waiting = Waiting::at(address)
            .map_err(|error| Failure::because(format!("cannot wait at {address}"), error))?;
        term::complain(format!("waiting at {}", waiting.address()?));
        let mut side = self.side()?;
        let start = Instant::now();
        let mut arrived = self.arrive(&mut side, |bound| waiting.accept(bound))?;
        let took = start.elapsed();
        let (first, end, told) = self.ran(&mut arrived)?;
        let mut report = self.report("receive");
        if let Some(ran) = &arrived.ran {
            report.followed(&arrived.progress, ran.took);
        }
        let Progress {
            pages,
            bytes,
            round,
            ..
        } = arrived.progress;
        report.step(Phase::Done);
        report.finish(took, Duration::ZERO, pages, bytes, round.saturating_sub(1));
        report.count_first_at_target = Some(first);
        report.count_last_at_target = Some(end);
        report.pages_told(&told);
        report.equal = arrived.equal;
        report.leaks = leaks(arrived.machine) + side.leaks();
        Ok(report)
    }

    fn report(&self, mode: &'static str) -> Report {
        let mut report = Report::new(mode, self.guest.memory, self.guest.kind());
        report.streams = matches!(self.guest.tech, Kinds::Tdx).then(|| self.guest.streams());
        report
    }

    /// Sends the guest of a machine to another host while it runs. The link is made once the guest has
    /// written its memory, because a peer does not wait for long.
    fn depart(
        &self,
        mode: &'static str,
        side: &mut Side,
        from: &mut Machine<SimHost>,
        connect: impl FnOnce() -> Outcome<Link>,
        relink: &mut dyn FnMut() -> io::Result<Link>,
    ) -> Outcome<Report> {
        let told = self.load_writer(from)?;
        let mut report = self.report(mode);
        let bar = bar(self.guest.pages(), self.guest.json);
        let mut meter = Meter::default();
        let sent = self.run_during(from, |vm| {
            self.wait_for(&told, self.guest.turns().all() + WARM_UP);
            let link = connect()?;
            let start = Instant::now();
            let mut seen = |progress: &Progress| {
                let at = Instant::now();
                meter.seen(progress, at);
                report.seen(progress, &meter, at);
                show(&bar, progress, &meter);
            };
            let alone = |progress| Sent {
                progress,
                equal: None,
                resumed_after: None,
            };
            let sent = match side {
                Side::Sev(_) => self.send_sev(vm, link, relink, &mut seen).map(alone),
                Side::Snp(host) => self.send_snp(host, vm, link, relink, &mut seen).map(alone),
                Side::Td(host) => self.send_td(host, vm, link, relink, &mut seen),
            };
            sent.map(|sent| (sent, start.elapsed()))
        });
        bar.finish_and_clear();
        let (sent, took) = sent??;
        let down = report.downtime + sent.resumed_after.unwrap_or_default();
        let Progress {
            pages,
            bytes,
            round,
            ..
        } = sent.progress;
        report.finish(took, down, pages, bytes, round);
        report.equal = sent.equal;
        report.count_at_source = told.count.load(Ordering::Acquire);
        Ok(report)
    }
}

fn bar(pages: u64, quiet: bool) -> ProgressBar {
    let target = if term::has_bars() && !quiet {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(pages), target);
    let template = "{bar:30} {pos}/{len} pages  {elapsed}  {msg}";
    bar.with_style(
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
    )
}

fn show(bar: &ProgressBar, progress: &Progress, meter: &Meter) {
    bar.set_length(progress.pages + progress.left);
    bar.set_position(progress.pages);
    if progress.phase == Phase::PostCopy {
        let rate = meter.following().unwrap_or_default() / 1e6;
        let Progress {
            left, on_demand, ..
        } = progress;
        bar.set_message(format!(
            "{}, {left} pages left, {rate:.1} MB/s, {on_demand} on demand",
            progress.phase
        ));
        return;
    }
    let rates = meter
        .rates()
        .map_or_else(String::new, |rates| format!(", {rates}"));
    bar.set_message(format!(
        "{}, round {}, the guest is the {}'s{rates}",
        progress.phase,
        progress.round,
        progress.phase.owner()
    ));
}
