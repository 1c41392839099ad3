//! The run loop: a thread for each vCPU, and what each exit means.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ops::{Answer, Diagnosis, Error, Exit, Field, IoEvent, Tech, VcpuId, VcpuOps, VmId};

use crate::convert;
use crate::inside::Events;
use crate::traps::{self, Trap, Traps};
use crate::{
    End, ExitContext, ExitCounts, ExitHandler, Flow, GuestRam, Inside, MachineError, Position,
    RunReport, Stopper, VcpuReport,
};

/// The limits of a run. The default has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunLimits {
    /// The longest time, by the wall clock.
    pub deadline: Option<Duration>,
    /// The most exits that each vCPU may make. Kicks and signals, which are not the guest's, do not
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
    ///
    /// ```
    /// use kvm_ops::{Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{End, Machine, MachineConfig, RunLimits};
    ///
    /// let config = MachineConfig::new().program(Script::new().print(0x3f8, "four"));
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let devices = machine.devices(Default::default());
    /// let report = machine.run(&devices, RunLimits::none().max_exits(2))?;
    /// assert_eq!(report.end, End::ExitLimit);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub const fn max_exits(mut self, exits: u64) -> Self {
        self.max_exits = Some(exits);
        self
    }
}

/// The time between two tries of a vCPU that is busy.
const WAIT: Duration = Duration::from_micros(100);

/// Memory faults at one page, and nothing else in between, after which the vCPU counts as stuck: the
/// page's conversion succeeds, and the processor keeps it from the guest all the same.
const SAME_FAULTS: u32 = 1000;

/// The scope of a vCPU's shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShutdownScope {
    /// The machine's, as a triple fault resets a PC.
    Machine,
    /// Its own: each vCPU runs a program for itself.
    Vcpu,
}

/// One run.
pub(crate) struct Run<'a> {
    pub(crate) handler: &'a dyn ExitHandler,
    pub(crate) machine: &'a dyn Inside,
    pub(crate) events: &'a Events,
    /// The identity of the VM, and its explanations of errors.
    pub(crate) vm: &'a dyn Explains,
    pub(crate) limits: RunLimits,
    pub(crate) stopper: &'a Stopper,
    pub(crate) scope: ShutdownScope,
    /// `None` if no vCPU runs code that lies in memory.
    pub(crate) code: Option<Code<'a>>,
    pub(crate) state: State,
}

/// The code that lies in memory.
#[derive(Clone, Copy)]
pub(crate) struct Code<'a> {
    pub(crate) ram: &'a GuestRam,
    /// The handlers of a guest that has none.
    pub(crate) traps: Option<&'a Traps>,
}

/// The VM of a run, as the run's reports name it.
pub(crate) trait Explains: Sync {
    fn tech(&self) -> Tech;
    fn vm_id(&self) -> VmId;
    fn explain(&self, error: Error) -> Diagnosis;
}

/// The state that the threads of a run share.
#[derive(Default)]
pub(crate) struct State {
    /// Set after the cause, and read after every exit.
    ending: AtomicBool,
    shared: Mutex<Shared>,
    changed: Condvar,
}

#[derive(Default)]
struct Shared {
    /// The cause of the machine's end, with the vCPU unless it was the clock or a stopper.
    cause: Option<(Option<VcpuId>, End)>,
    /// Threads that have not ended.
    running: usize,
}

/// The end of one vCPU.
enum Outcome {
    /// For itself alone.
    Alone(End),
    /// And the machine with it.
    Machine(End),
    /// And the machine with it, for this reason.
    Fault(End, Diagnosis),
    /// Because the machine does.
    WithMachine,
}

impl Run<'_> {
    /// Runs the vCPUs whose flag is set, each on its own thread, does `work` meanwhile, and waits
    /// for all.
    pub(crate) fn go<V: VcpuOps, T>(
        &self,
        vcpus: &mut [V],
        runs: &[bool],
        work: impl FnOnce() -> T,
    ) -> Result<(RunReport, T), MachineError> {
        let start = Instant::now();
        self.events.begin();
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
            // The clock is watched beside the work, which may take longer than the deadline.
            scope.spawn(|| self.watch(start));
            let done = work();
            let reports: Vec<_> = threads
                .into_iter()
                .map(|(id, thread)| {
                    let Some(thread) = thread else {
                        return VcpuReport {
                            id,
                            exits: ExitCounts::default(),
                            instructions: None,
                            end: End::NotStarted,
                            position: None,
                            diagnosis: None,
                        };
                    };
                    thread.join().unwrap_or(VcpuReport {
                        id,
                        exits: ExitCounts::default(),
                        instructions: None,
                        end: End::Panicked,
                        position: None,
                        diagnosis: Some(self.diagnose(id, &End::Panicked)),
                    })
                })
                .collect();
            failed.map_or(Ok((reports, done)), Err)
        });
        self.stopper.clear();
        let (vcpus, done) = reports?;
        let cause = self.lock().cause.take().map(|(_, end)| end);
        let report = RunReport {
            tech: self.vm.tech(),
            vm: self.vm.vm_id(),
            end: cause
                .or_else(|| vcpus.first().map(|vcpu| vcpu.end.clone()))
                .unwrap_or(End::NotStarted),
            vcpus,
            elapsed: start.elapsed(),
        };
        Ok((report, done))
    }

    /// Waits until every thread ended, and ends the machine at the deadline. Then the threads of
    /// devices may end.
    fn watch(&self, start: Instant) {
        self.wait_for_end(start);
        self.events.end();
    }

    fn wait_for_end(&self, start: Instant) {
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
        let (technology, vm) = (self.vm.tech(), self.vm.vm_id().0);
        let _span = tracing::debug_span!("vcpu", %technology, vm, vcpu = id.0).entered();
        let mut exits = ExitCounts::default();
        let mut diagnosis = None;
        let before = vcpu.instructions();
        // A panic is the handler's; it ends this machine, and no other of the process.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.vcpu_loop(vcpu, &mut exits)))
            .unwrap_or(Outcome::Machine(End::Panicked));
        let end = match outcome {
            Outcome::Alone(end) => end,
            Outcome::Machine(end) => {
                self.finish(Some(id), end.clone());
                end
            }
            Outcome::Fault(end, why) => {
                diagnosis = Some(why);
                self.finish(Some(id), end.clone());
                end
            }
            Outcome::WithMachine => match &self.lock().cause {
                Some((Some(peer), _)) => End::Peer(*peer),
                Some((None, end)) => end.clone(),
                None => End::Stopped,
            },
        };
        let position = self.position(vcpu);
        let instructions = vcpu
            .instructions()
            .zip(before)
            .map(|(after, before)| after.wrapping_sub(before));
        if end.is_failure() {
            let why = diagnosis.get_or_insert_with(|| self.diagnose(id, &end));
            let exits = exits.total();
            tracing::error!(%technology, vm, vcpu = id.0, exits, %end, "{why}");
        } else if end == End::Left {
            let why = self.vm.explain(Error::Poisoned);
            tracing::info!(%technology, vm, vcpu = id.0, exits = exits.total(), "{why}");
        } else {
            tracing::debug!(%technology, vm, vcpu = id.0, exits = exits.total(), "{end}");
        }
        self.lock().running -= 1;
        self.state.changed.notify_all();
        VcpuReport {
            id,
            exits,
            instructions,
            end,
            position,
            diagnosis,
        }
    }

    /// The instruction at which a vCPU stands, if it runs any, or if that is a secret.
    fn position<V: VcpuOps>(&self, vcpu: &V) -> Option<kvm_ops::Result<Position>> {
        let Some(code) = self.code else {
            let protected = |error: &Error| matches!(error, Error::Protected(_));
            return vcpu.regs().err().filter(protected).map(Err);
        };
        let position = Position::of(vcpu, code.ram, code.traps);
        Some(position.map(|position| Position {
            // What the host would read of private memory is not what the guest runs.
            bytes: match self.confidential() {
                true => Vec::new(),
                false => position.bytes,
            },
            ..position
        }))
    }

    /// The reason of a failure, in full.
    fn diagnose(&self, vcpu: VcpuId, end: &End) -> Diagnosis {
        let bare = Diagnosis::new(self.vm.tech(), self.vm.vm_id()).on_vcpu(vcpu);
        match end {
            End::Failed(error) => {
                let why = self.vm.explain(*error);
                // A vCPU that another one's failure ended keeps that one's number.
                why.on_vcpu(why.vcpu.unwrap_or(vcpu))
            }
            // A TD's vCPU hands out the status word of an exit that it has no answer to.
            End::InternalError { suberror: 4, data } if self.vm.tech() == Tech::Tdx => {
                let status = data.first().copied().unwrap_or_default();
                self.vm.explain(Error::Firmware(status)).on_vcpu(vcpu)
            }
            End::MemoryFault { gpa, access } => bare
                .at(*gpa, *access)
                .because("no memory of the VM is there")
                .advise("give the VM memory there, or keep the guest inside of its memory"),
            End::InternalError { suberror: 1, .. } => bare
                .because("the platform can neither run nor emulate the instruction")
                .advise("look at the instruction bytes and at the guest's page tables"),
            End::InternalError { .. } => bare.because("the platform cannot go on with this guest"),
            End::FailEntry(_) => bare
                .because("the processor refused to enter the guest")
                .advise("check the control and segment registers of the vCPU"),
            End::TripleFault => bare
                .because("the processor could not call the guest's handler of an exception")
                .advise("look at the guest's interrupt table, stack and page tables"),
            End::Trap(_) => bare
                .because("the guest has no handler for what it ran into")
                .advise("look at the instruction where the vCPU stands"),
            End::Unhandled(_) => bare
                .because("the guest made an exit that no handler answers")
                .advise("answer it in the machine's exit handler"),
            End::Panicked => bare.because("the exit handler panicked"),
            _ => bare,
        }
    }

    fn vcpu_loop<V: VcpuOps>(&self, vcpu: &mut V, exits: &mut ExitCounts) -> Outcome {
        let mut made = 0;
        let (mut last, mut same) = (Exit::Interrupted, 0);
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
                // The vCPU waits, for example while its guest moves to another host.
                Err(error) if error.is_transient() => {
                    thread::sleep(WAIT);
                    continue;
                }
                Err(error) if self.vm.explain(error).gone => return Outcome::Machine(End::Left),
                Err(error) => return Outcome::Machine(End::Failed(error)),
            };
            exits.add(exit.kind());
            tracing::trace!(?exit, "exit");
            if exit == Exit::Interrupted {
                continue;
            }
            made += 1;
            same = if exit == last { same + 1 } else { 0 };
            last = exit;
            if let Exit::MemoryFault { gpa, access, .. } = exit
                && same >= SAME_FAULTS
            {
                let bare = Diagnosis::new(self.vm.tech(), self.vm.vm_id()).on_vcpu(vcpu.id());
                let why = bare
                    .at(gpa, access)
                    .because("the processor keeps the page from the guest")
                    .advise("look at the RMP entry of the page: it is not the guest's");
                return Outcome::Fault(End::MemoryFault { gpa, access }, why);
            }
            if let Some(outcome) = self.answer(vcpu, exit) {
                return outcome;
            }
        }
    }

    /// Answers an exit, or decides how the vCPU ends.
    fn answer<V: VcpuOps>(&self, vcpu: &mut V, exit: Exit) -> Option<Outcome> {
        if let Exit::IoOut { port, .. } = exit
            && port == traps::PORT
            && let Some(trap) = self.trap(vcpu)
        {
            return Some(Outcome::Machine(End::Trap(trap)));
        }
        match exit {
            Exit::Hlt => Some(Outcome::Alone(End::Halted)),
            Exit::Shutdown if self.scope == ShutdownScope::Vcpu => {
                Some(Outcome::Alone(End::Shutdown))
            }
            Exit::Shutdown if self.code.is_some() => Some(Outcome::Machine(End::TripleFault)),
            Exit::Shutdown => Some(Outcome::Machine(End::Shutdown)),
            Exit::SystemEvent { kind } => Some(Outcome::Machine(End::SystemEvent(kind))),
            Exit::FailEntry { reason, .. } => Some(Outcome::Machine(End::FailEntry(reason))),
            Exit::InternalError { suberror } => {
                let data = words(vcpu.exit_data());
                Some(Outcome::Machine(End::InternalError { suberror, data }))
            }
            Exit::MapGpaRange { gpa, pages, to } if self.confidential() => {
                let errno = convert::answer(self.machine, gpa, pages, to);
                answered(vcpu, Answer::Value(errno))
            }
            Exit::MemoryFault { gpa, bytes, access } if self.confidential() => {
                let error = convert::follow(self.machine, gpa, bytes, access).err()?;
                let end = End::MemoryFault { gpa, access };
                let why = match error {
                    Error::Invalid(Field::Gpa, _) => self.diagnose(vcpu.id(), &end),
                    _ => self
                        .vm
                        .explain(error)
                        .on_vcpu(vcpu.id())
                        .at(gpa, access)
                        .because("the page could not be converted to the kind that the guest used"),
                };
                Some(Outcome::Fault(end, why))
            }
            Exit::Unknown { .. } => Some(Outcome::Machine(End::Unhandled(exit.kind()))),
            exit if self.is_event(vcpu, exit) => None,
            exit => self.handle(vcpu, exit),
        }
    }

    /// Signals the event that a write is for, if there is one. A string of writes to a port is one
    /// only if each of them is.
    fn is_event<V: VcpuOps>(&self, vcpu: &mut V, exit: Exit) -> bool {
        let (at, size) = match exit {
            Exit::MmioWrite { gpa, len } => (IoEvent::Mmio(gpa), len),
            Exit::IoOut { port, size, .. } => (IoEvent::Port(port), size),
            _ => return false,
        };
        let mut writes = vcpu.exit_data().chunks(size.max(1).into()).peekable();
        writes.peek().is_some() && writes.all(|data| self.events.written(at, data))
    }

    /// The interrupt or exception that brought a vCPU into a handler of ours.
    fn trap<V: VcpuOps>(&self, vcpu: &V) -> Option<Trap> {
        let Code { ram, traps } = self.code?;
        let (regs, sregs) = (vcpu.regs().ok()?, vcpu.sregs().ok()?);
        let frame = traps?.frame(&regs, &sregs, ram)?;
        Some(frame.trap)
    }

    /// True if memory can be private: conversions are then answered here.
    fn confidential(&self) -> bool {
        self.vm.tech().is_confidential()
    }

    /// Asks the handler.
    fn handle<V: VcpuOps>(&self, vcpu: &mut V, exit: Exit) -> Option<Outcome> {
        let (id, time) = (vcpu.id(), vcpu.clock().map(Duration::from_nanos));
        let mut context = ExitContext::new(id, exit, vcpu.exit_data(), self.machine).at(time);
        let flow = self.handler.handle(&mut context);
        let answer = context.answered();
        match flow {
            Flow::Continue => answer.and_then(|answer| answered(vcpu, answer)),
            Flow::Stop => Some(Outcome::Machine(End::Handler)),
            Flow::End(end) => Some(Outcome::Machine(end)),
        }
    }

    /// Ends the machine: the first cause counts, and every vCPU is brought out of the guest.
    fn finish(&self, by: Option<VcpuId>, end: End) {
        self.lock().cause.get_or_insert((by, end));
        self.state.ending.store(true, Ordering::SeqCst);
        self.events.end();
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

/// Hands an answer to the vCPU; a refusal ends the machine.
fn answered<V: VcpuOps>(vcpu: &mut V, answer: Answer) -> Option<Outcome> {
    let refused = vcpu.answer(answer).err()?;
    Some(Outcome::Machine(End::Failed(refused)))
}

/// The 64-bit words of an exit's data.
fn words(data: &[u8]) -> Vec<u64> {
    data.chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().expect("chunks of 8 bytes")))
        .collect()
}
