//! Serves a program from a record, without a machine.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::any;
use kvm_ops_uapi::ioctl::KVM_RUN;

use super::format::{Call, Device, Machine, Record, RecordError, Step, Vendor, What};
use super::order::{self, HandOvers, Held};
use crate::refusal::Result;
use crate::{EventFd, File, FileKind, Process, RunArea};

/// The longest wait for another thread of the program, or for a signal that ends a run.
const PATIENCE: Duration = Duration::from_secs(60);

/// A record that serves a program in place of a kernel.
///
/// Calls are compared with those of the record, thread by thread, and are answered in the order of the record. At the first
/// that differs the player calls a function with a [`Mismatch`]; if that returns, this and all further calls are `EIO`.
///
/// ```
/// use kvm_ops_softkvm::{Device, Player, Task};
/// use kvm_ops_uapi::ioctl;
///
/// let record = "kvm-ops record 1\n\
///     machine amd 0 0 0 0\n\
///     thread 0 open /dev/kvm 0\n\
///     = file 0\n\
///     thread 0 ioctl 0 ae00 KVM_GET_API_VERSION 0\n\
///     = 12\n";
/// let player = Player::new(record, |mismatch| panic!("{mismatch}"))?;
/// let task = Task::new();
/// let kvm = task.open(player.open(Device::Kvm).expect("the first call"))?;
/// assert_eq!(task.ioctl(kvm, ioctl::KVM_GET_API_VERSION, 0)?, 12);
/// assert_eq!(player.progress(), (2, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Player(Arc<Inner>);

pub(super) struct Inner {
    pub(super) machine: Machine,
    pub(super) patience: Duration,
    pub(super) calls: Vec<Call>,
    /// Eventfds that the record's guest signals. The others need not be kept.
    pub(super) signalled: HashSet<u32>,
    pub(super) hand_overs: HandOvers,
    pub(super) state: Mutex<State>,
    pub(super) moved: Condvar,
    pub(super) stop: Box<dyn Fn(&Mismatch) + Send + Sync>,
}

#[derive(Default)]
pub(super) struct State {
    /// The first call that is not answered.
    pub(super) next: usize,
    /// The record's thread of each thread, and the calls of each of the record's that are left.
    pub(super) threads: HashMap<ThreadId, u32>,
    pub(super) left: HashMap<u32, std::vec::IntoIter<usize>>,
    pub(super) pages: HashMap<u32, Vec<u8>>,
    /// The run area of each VM's first vCPU.
    pub(super) first_areas: HashMap<u32, Arc<dyn RunArea>>,
    /// Addresses of slots, by the number of the call that set them, and their bytes.
    pub(super) slots: Vec<(u64, u64)>,
    pub(super) events: HashMap<u32, Arc<dyn EventFd>>,
    /// The next call of each thread when a clock told it something, and the first step of it that is left of each clock.
    pub(super) looks: HashMap<ThreadId, (usize, HashMap<i32, usize>)>,
    pub(super) held: HashMap<String, Held>,
    pub(super) stopped: bool,
}

/// The first call of a program that is not the record's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The number of the call in the record, from 0; that of the last one if there are no more.
    pub call: usize,
    /// The call's text in the record.
    pub expected: String,
    /// The difference.
    pub got: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            call,
            expected,
            got,
        } = self;
        write!(f, "call {call} of the record is `{expected}`: {got}")
    }
}

impl std::error::Error for Mismatch {}

/// A file that a player serves.
pub(crate) struct Played {
    pub(super) player: Player,
    pub(super) number: u32,
    pub(super) kind: FileKind,
    pub(super) gmem: Option<(u64, u64)>,
    pub(super) area: Option<Arc<dyn RunArea>>,
}

impl Played {
    pub(crate) const fn kind(&self) -> FileKind {
        self.kind
    }

    pub(crate) const fn guest_memfd(&self) -> Option<(u64, u64)> {
        self.gmem
    }

    pub(crate) const fn run_area(&self) -> Option<&Arc<dyn RunArea>> {
        self.area.as_ref()
    }

    pub(crate) fn ioctl(&self, process: &dyn Process, number: u32, argument: u64) -> Result<i64> {
        // Such files have no ioctls, and a record none of them.
        if matches!(self.kind, FileKind::GuestMemfd | FileKind::Stats) {
            return Err(any::KNOWN_ON_GMEM.into());
        }
        let inner = &self.player.0;
        if inner.lock().stopped {
            return Err(Errno::EIO.into());
        }
        match inner.answer(self, &self.player, process, (number, argument)) {
            Ok(answer) => answer,
            Err(mismatch) => {
                if number == KVM_RUN.number() && mismatch.call == inner.calls.len() {
                    // The run may be one that never ended, as of a vCPU that halts when the program exits.
                    inner.wait_for_the_end();
                }
                inner.stop(&mismatch);
                Err(Errno::EIO.into())
            }
        }
    }
}

impl Player {
    /// Reads a record. `stop` is called at the first call that differs.
    ///
    /// # Errors
    /// [`RecordError`] names the line that is not a record's.
    pub fn new(
        text: &str,
        stop: impl Fn(&Mismatch) + Send + Sync + 'static,
    ) -> Result<Self, RecordError> {
        Self::with_patience(text, PATIENCE, stop)
    }

    /// A player that waits no longer than that for another thread of the program, or for a signal that ends a run.
    ///
    /// # Errors
    /// As [`new`](Self::new), which waits for a minute.
    pub fn with_patience(
        text: &str,
        patience: Duration,
        stop: impl Fn(&Mismatch) + Send + Sync + 'static,
    ) -> Result<Self, RecordError> {
        let Record { machine, calls } = Record::parse(text)?;
        let mut of_threads: HashMap<u32, Vec<usize>> = HashMap::new();
        for (n, call) in calls.iter().enumerate() {
            of_threads.entry(call.thread).or_default().push(n);
        }
        let steps = calls.iter().flat_map(|call| &call.steps);
        let signalled = steps.filter_map(|step| match step {
            Step::Signal(event) => Some(*event),
            _ => None,
        });
        let signalled = signalled.collect();
        let left = of_threads.into_iter();
        let state = State {
            left: left
                .map(|(thread, calls)| (thread, calls.into_iter()))
                .collect(),
            ..State::default()
        };
        Ok(Self(Arc::new(Inner {
            machine,
            patience,
            hand_overs: order::hand_overs(&calls),
            calls,
            signalled,
            state: Mutex::new(state),
            moved: Condvar::new(),
            stop: Box::new(stop),
        })))
    }

    /// True for a record of an Intel machine.
    pub fn is_intel(&self) -> bool {
        self.0.machine.vendor == Vendor::Intel
    }

    /// What CPUID told of memory encryption (leaf 0x8000001f): EAX, EBX, ECX and EDX.
    pub fn encryption_leaf(&self) -> [u32; 4] {
        self.0.machine.encryption
    }

    /// The number of calls, and how many of them were made.
    pub fn progress(&self) -> (usize, usize) {
        (self.0.calls.len(), self.0.lock().next)
    }

    /// What a clock of this number told the program's thread at this point of the record: a time since the clock's zero. `None`
    /// for a thread that has not made a call yet, or that looks at the clock more often than the record's did.
    pub fn clock(&self, clock: i32) -> Option<Duration> {
        let mut state = self.0.lock();
        let own = std::thread::current().id();
        let part = state.threads.get(&own)?;
        let next = *state.left.get(part)?.as_slice().first()?;
        let looks = state.looks.entry(own).or_default();
        if looks.0 != next {
            *looks = (next, HashMap::new());
        }
        let from = looks.1.entry(clock).or_default();
        let steps = self.0.calls[next].steps.iter().enumerate();
        let mut told = steps.skip(*from).filter_map(|(n, step)| match step {
            Step::Clock(other, time) if *other == clock => Some((n, *time)),
            _ => None,
        });
        let (n, time) = told.next()?;
        *from = n + 1;
        Some(time)
    }

    /// Waits until it is the calling thread's turn to take a lock of the program. True if it is part of the record's order: then
    /// [`took_lock`](Self::took_lock) is to be called with the lock taken, and [`released_lock`](Self::released_lock) behind its
    /// release. A wait that takes too long is a difference.
    pub fn wait_for_lock(&self, lock: &str) -> bool {
        let waited = self.0.wait_for_lock(lock);
        waited.unwrap_or_else(|mismatch| {
            self.0.stop(&mismatch);
            false
        })
    }

    /// The calling thread has taken a lock.
    pub fn took_lock(&self, lock: &str) {
        self.0.took(lock);
    }

    /// A lock is free again.
    pub fn released_lock(&self, lock: &str) {
        self.0.released(lock);
    }

    /// True if the program comes no further without the calling thread, whose call or whose taking of a lock is the record's next:
    /// it should wait for nothing else.
    pub fn is_awaited(&self) -> bool {
        self.0.is_awaited()
    }

    /// Opens a device, as the record's program did. `None` where the machine had none.
    pub fn open(&self, device: Device) -> Option<File> {
        let inner = &self.0;
        if device == Device::Sev && self.is_intel() {
            return None;
        }
        let fits = |call: &Call| match call.what {
            What::Open(other, file) if other == device => Ok(file),
            _ => Err(format!("the program opens {device:?}")),
        };
        let opened = inner.claim(fits).and_then(|(n, file)| {
            inner.turn(n)?;
            inner.done(n);
            Ok(file)
        });
        match opened {
            Ok(number) => Some(File::played(Played {
                player: self.clone(),
                number,
                kind: match device {
                    Device::Kvm => FileKind::System,
                    Device::Sev => FileKind::Sev,
                },
                gmem: None,
                area: None,
            })),
            Err(mismatch) => {
                inner.stop(&mismatch);
                None
            }
        }
    }
}

impl Inner {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, mismatch: &Mismatch) {
        let first = !std::mem::replace(&mut self.lock().stopped, true);
        self.moved.notify_all();
        if first {
            (self.stop)(mismatch);
        }
    }

    pub(super) fn mismatch(&self, call: usize, got: String) -> Mismatch {
        let expected = self.calls.get(call).map_or_else(
            || "the end".to_owned(),
            |call| format!("thread {} {}", call.thread, call.what),
        );
        Mismatch {
            call,
            expected,
            got,
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_ops_uapi::irq::IoEventFd;
    use kvm_ops_uapi::{U32, ioctl};

    use super::*;
    use crate::Task;

    #[test]
    fn eventfds_that_the_guest_does_not_signal_are_not_kept() {
        let bind = |event: u32| {
            let ioctl = ioctl::KVM_IOEVENTFD.number();
            format!("thread 0 ioctl 0 {ioctl:x} KVM_IOEVENTFD 1\n event {event} 20\n= 0\n")
        };
        let run = "thread 0 ioctl 0 ae80 KVM_RUN 0\n signal 1\n= 0\n";
        let text = format!(
            "kvm-ops record 1\nmachine amd 0 0 0 0\nthread 0 open /dev/kvm 0\n= file 0\n{}{}{run}",
            bind(0),
            bind(1),
        );
        let player = Player::new(&text, |mismatch| panic!("{mismatch}")).unwrap();
        let task = Task::new();
        let kvm = task.open(player.open(Device::Kvm).unwrap()).unwrap();
        let events = [0; 2].map(|_| task.open_event().unwrap());
        for event in events {
            let args = IoEventFd {
                fd: U32::new(event as u32),
                ..IoEventFd::default()
            };
            task.call(kvm, ioctl::KVM_IOEVENTFD, &args).unwrap();
        }
        let kept: Vec<u32> = player.0.lock().events.keys().copied().collect();
        assert_eq!(kept, [1]);
        task.ioctl(kvm, ioctl::KVM_RUN, 0).unwrap();
        assert_eq!(
            events.map(|event| task.take_signals(event).unwrap()),
            [0, 1]
        );
    }
}
