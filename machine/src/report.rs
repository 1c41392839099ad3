//! The report of a run: the end of each vCPU, and its exits by kind.

use std::fmt;
use std::time::Duration;

use kvm_ops::{Diagnosis, Error, ExitKind, Gpa, Privacy, Tech, VcpuId, VmId};

use crate::{Position, Trap};

/// The end of the run of a vCPU, or of the whole machine.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// A guest program shut down.
    Shutdown,
    /// A triple fault: the processor could not call the guest's handler of an exception. Some guests
    /// reset a PC so.
    TripleFault,
    /// The guest ran into an interrupt or exception for which it has no handler. Told for images that
    /// start without firmware.
    Trap(Trap),
    /// The guest halted, and no interrupt can wake it: there is no irqchip in the platform.
    Halted,
    /// The guest asked for a reset, through the keyboard controller or port 0xcf9.
    Reset,
    /// The guest switched the machine off, through power management's port (0x604).
    PowerOff,
    /// The guest wrote this value to the debug-exit port (0xf4 or 0x501).
    DebugExit(u32),
    /// `KVM_EXIT_SYSTEM_EVENT` of this type.
    SystemEvent(u32),
    /// The guest left the VM and goes on elsewhere: on another host, or in another VM of this one.
    Left,
    /// The [`ExitHandler`](crate::ExitHandler) said stop.
    Handler,
    /// A [`Stopper`](crate::Stopper) was used.
    Stopped,
    /// The run took as long as [`RunLimits`](crate::RunLimits) allow.
    Deadline,
    /// The vCPU made as many exits as [`RunLimits`](crate::RunLimits) allow.
    ExitLimit,
    /// That vCPU ended the machine, and this one with it.
    Peer(VcpuId),
    /// The vCPU has nothing to run: no program, and no irqchip through which another could start
    /// it.
    NotStarted,
    /// An exit that the handler has no answer to.
    Unhandled(ExitKind),
    /// The guest touched memory in a way that the VM cannot serve.
    MemoryFault {
        /// The address.
        gpa: Gpa,
        /// The kind of memory that the guest took it for.
        access: Privacy,
    },
    /// The processor refused to enter the guest, for this reason.
    FailEntry(u64),
    /// The platform cannot run or emulate what the guest does.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// The words that came with it: for an emulation failure the instruction bytes, if known.
        data: Vec<u64>,
    },
    /// An operation on the vCPU failed.
    Failed(Error),
    /// The handler panicked.
    Panicked,
}

impl End {
    /// True if the guest or the platform went wrong.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::TripleFault
            | Self::Trap(_)
            | Self::Unhandled(_)
            | Self::MemoryFault { .. }
            | Self::FailEntry(_)
            | Self::InternalError { .. }
            | Self::Failed(_)
            | Self::Panicked => true,
            Self::Shutdown
            | Self::Halted
            | Self::Reset
            | Self::PowerOff
            | Self::DebugExit(_)
            | Self::SystemEvent(_)
            | Self::Left
            | Self::Handler
            | Self::Stopped
            | Self::Deadline
            | Self::ExitLimit
            | Self::Peer(_)
            | Self::NotStarted => false,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("shut down"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Trap(trap) => trap.fmt(f),
            Self::Halted => f.write_str("halted"),
            Self::Reset => f.write_str("asked for a reset"),
            Self::PowerOff => f.write_str("switched off"),
            Self::DebugExit(value) => write!(f, "ended by debug exit {value:#x}"),
            Self::SystemEvent(kind) => write!(f, "system event {kind:#x}"),
            Self::Left => f.write_str("the guest left"),
            Self::Handler => f.write_str("stopped by the exit handler"),
            Self::Stopped => f.write_str("stopped"),
            Self::Deadline => f.write_str("stopped at the deadline"),
            Self::ExitLimit => f.write_str("stopped at the limit of exits"),
            Self::Peer(vcpu) => write!(f, "ended with vCPU {vcpu}"),
            Self::NotStarted => f.write_str("not started"),
            Self::Unhandled(kind) => write!(f, "{} exit without an answer", kind.name()),
            Self::MemoryFault { gpa, access } => {
                write!(f, "memory fault: {gpa} touched as {access} memory")
            }
            Self::FailEntry(reason) => write!(f, "entry refused with reason {reason:#x}"),
            Self::InternalError { suberror, data } => {
                // KVM_INTERNAL_ERROR_EMULATION
                let meaning = match suberror {
                    1 => " (it can neither run nor emulate an instruction)",
                    _ => "",
                };
                write!(f, "internal error {suberror:#x} of the platform{meaning}")?;
                data.iter().try_for_each(|word| write!(f, " {word:#x}"))
            }
            Self::Failed(error) => error.fmt(f),
            Self::Panicked => f.write_str("the exit handler panicked"),
        }
    }
}

/// The number of exits of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts([u64; ExitKind::ALL.len()]);

impl ExitCounts {
    /// Exits of that kind.
    pub const fn of(&self, kind: ExitKind) -> u64 {
        self.0[kind as usize]
    }

    /// All exits.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The kinds that occurred, with their number.
    pub fn iter(&self) -> impl Iterator<Item = (ExitKind, u64)> + '_ {
        ExitKind::ALL
            .into_iter()
            .map(|kind| (kind, self.of(kind)))
            .filter(|(_, count)| *count != 0)
    }

    /// Counts one exit.
    pub(crate) fn add(&mut self, kind: ExitKind) {
        self.0[kind as usize] += 1;
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (sum, n) in self.0.iter_mut().zip(other.0) {
            *sum += n;
        }
        self
    }
}

/// The report of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuReport {
    /// The number of the vCPU.
    pub id: VcpuId,
    /// Its exits.
    pub exits: ExitCounts,
    /// Instructions of machine code that it executed in this run; `None` where the platform counts none.
    pub instructions: Option<u64>,
    /// Its end.
    pub end: End,
    /// The instruction at which it stands: for a failure the one that failed, for INT3 and INT n the
    /// next. `None` for a vCPU that was not started or runs a guest program;
    /// [`Error::Protected`] where registers are the guest's secret.
    pub position: Option<kvm_ops::Result<Position>>,
    /// The reason of an end that is a failure, in full: technology, VM, vCPU, address and access,
    /// firmware call and status by name, and what to do.
    pub diagnosis: Option<Diagnosis>,
}

/// The report of a run. It prints as its end: in full if that is a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunReport {
    /// The technology of the VM.
    pub tech: Tech,
    /// The VM.
    pub vm: VmId,
    /// Each vCPU, by number.
    pub vcpus: Vec<VcpuReport>,
    /// The end of the machine as a whole: that of the vCPU, the limit or the stopper did that ended it;
    /// or, where each vCPU ended for itself, as the last one in order of numbers did.
    pub end: End,
    /// The time that it took.
    pub elapsed: Duration,
}

impl RunReport {
    /// The exits of all vCPUs.
    pub fn exits(&self) -> ExitCounts {
        self.vcpus
            .iter()
            .fold(ExitCounts::default(), |sum, vcpu| sum.plus(&vcpu.exits))
    }

    /// The instructions of all vCPUs; `None` where the platform counts none.
    pub fn instructions(&self) -> Option<u64> {
        self.vcpus
            .iter()
            .filter_map(|vcpu| vcpu.instructions)
            .reduce(u64::wrapping_add)
    }

    /// The reason of the failure that ended the machine; without such a failure, that of the first vCPU
    /// that failed for itself. `None` if none failed.
    pub fn diagnosis(&self) -> Option<&Diagnosis> {
        let failed = || self.vcpus.iter().filter(|vcpu| vcpu.diagnosis.is_some());
        let cause = failed().find(|vcpu| vcpu.end == self.end);
        cause.or_else(|| failed().next())?.diagnosis.as_ref()
    }

    /// True if any vCPU ended in a failure.
    pub fn is_failure(&self) -> bool {
        self.end.is_failure() || self.vcpus.iter().any(|vcpu| vcpu.end.is_failure())
    }
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.diagnosis() {
            // Such an end is the error alone, which the diagnosis has.
            Some(diagnosis) if matches!(self.end, End::Failed(_)) => diagnosis.fmt(f),
            Some(diagnosis) => write!(f, "{}: {diagnosis}", self.end),
            None => write!(f, "{} VM {}: {}", self.tech, self.vm, self.end),
        }
    }
}
