//! The handler of exits, and the context that it works in.

use kvm_ops::{Answer, Error, Exit, Gpa, Privacy, Result, VcpuId};

use crate::{End, GuestRam};

/// The decision of a handler about an exit.
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
/// run loop itself handles the others (halt, shutdown, kicks, system events and failures).
///
/// ```
/// use kvm_ops::{Exit, Gpa};
/// use kvm_ops_machine::{ExitContext, Flow};
///
/// /// A device that copies the byte at 0x1000 to the guest on a read of port 0x10.
/// fn handle(exit: &mut ExitContext<'_>) -> Flow {
///     if let Exit::IoIn { port: 0x10, .. } = exit.exit() {
///         let mut byte = [0];
///         if exit.machine().memory().read(Gpa::new(0x1000), &mut byte).is_ok() {
///             exit.data().fill(byte[0]);
///         }
///     }
///     Flow::Continue
/// }
/// # let _: &dyn kvm_ops_machine::ExitHandler = &handle;
/// ```
pub trait ExitHandler: Send + Sync {
    /// Answers one exit, and decides how to go on.
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow;
}

impl<F: Fn(&mut ExitContext<'_>) -> Flow + Send + Sync> ExitHandler for F {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        self(exit)
    }
}

/// One exit, with the data and the machine that a handler works on.
pub struct ExitContext<'a> {
    vcpu: VcpuId,
    exit: Exit,
    data: &'a mut [u8],
    answer: Option<Answer>,
    machine: &'a dyn Inside,
}

impl<'a> ExitContext<'a> {
    /// The context of an exit. The run loop makes it; a test of a handler makes one with an
    /// [`Inside`] of its own.
    pub fn new(vcpu: VcpuId, exit: Exit, data: &'a mut [u8], machine: &'a dyn Inside) -> Self {
        Self {
            vcpu,
            exit,
            data,
            answer: None,
            machine,
        }
    }

    /// The vCPU that exited.
    pub const fn vcpu(&self) -> VcpuId {
        self.vcpu
    }

    /// The exit.
    pub const fn exit(&self) -> Exit {
        self.exit
    }

    /// The bytes that the guest writes, or the buffer to fill for a read
    /// ([`VcpuOps::exit_data`](kvm_ops::VcpuOps::exit_data)).
    pub fn data(&mut self) -> &mut [u8] {
        self.data
    }

    /// Answers the exit.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an answer that does not fit the exit; nothing is answered then.
    pub fn answer(&mut self, answer: Answer) -> Result<()> {
        let kind = self.exit.kind();
        if !answer.fits(kind) {
            return Err(Error::Invalid(kvm_ops::Field::Answer, kind as u64));
        }
        self.answer = Some(answer);
        Ok(())
    }

    /// The answer given so far.
    pub const fn answered(&self) -> Option<Answer> {
        self.answer
    }

    /// The machine around the vCPU.
    pub fn machine(&self) -> &'a dyn Inside {
        self.machine
    }
}

/// The parts of a running machine that a device may use, from any vCPU's thread.
pub trait Inside: Send + Sync {
    /// The memory that the guest shares with its devices.
    fn memory(&self) -> &GuestRam;

    /// Sends an interrupt to a vCPU's local APIC in the platform.
    ///
    /// # Errors
    /// As [`VmOps::deliver_interrupt`](kvm_ops::VmOps::deliver_interrupt).
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()>;

    /// Makes a vCPU leave the guest once. Does nothing for a vCPU that does not exist.
    fn kick(&self, vcpu: VcpuId);

    /// Makes a range of memory private or shared.
    ///
    /// # Errors
    /// As [`VmOps::set_memory_attributes`](kvm_ops::VmOps::set_memory_attributes).
    fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) -> Result<()>;
}
