//! Who answers exits.

use crate::{Exit, VcpuId};

use super::End;

/// What happens after an exit was handled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The vCPU goes on.
    Continue,
    /// The machine ends, as [`End::Handler`].
    Stop,
    /// The machine ends like this.
    End(End),
}

/// Answers the exits of a machine's vCPUs, from all their threads.
///
/// It gets the exits that need an answer or have a meaning for devices: port and memory-mapped
/// I/O, page conversions, memory faults, hypercalls, MSRs, interrupt windows and debug events. The
/// run loop itself deals with the others (halt, shutdown, kicks, system events and failures).
pub trait ExitHandler: Send + Sync {
    /// Answers one exit: fills what it asks for, and says how to go on.
    fn handle(&self, vcpu: VcpuId, exit: Exit<'_>) -> Flow;
}

impl<F: Fn(VcpuId, Exit<'_>) -> Flow + Send + Sync> ExitHandler for F {
    fn handle(&self, vcpu: VcpuId, exit: Exit<'_>) -> Flow {
        self(vcpu, exit)
    }
}
