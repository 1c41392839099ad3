//! A guest that runs while its pages follow it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use kvm_ops::VcpuId;
use kvm_ops::sim::SimHost;
use kvm_ops::tdx::migrate::{Phase, Progress};
use kvm_ops_machine::{Cpus, End, ExitContext, Flow, MachineError, RunLimits, RunReport, Stopper};

use super::guest::{Told, Writer};
use super::{PATIENCE, Session, WARM_UP};
use crate::failure::{Failure, Outcome};

/// The vCPUs of a target, which run from the moment on when they may.
pub(super) struct Beside<'s, 'e> {
    session: &'e Session<'e>,
    scope: &'s Scope<'s, 'e>,
    /// Until they run.
    cpus: Option<Cpus<'e, SimHost>>,
    told: Arc<Told>,
    running: Option<Outcome<Running<'s>>>,
}

struct Running<'s> {
    thread: ScopedJoinHandle<'s, Result<RunReport, MachineError>>,
    stopper: Stopper,
    since: Instant,
    /// The source was told.
    announced: Option<Instant>,
    /// All pages were here.
    whole: Option<Instant>,
}

/// What a guest did while its pages followed.
pub(super) struct Ran {
    pub(super) told: Arc<Told>,
    pub(super) first: u64,
    pub(super) last: u64,
    /// The time that the pages took.
    pub(super) took: Duration,
}

impl<'s, 'e> Beside<'s, 'e> {
    pub(super) fn new(
        session: &'e Session<'e>,
        scope: &'s Scope<'s, 'e>,
        cpus: Cpus<'e, SimHost>,
    ) -> Self {
        Self {
            session,
            scope,
            cpus: Some(cpus),
            told: Arc::default(),
            running: None,
        }
    }

    /// Takes note of a moment of the migration. The guest begins to run once it may.
    pub(super) fn seen(&mut self, progress: &Progress) {
        if progress.phase < Phase::PostCopy {
            return;
        }
        let now = Instant::now();
        match &mut self.running {
            None if progress.phase == Phase::PostCopy => self.running = self.start(now),
            Some(Ok(running)) => {
                running.announced.get_or_insert(now);
                if progress.phase == Phase::Done {
                    running.whole.get_or_insert(now);
                }
            }
            _ => {}
        }
    }

    fn start(&mut self, since: Instant) -> Option<Outcome<Running<'s>>> {
        let mut cpus = self.cpus.take()?;
        let turns = self.session.guest.turns();
        let writer = Writer::arrived(turns, Arc::clone(&self.told));
        let ready = cpus
            .take_arrived_vcpus(1)
            .map_err(|error| Failure::because("the guest came without its vCPU", error))
            .and_then(|()| {
                cpus.load_program(VcpuId(0), Box::new(writer))
                    .map_err(|error| Failure::because("cannot load the guest's program", error))
            });
        if let Err(failure) = ready {
            return Some(Err(failure));
        }
        let stopper = cpus.stopper();
        self.session.interrupt.stops(stopper.clone());
        let limits = RunLimits::none().deadline(self.session.guest.timeout);
        let thread = self.scope.spawn(move || {
            let quiet = |_: &mut ExitContext<'_>| Flow::Continue;
            cpus.run(&quiet, limits)
        });
        Some(Ok(Running {
            thread,
            stopper,
            since,
            announced: None,
            whole: None,
        }))
    }

    /// The time from the word to the source that the guest runs to its first instruction; zero if that was before.
    pub(super) fn resumed_after(&self) -> Duration {
        let Some(Ok(running)) = &self.running else {
            return Duration::ZERO;
        };
        let start = Instant::now();
        while self.told.first.get().is_none()
            && start.elapsed() < PATIENCE
            && self.session.bound.check().is_ok()
        {
            thread::sleep(Duration::from_micros(50));
        }
        let first = self.told.first.get().copied();
        let announced = running.announced.unwrap_or(running.since);
        first
            .unwrap_or_else(Instant::now)
            .saturating_duration_since(announced)
    }

    /// Stops the guest, once it has counted on if it `arrived`.
    pub(super) fn end(self, arrived: bool) -> Outcome<Option<Ran>> {
        let Self {
            session,
            told,
            running,
            ..
        } = self;
        let Some(running) = running else {
            return Ok(None);
        };
        let running = running?;
        let mut first = 0;
        if arrived {
            session.wait_for(&told, 1);
            first = told.count.load(Ordering::Acquire);
            session.wait_for(&told, first + WARM_UP);
        }
        running.stopper.stop();
        let ran = running.thread.join();
        session.interrupt.clear();
        let Ok(ran) = ran else {
            return Err(Failure::new("the thread of the guest panicked"));
        };
        let report = ran.map_err(|error| Failure::because("the guest does not run", error))?;
        if arrived && report.end != End::Stopped {
            return Err(Failure::new(format!("the guest ended: {}", report.end)));
        }
        let took = running.whole.unwrap_or_else(Instant::now) - running.since;
        let last = told.count.load(Ordering::Acquire);
        Ok(Some(Ran {
            told,
            first,
            last,
            took,
        }))
    }
}
