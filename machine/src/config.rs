//! The configuration of a machine.

use std::fmt;

use kvm_ops::guest::GuestProgram;
use kvm_ops::{EncParams, Irqchip, Kind, Tech};

use crate::{GuestRam, Image, LaunchStep};

/// The code that the machine runs.
#[non_exhaustive]
#[derive(Default)]
pub enum Payload {
    /// Nothing: the embedder fills the memory and the registers itself.
    #[default]
    None,
    /// An image, which vCPU 0 starts.
    Image(Image),
    /// Guest programs, one for each vCPU from vCPU 0 on, for a software platform.
    Programs(Vec<Box<dyn GuestProgram>>),
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Image(image) => f.debug_tuple("Image").field(image).finish(),
            Self::Programs(programs) => f.debug_tuple("Programs").field(&programs.len()).finish(),
        }
    }
}

/// The configuration of a machine.
///
/// ```
/// use kvm_ops_machine::{Image, MachineConfig};
/// let hlt = Image::flat("hlt", vec![0xf4]);
/// let config = MachineConfig::new().memory(1 << 20).image(hlt);
/// ```
#[derive(Debug)]
pub struct MachineConfig {
    pub(crate) kind: Kind,
    pub(crate) vcpus: u32,
    pub(crate) memory: u64,
    pub(crate) ram: Option<GuestRam>,
    pub(crate) irqchip: Option<Irqchip>,
    pub(crate) log_dirty: bool,
    pub(crate) enc: EncParams,
    pub(crate) launch: Vec<LaunchStep>,
    #[cfg(feature = "tdx")]
    pub(crate) launch_order: kvm_ops_tdvf::Order,
    pub(crate) awaits_guest: bool,
    pub(crate) payload: Payload,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl MachineConfig {
    /// The memory of a machine for which none is stated: 128 MiB.
    pub const DEFAULT_MEMORY: u64 = 128 << 20;

    /// A normal VM with one vCPU, [`DEFAULT_MEMORY`](Self::DEFAULT_MEMORY) and no payload.
    pub const fn new() -> Self {
        Self {
            kind: Kind::Normal,
            vcpus: 1,
            memory: Self::DEFAULT_MEMORY,
            ram: None,
            irqchip: None,
            log_dirty: false,
            enc: EncParams::Default,
            launch: Vec::new(),
            #[cfg(feature = "tdx")]
            launch_order: kvm_ops_tdvf::Order::SinglePass,
            awaits_guest: false,
            payload: Payload::None,
        }
    }

    /// Sets the kind of VM.
    pub const fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// Sets the number of vCPUs.
    pub const fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Bytes of RAM: a multiple of 4 KiB, up to 1 TiB. From 2.75 GiB on, what exceeds 2 GiB lies behind
    /// 4 GiB, as on QEMU's Q35.
    pub const fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// The embedder's own memory, in place of memory that the machine maps; see
    /// [`GuestRam::from_regions`] for an example.
    pub fn guest_ram(mut self, ram: GuestRam) -> Self {
        self.ram = Some(ram);
        self
    }

    /// Sets the place of the interrupt controllers. By default firmware and kernels get
    /// [`Irqchip::Full`], because they wait for timers (a kernel is a bzImage, or an ELF image with
    /// a command line or an initrd), but firmware of a TD gets [`Irqchip::Split`], and all else gets
    /// [`Irqchip::None`], with which HLT ends a vCPU.
    pub const fn irqchip(mut self, irqchip: Irqchip) -> Self {
        self.irqchip = Some(irqchip);
        self
    }

    /// Records the pages that the guest writes, for
    /// [`Machine::dirty_frames`](crate::Machine::dirty_frames).
    pub const fn log_dirty(mut self, log: bool) -> Self {
        self.log_dirty = log;
        self
    }

    /// Sets the parameters that only a confidential VM has.
    pub fn enc(mut self, enc: EncParams) -> Self {
        self.enc = enc;
        self
    }

    /// The measured start of a confidential VM, in this order. A page below 4 GiB but above the RAM
    /// gets memory there, which reaches up to 4 GiB, as firmware has it.
    ///
    /// ```
    /// use kvm_ops::{Gpa, Kind, Tech, Vendor, sim::SimHost};
    /// use kvm_ops_machine::{LaunchPage, Machine, MachineConfig};
    ///
    /// let measure = |byte| {
    ///     let page = LaunchPage::measured(Gpa::new(0x1000), Box::new([byte; 4096]));
    ///     let config = MachineConfig::new().kind(Kind::Of(Tech::SevSnp)).memory(1 << 20);
    ///     let machine = Machine::build(&SimHost::new(Vendor::Amd), config.launch([page]))?;
    ///     Ok::<_, kvm_ops_machine::MachineError>(machine.vm().measurement()?)
    /// };
    /// assert_eq!(measure(1)?, measure(1)?);
    /// assert_ne!(measure(1)?, measure(2)?);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn launch<S: Into<LaunchStep>>(mut self, steps: impl IntoIterator<Item = S>) -> Self {
        self.launch = steps.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the order in which the pages of a TD's firmware are added and measured. By default it is Linux's: page by
    /// page.
    #[cfg(feature = "tdx")]
    pub const fn launch_order(mut self, order: kvm_ops_tdvf::Order) -> Self {
        self.launch_order = order;
        self
    }

    /// Leaves the VM's start open: it waits for a guest that migrates to it, and is not finalised. The
    /// vCPUs of a TD come with it, so such a machine has none before. So do the pages of its image: give the image for
    /// the memory that it needs.
    pub const fn awaits_guest(mut self, awaits: bool) -> Self {
        self.awaits_guest = awaits;
        self
    }

    /// The code that it runs.
    pub fn payload(mut self, payload: Payload) -> Self {
        self.payload = payload;
        self
    }

    /// Runs an image.
    pub fn image(self, image: Image) -> Self {
        self.payload(Payload::Image(image))
    }

    /// Runs one more guest program, on the next vCPU. It replaces an image.
    ///
    /// ```
    /// use kvm_ops::{Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{Machine, MachineConfig};
    ///
    /// let config = MachineConfig::new().vcpus(2).program(Script::new()).program(Script::new());
    /// Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let too_many = MachineConfig::new().program(Script::new()).program(Script::new());
    /// let error = Machine::build(&SimHost::new(Vendor::Intel), too_many).unwrap_err();
    /// assert_eq!(error.hint(), Some("give the machine a vCPU for each program"));
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn program(mut self, program: impl GuestProgram + 'static) -> Self {
        let program: Box<dyn GuestProgram> = Box::new(program);
        match &mut self.payload {
            Payload::Programs(programs) => programs.push(program),
            payload => *payload = Payload::Programs(vec![program]),
        }
        self
    }

    /// The irqchip, stated or as the payload wants it.
    pub(crate) fn chosen_irqchip(&self, tech: Tech) -> Irqchip {
        self.irqchip.unwrap_or(match &self.payload {
            // The module keeps the local APICs of a TD, and the host has the rest.
            Payload::Image(image) if tech == Tech::Tdx && image.wants_timers() => Irqchip::Split,
            Payload::Image(image) if image.wants_timers() => Irqchip::Full,
            Payload::Image(_) => Irqchip::None,
            Payload::None | Payload::Programs(_) => Irqchip::None,
        })
    }
}
