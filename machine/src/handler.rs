//! The handler of exits, and the context that it works in.

use std::sync::Arc;
use std::time::Duration;

use kvm_ops::{
    Answer, Error, Exit, Gfn, Gpa, HostEvent, IoEvent, IoEventMatch, IrqEvent, Msi, Privacy,
    Result, VcpuId, not_offered,
};

use crate::{DeviceMemory, End, MachineError};

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
    time: Option<Duration>,
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
            time: None,
        }
    }

    /// The same at this time of the guest.
    pub(crate) const fn at(mut self, time: Option<Duration>) -> Self {
        self.time = time;
        self
    }

    /// The guest's time since its VM was created, for timers that it reads. `None` where the platform's
    /// time is the host's, as on `/dev/kvm` ([`VcpuOps::clock`](kvm_ops::VcpuOps::clock)).
    pub const fn time(&self) -> Option<Duration> {
        self.time
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
    /// ```
    /// use kvm_ops::{Answer, Exit};
    /// use kvm_ops_machine::{ExitContext, Flow};
    ///
    /// /// Answers each read of an MSR with a #GP.
    /// fn handle(exit: &mut ExitContext<'_>) -> Flow {
    ///     if let Exit::ReadMsr { .. } = exit.exit() {
    ///         exit.answer(Answer::InjectGp).expect("an answer to a read of an MSR");
    ///     }
    ///     Flow::Continue
    /// }
    /// # let _: &dyn kvm_ops_machine::ExitHandler = &handle;
    /// ```
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

/// The parts of a machine that a device may use: from the vCPU thread that brings an exit, and from
/// threads of its own.
///
/// [`ExitContext::machine`] hands it to a handler. [`Machine::run_while`](crate::Machine::run_while)
/// hands it to the threads of devices, for as long as the run, and
/// [`Machine::parts`](crate::Machine::parts) to whoever sets devices up before.
///
/// The same calls work on every host. Where the kernel does them without an exit (`KVM_IRQFD`,
/// `KVM_IOEVENTFD`) it does; elsewhere the run loop takes its place. All but [`memory`](Self::memory)
/// are refused by default, so that a test of a device implements what the device uses.
pub trait Inside: Send + Sync {
    /// The memory that the guest shares with its devices.
    fn memory(&self) -> DeviceMemory<'_>;

    /// The frames that the guest or a device wrote since the last call, of a machine built with
    /// [`log_dirty`](crate::MachineConfig::log_dirty).
    ///
    /// # Errors
    /// [`MachineError::Step`] without a dirty log, as in a confidential VM, or where the platform
    /// refuses; [`MachineError::Vm`] from an [`Inside`] that does not implement it.
    fn dirty_frames(&self) -> Result<Vec<Gfn>, MachineError> {
        Ok(not_offered!("dirty_frames")?)
    }

    /// Sends an interrupt to a vCPU's local APIC in the platform.
    ///
    /// # Errors
    /// As [`VmOps::deliver_interrupt`](kvm_ops::VmOps::deliver_interrupt).
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        let _ = (vcpu, vector);
        not_offered!("deliver_interrupt")
    }

    /// Sends an interrupt message, as a PCI device does. `true` if an APIC took it, `false` if the
    /// guest has it disabled.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without an irqchip in the platform
    /// ([`MachineConfig::irqchip`](crate::MachineConfig::irqchip)); outside of the kernel
    /// [`Error::Invalid`] with [`Field::Msi`](kvm_ops::Field::Msi) for a message that is no fixed
    /// interrupt to one vCPU, and the errors of [`deliver_interrupt`](Self::deliver_interrupt).
    fn signal_msi(&self, msi: Msi) -> Result<bool> {
        let _ = msi;
        not_offered!("signal_msi")
    }

    /// Makes an interrupt line send a message, as the vectors of MSI-X do. Without interrupt
    /// controllers that have pins (a split irqchip, a confidential VM) a line needs one.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without an irqchip in the platform; the answer of the system.
    fn set_gsi_route(&self, gsi: u32, msi: Msi) -> Result<()> {
        let _ = (gsi, msi);
        not_offered!("set_gsi_route")
    }

    /// Raises or lowers an interrupt line. A line that has a message for a route sends it when it
    /// rises.
    ///
    /// # Errors
    /// [`Error::NotOffered`] without an irqchip in the platform; [`Error::NotFound`] with
    /// [`Field::Gsi`](kvm_ops::Field::Gsi) for a line that leads nowhere.
    fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        let _ = (gsi, active);
        not_offered!("set_irq_line")
    }

    /// An event that raises and lowers an interrupt line (`KVM_IRQFD`), for one that may leave this
    /// process, or a device that interrupts often.
    ///
    /// # Errors
    /// As [`set_irq_line`](Self::set_irq_line).
    fn irq_event(&self, gsi: u32) -> Result<Box<dyn IrqEvent + '_>> {
        let _ = gsi;
        not_offered!("irq_event")
    }

    /// An event that writes of the guest signal, in place of an exit that the handler gets
    /// (`KVM_IOEVENTFD`). Dropping the last handle removes it. All are signalled when a run ends, so
    /// that threads that wait find out ([`is_ending`](Self::is_ending)).
    ///
    /// # Errors
    /// [`Error::Exists`], or [`Error::Sys`] with `EEXIST`, if there is one for the same writes.
    fn io_event(&self, at: IoEvent, matching: IoEventMatch) -> Result<Arc<dyn HostEvent>> {
        let _ = (at, matching);
        not_offered!("io_event")
    }

    /// Makes a vCPU leave the guest once. Does nothing for a vCPU that does not exist.
    fn kick(&self, vcpu: VcpuId) {
        let _ = vcpu;
    }

    /// Makes a range of memory private or shared.
    ///
    /// # Errors
    /// As [`VmOps::set_memory_attributes`](kvm_ops::VmOps::set_memory_attributes).
    fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) -> Result<()> {
        let _ = (gpa, pages, to);
        not_offered!("convert")
    }

    /// True once the run is over or about to be: a device's thread returns.
    fn is_ending(&self) -> bool {
        false
    }
}
