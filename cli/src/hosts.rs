//! The hosts of this build behind one face, so that a fleet can hold VMs of several.

use kvm_ops::machine::{
    ConsoleSink, Devices, ExitHandler, Machine, MachineConfig, MachineError, RunLimits, RunReport,
    Stopper,
};
use kvm_ops::{
    Error, FreeReport, Gpa, Host, Hpa, Irqchip, Kind, Missing, Result, SeamPort, SeamRegs, Tech,
    Vendor, VmConfig, create,
};

use crate::args::HostChoice;
#[cfg(all(feature = "sim", feature = "sev"))]
use crate::confidential::Told;
use crate::confidential::{Books, Firmware};
use crate::failure::Failure;

/// Why an image cannot run everywhere.
pub(crate) const NO_MACHINE_CODE: &str =
    "the software platform runs guest programs, not machine code";

/// A machine on any host.
pub(crate) trait AnyMachine: Send {
    /// See [`Machine::run`].
    fn run(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
    ) -> Result<RunReport, MachineError>;
    /// See [`Machine::stopper`].
    fn stopper(&self) -> Stopper;
    /// See [`Machine::devices`].
    fn devices(&self, console: ConsoleSink) -> Devices;
    /// See [`Machine::tech`].
    fn tech(&self) -> Tech;
    /// Reads what the host sees at a guest address.
    #[cfg_attr(not(feature = "tdx"), allow(dead_code))] // Only a TD's start is looked at so far.
    fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError>;
    /// What is known of the launch of an SEV guest; `None` of any other VM.
    #[cfg(all(feature = "sim", feature = "sev"))]
    fn sev(&self) -> Option<Told>;
    /// Where the TDR of a TD lies; `None` of any other VM.
    fn tdr(&self) -> Option<Hpa>;
    /// See [`Machine::destroy`].
    fn destroy(self: Box<Self>) -> Result<FreeReport, MachineError>;
}

impl<H: Host> AnyMachine for Machine<H> {
    fn run(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
    ) -> Result<RunReport, MachineError> {
        Machine::run(self, handler, limits)
    }

    fn stopper(&self) -> Stopper {
        Machine::stopper(self)
    }

    fn devices(&self, console: ConsoleSink) -> Devices {
        Machine::devices(self, console)
    }

    fn tech(&self) -> Tech {
        Machine::tech(self)
    }

    fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError> {
        self.memory().read(gpa, data)
    }

    #[cfg(all(feature = "sim", feature = "sev"))]
    fn sev(&self) -> Option<Told> {
        match self.vm().back_end() {
            kvm_ops::AnyVm::Amd(kvm_ops::AmdVm::Sev(guest)) => Some(Told {
                measurement: guest.measurement(),
                gctx: match guest.identity() {
                    Some(kvm_ops::sev::Identity::Gctx(gctx)) => Some(gctx),
                    _ => None,
                },
            }),
            #[allow(unreachable_patterns)] // A build with SEV alone has nothing else.
            _ => None,
        }
    }

    fn tdr(&self) -> Option<Hpa> {
        match self.vm().back_end() {
            #[cfg(feature = "tdx")]
            kvm_ops::AnyVm::Intel(kvm_ops::IntelVm::Tdx(td)) => td.tdr(),
            #[allow(unreachable_patterns)] // A build with TDX alone has nothing else.
            _ => None,
        }
    }

    fn destroy(self: Box<Self>) -> Result<FreeReport, MachineError> {
        Machine::destroy(*self)
    }
}

/// A host of any type.
pub(crate) trait AnyHost {
    /// See [`Host::name`].
    fn name(&self) -> &'static str;
    /// See [`Host::vendor`].
    fn vendor(&self) -> Vendor;
    /// Whether it can hold such a VM: creates one without memory, and tears it down.
    fn try_create(&self, kind: Kind, vcpus: u32, irqchip: Irqchip) -> Result<()>;
    /// See [`Machine::build`].
    fn build(&self, config: MachineConfig) -> Result<Box<dyn AnyMachine>, MachineError>;
    /// MRTD of the TD with that TDR, as the TDX module tells it.
    fn mrtd(&self, tdr: Hpa) -> Result<[u8; 48]>;
}

/// TDH.MNG.RD.
const MNG_RD: u64 = 11;
/// The first of the six fields of TDCS that hold MRTD.
const MRTD: u64 = 0x1310_0003_0000_0000;

impl<H: Host> AnyHost for H {
    fn name(&self) -> &'static str {
        Host::name(self)
    }

    fn vendor(&self) -> Vendor {
        Host::vendor(self)
    }

    fn try_create(&self, kind: Kind, vcpus: u32, irqchip: Irqchip) -> Result<()> {
        let config = VmConfig::new(kind).vcpus(vcpus).irqchip(irqchip);
        create(self, &config).map(|vm| drop(vm.destroy()))
    }

    fn build(&self, config: MachineConfig) -> Result<Box<dyn AnyMachine>, MachineError> {
        Ok(Box::new(Machine::build(self, config)?))
    }

    fn mrtd(&self, tdr: Hpa) -> Result<[u8; 48]> {
        let seam = Host::seam(self).ok_or(Error::Unsupported(Missing::HostTech(Tech::Tdx)))?;
        let mut mrtd = [0; 48];
        for (field, bytes) in (MRTD..).zip(mrtd.chunks_exact_mut(8)) {
            let mut regs = SeamRegs {
                rcx: tdr.get(),
                rdx: field,
                ..SeamRegs::default()
            };
            let status = seam.seamcall(seam.this_cpu(), MNG_RD, &mut regs)?;
            if status != 0 {
                return Err(Error::Firmware(status));
            }
            bytes.copy_from_slice(&regs.r8.to_le_bytes());
        }
        Ok(mrtd)
    }
}

/// What a VM needs of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// A processor: it runs machine code.
    Processor,
    /// Either: it has machine code and a guest program.
    Anything,
}

/// A host, and how guests come to it.
pub(crate) struct Place {
    /// The host.
    pub(crate) host: Box<dyn AnyHost>,
    /// Whether it runs machine code, and not guest programs.
    pub(crate) processor: bool,
    /// The software platform that it is, if it is one.
    #[cfg(feature = "sim")]
    pub(crate) platform: Option<kvm_ops::sim::SimHost>,
}

impl Place {
    /// The books of a firmware, where it has one that keeps any.
    #[cfg(feature = "sim")]
    pub(crate) fn books(&self, firmware: Firmware) -> Option<Books> {
        Books::of(self.platform.as_ref()?, firmware)
    }

    /// None: what is below `/dev/kvm` shows no books.
    #[cfg(not(feature = "sim"))]
    pub(crate) fn books(&self, _: Firmware) -> Option<Books> {
        None
    }
}

/// Every host that this build and this machine have.
pub(crate) struct Hosts {
    places: Vec<Place>,
    /// Why there is no `/dev/kvm`.
    no_kvm: Option<Failure>,
}

impl Hosts {
    /// Opens what `choice` allows. A host that cannot be opened is only told when a VM asks for it.
    ///
    /// # Errors
    /// Where there is no host at all.
    pub(crate) fn open(choice: HostChoice) -> Result<Self, Failure> {
        let mut hosts = Self {
            places: Vec::new(),
            no_kvm: None,
        };
        if choice != HostChoice::Sim {
            match open_kvm() {
                Ok(host) => hosts.places.push(Place {
                    host,
                    processor: true,
                    #[cfg(feature = "sim")]
                    platform: None,
                }),
                Err(failure) => hosts.no_kvm = Some(failure),
            }
        }
        hosts.places.extend(platforms());
        if hosts.places.is_empty() {
            let failure = Failure::new("this build has no software platform (cargo feature `sim`)");
            return Err(hosts.take_no_kvm().unwrap_or(failure));
        }
        Ok(hosts)
    }

    /// Why `/dev/kvm` cannot be used, if `open` tried and it cannot.
    pub(crate) fn take_no_kvm(&mut self) -> Option<Failure> {
        self.no_kvm.take()
    }

    /// The same, for a note.
    pub(crate) const fn no_kvm(&self) -> Option<&Failure> {
        self.no_kvm.as_ref()
    }

    fn platform_of(&self, vendor: Vendor) -> Option<&Place> {
        self.places
            .iter()
            .find(|place| !place.processor && place.host.vendor() == vendor)
    }

    /// The first host that `choice` allows and that can hold the VM, or why there is none.
    pub(crate) fn place(
        &self,
        choice: HostChoice,
        needs: Needs,
        kind: Kind,
        vcpus: u32,
        irqchip: Irqchip,
    ) -> Result<&Place, NoPlace> {
        if needs == Needs::Processor && choice == HostChoice::Sim {
            return Err(NoPlace::no_processor());
        }
        let mut reasons = Vec::new();
        let mut hint = None;
        if choice != HostChoice::Sim {
            if let Some(failure) = &self.no_kvm {
                reasons.push(failure.in_a_line());
                hint = failure.first_hint();
            }
        }
        let allowed = |place: &&Place| match choice {
            HostChoice::Kvm => place.processor,
            HostChoice::Sim => !place.processor,
            HostChoice::Auto => place.processor || needs == Needs::Anything,
        };
        // The other vendor's platform has nothing to say where its own is there.
        let foreign = |place: &&Place| match kind {
            Kind::Of(tech) if !place.processor => {
                tech.vendor() != place.host.vendor() && self.platform_of(tech.vendor()).is_some()
            }
            _ => false,
        };
        for place in self.places.iter().filter(allowed).filter(|p| !foreign(p)) {
            // A machine with guest programs takes no irqchip, as they need none.
            let irqchip = if place.processor {
                irqchip
            } else {
                Irqchip::None
            };
            match place.host.try_create(kind, vcpus, irqchip) {
                Ok(()) => return Ok(place),
                Err(error) => {
                    let (name, vendor) = (place.host.name(), place.host.vendor());
                    let why = match error {
                        Error::Unsupported(missing) => missing.to_string(),
                        error => error.to_string(),
                    };
                    reasons.push(format!("{name} ({vendor}): {why}"));
                }
            }
        }
        if choice != HostChoice::Kvm && needs == Needs::Anything && platforms().is_empty() {
            reasons.push("this build has no software platform (cargo feature `sim`)".into());
        }
        if needs == Needs::Processor && choice == HostChoice::Auto {
            reasons.push(NO_MACHINE_CODE.into());
        }
        Err(NoPlace { reasons, hint })
    }
}

/// Why no host can hold a VM.
#[derive(Clone, Debug)]
pub(crate) struct NoPlace {
    /// What each host said.
    pub(crate) reasons: Vec<String>,
    /// What to do about it.
    pub(crate) hint: Option<String>,
}

impl NoPlace {
    /// Of an image, on the software platform.
    pub(crate) fn no_processor() -> Self {
        Self {
            reasons: vec![NO_MACHINE_CODE.into()],
            hint: Some("run images on /dev/kvm (`--host kvm`), built-in payloads anywhere".into()),
        }
    }
}

/// Opens `/dev/kvm`.
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
fn open_kvm() -> Result<Box<dyn AnyHost>, Failure> {
    match kvm_ops::kvm::KvmHost::open() {
        Ok(host) => Ok(Box::new(host)),
        Err(error) => {
            let hint = error.hint();
            Err(Failure::because("/dev/kvm cannot be used", error).hint(hint))
        }
    }
}

/// Says why there is none to open.
#[cfg(not(all(feature = "kvm", target_os = "linux", target_arch = "x86_64")))]
fn open_kvm() -> Result<Box<dyn AnyHost>, Failure> {
    let why = if cfg!(feature = "kvm") {
        "/dev/kvm exists on x86-64 Linux only"
    } else {
        "this build cannot use /dev/kvm (cargo feature `kvm`)"
    };
    let hint = if cfg!(feature = "sim") {
        "`--host sim` runs built-in payloads on the software platform"
    } else {
        "the cargo feature `sim` brings a software platform along"
    };
    Err(Failure::new(why).hint(hint))
}

/// A software platform of each vendor whose normal VMs this build has.
#[cfg(feature = "sim")]
pub(crate) fn platforms() -> Vec<Place> {
    let mut vendors = Vec::new();
    if cfg!(any(feature = "vmx", feature = "tdx")) {
        vendors.push(Vendor::Intel);
    }
    if cfg!(any(feature = "svm", feature = "sev")) {
        vendors.push(Vendor::Amd);
    }
    let place = |vendor| {
        let platform = kvm_ops::sim::SimHost::new(vendor);
        Place {
            host: Box::new(platform.clone()),
            processor: false,
            platform: Some(platform),
        }
    };
    vendors.into_iter().map(place).collect()
}

/// None.
#[cfg(not(feature = "sim"))]
pub(crate) fn platforms() -> Vec<Place> {
    Vec::new()
}
