//! The run loop: a thread for each vCPU, and what each exit means.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Exit, VcpuId, VcpuOps};

use super::convert::{self, Convert};
use super::{End, ExitCounts, ExitHandler, Flow, MachineError, RunReport, Stopper, VcpuReport};

/// How far a run may go. None is the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunLimits {
    /// How long, by the wall clock.
    pub deadline: Option<Duration>,
    /// How many exits each vCPU may make. Kicks and signals, which are not the guest's, do not
    /// count.
    pub max_exits: Option<u64>,
}

impl RunLimits {
    /// No limits: the run ends when the guest does, or by a [`Stopper`].
    pub const fn none() -> Self {
        Self {
            deadline: None,
            max_exits: None,
        }
    }

    /// That long, by the wall clock.
    pub const fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// That many exits for each vCPU.
    pub const fn max_exits(mut self, exits: u64) -> Self {
        self.max_exits = Some(exits);
        self
    }
}

/// Whose life a vCPU's shutdown ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ShutdownScope {
    /// The machine's, as a triple fault resets a PC.
    Machine,
    /// Its own: each vCPU runs a program for itself.
    Vcpu,
}

/// One run.
pub(super) struct Run<'a> {
    pub(super) handler: &'a dyn ExitHandler,
    /// The VM, where its memory can be private: conversions are then answered here.
    pub(super) vm: Option<&'a dyn Convert>,
    pub(super) limits: RunLimits,
    pub(super) stopper: &'a Stopper,
    pub(super) scope: ShutdownScope,
    pub(super) state: State,
}

/// What the threads of a run share.
#[derive(Default)]
pub(super) struct State {
    /// Set after the cause, and read after every exit.
    ending: AtomicBool,
    shared: Mutex<Shared>,
    changed: Condvar,
}

#[derive(Default)]
struct Shared {
    /// What ended the machine, and which vCPU, unless it was the clock or a stopper.
    cause: Option<(Option<VcpuId>, End)>,
    /// Threads that have not ended.
    running: usize,
}

/// How one vCPU ends.
enum Outcome {
    /// For itself alone.
    Alone(End),
    /// And the machine with it.
    Machine(End),
    /// Because the machine does.
    WithMachine,
}

impl Run<'_> {
    /// Runs the vCPUs whose flag is set, each on a thread of its own, and waits for all.
    pub(super) fn go<V: VcpuOps>(
        &self,
        vcpus: &mut [V],
        runs: &[bool],
    ) -> Result<RunReport, MachineError> {
        let start = Instant::now();
        let reports = thread::scope(|scope| {
            let mut failed = None;
            let threads: Vec<_> = vcpus
                .iter_mut()
                .zip(runs)
                .map(|(vcpu, runs)| {
                    let id = vcpu.id();
                    if !runs || failed.is_some() {
                        return (id, None);
                    }
                    self.lock().running += 1;
                    let spawned = thread::Builder::new()
                        .name(format!("vcpu{id}"))
                        .spawn_scoped(scope, move || self.thread(vcpu));
                    match spawned {
                        Ok(thread) => (id, Some(thread)),
                        Err(source) => {
                            self.lock().running -= 1;
                            failed = Some(MachineError::Thread { vcpu: id, source });
                            (id, None)
                        }
                    }
                })
                .collect();
            if failed.is_some() {
                self.finish(None, End::Stopped);
            }
            self.watch(start);
            let reports: Vec<_> = threads
                .into_iter()
                .map(|(id, thread)| {
                    let Some(thread) = thread else {
                        return VcpuReport {
                            id,
                            exits: ExitCounts::default(),
                            end: End::NotStarted,
                        };
                    };
                    thread.join().unwrap_or(VcpuReport {
                        id,
                        exits: ExitCounts::default(),
                        end: End::Panicked,
                    })
                })
                .collect();
            failed.map_or(Ok(reports), Err)
        });
        self.stopper.clear();
        let vcpus = reports?;
        let cause = self.lock().cause.take().map(|(_, end)| end);
        Ok(RunReport {
            end: cause
                .or_else(|| vcpus.first().map(|vcpu| vcpu.end.clone()))
                .unwrap_or(End::NotStarted),
            vcpus,
            elapsed: start.elapsed(),
        })
    }

    /// Waits until every thread ended, and ends the machine at the deadline.
    fn watch(&self, start: Instant) {
        let mut shared = self.lock();
        while shared.running != 0 {
            let left = match (self.limits.deadline, &shared.cause) {
                (Some(deadline), None) => Some(deadline.saturating_sub(start.elapsed())),
                _ => None,
            };
            match left {
                None => {
                    shared = self
                        .state
                        .changed
                        .wait(shared)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Some(Duration::ZERO) => {
                    drop(shared);
                    self.finish(None, End::Deadline);
                    shared = self.lock();
                }
                Some(left) => {
                    shared = self
                        .state
                        .changed
                        .wait_timeout(shared, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        }
    }

    /// The life of a vCPU's thread.
    fn thread<V: VcpuOps>(&self, vcpu: &mut V) -> VcpuReport {
        let id = vcpu.id();
        let mut exits = ExitCounts::default();
        // A panic is the handler's; it ends this machine, and no other of the process.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.vcpu_loop(vcpu, &mut exits)))
            .unwrap_or(Outcome::Machine(End::Panicked));
        let end = match outcome {
            Outcome::Alone(end) => end,
            Outcome::Machine(end) => {
                self.finish(Some(id), end.clone());
                end
            }
            Outcome::WithMachine => match &self.lock().cause {
                Some((Some(peer), _)) => End::Peer(*peer),
                Some((None, end)) => end.clone(),
                None => End::Stopped,
            },
        };
        self.lock().running -= 1;
        self.state.changed.notify_all();
        VcpuReport { id, exits, end }
    }

    fn vcpu_loop<V: VcpuOps>(&self, vcpu: &mut V, exits: &mut ExitCounts) -> Outcome {
        let mut made = 0;
        let id = vcpu.id();
        loop {
            if self.stopper.requested() {
                self.finish(None, End::Stopped);
            }
            if self.state.ending.load(Ordering::SeqCst) {
                return Outcome::WithMachine;
            }
            if self.limits.max_exits.is_some_and(|max| made >= max) {
                return Outcome::Machine(End::ExitLimit);
            }
            let exit = match vcpu.vcpu_run() {
                Ok(exit) => exit,
                Err(error) => return Outcome::Machine(End::Failed(error)),
            };
            exits.add(exit.kind());
            if exit == Exit::Interrupted {
                continue;
            }
            made += 1;
            match exit {
                Exit::Hlt => return Outcome::Alone(End::Halted),
                Exit::Shutdown if self.scope == ShutdownScope::Vcpu => {
                    return Outcome::Alone(End::Shutdown);
                }
                Exit::Shutdown => return Outcome::Machine(End::Shutdown),
                Exit::SystemEvent { kind, .. } => {
                    return Outcome::Machine(End::SystemEvent(kind));
                }
                Exit::FailEntry { reason, .. } => return Outcome::Machine(End::FailEntry(reason)),
                Exit::InternalError { suberror, data } => {
                    let data = data.to_vec();
                    return Outcome::Machine(End::InternalError { suberror, data });
                }
                Exit::MapGpaRange {
                    gpa,
                    pages,
                    to,
                    ret,
                } if self.vm.is_some() => {
                    *ret = self.vm.map_or(0, |vm| convert::answer(vm, gpa, pages, to));
                }
                Exit::MemoryFault { gpa, bytes, access } if self.vm.is_some() => {
                    let follows = |vm| convert::follow(vm, gpa, bytes, access);
                    if !self.vm.is_some_and(follows) {
                        return Outcome::Machine(End::MemoryFault { gpa });
                    }
                }
                Exit::Unknown { .. } => return Outcome::Machine(End::Unhandled(exit.kind())),
                exit => match self.handler.handle(id, exit) {
                    Flow::Continue => {}
                    Flow::Stop => return Outcome::Machine(End::Handler),
                    Flow::End(end) => return Outcome::Machine(end),
                },
            }
        }
    }

    /// Ends the machine: the first cause counts, and every vCPU is brought out of the guest.
    fn finish(&self, by: Option<VcpuId>, end: End) {
        self.lock().cause.get_or_insert((by, end));
        self.state.ending.store(true, Ordering::SeqCst);
        self.stopper.kick_all_but(by);
        self.state.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // No panic happens under the lock, so a poisoned lock holds sound data.
        self.state
            .shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
