//! The hosts of this build behind one trait, so that a fleet can use several.

use kvm_ops::sim::SimHost;
use kvm_ops::{
    AmdVm, AnyVm, FreeReport, Gpa, Host, Hpa, IntelVm, Irqchip, Kind, Measurement, Pfn, Result,
    Tech, Vendor, VmConfig, create,
};
use kvm_ops_machine::{
    ConsoleSink, Devices, ExitHandler, Inside, Machine, MachineConfig, MachineError, Q35,
    RunLimits, RunReport, Stopper,
};

use crate::args::HostChoice;
use crate::confidential::{Books, Firmware};
use crate::failure::Failure;
use crate::memory::Limits;
use crate::platform;

/// The reason why the program holds no confidential VM on `/dev/kvm`: what it measures of an image is for a launch on the
/// software platform.
const PLATFORM_ONLY: &str =
    "the program launches confidential VMs on the software platform; on /dev/kvm the library does";

/// A machine on any host.
pub(crate) trait AnyMachine: Send {
    /// See [`Machine::run`].
    fn run(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
    ) -> Result<RunReport, MachineError> {
        self.run_while(handler, limits, &mut |_| ())
    }
    /// See [`Machine::run_while`].
    fn run_while(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
        work: &mut dyn FnMut(&dyn Inside),
    ) -> Result<RunReport, MachineError>;
    /// See [`Machine::stopper`].
    fn stopper(&self) -> Stopper;
    /// See [`Machine::devices`].
    fn devices(&self, console: ConsoleSink) -> Devices;
    /// See [`Machine::q35`].
    fn q35(&self, console: ConsoleSink) -> Q35;
    /// See [`Machine::tech`].
    fn tech(&self) -> Tech;
    /// Reads guest memory from the host's side.
    fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError>;
    /// The launch measurement that the firmware holds.
    fn measurement(&self) -> Result<Measurement>;
    /// The context page of an SNP guest; `None` for any other VM.
    fn gctx(&self) -> Option<Pfn>;
    /// The TDR page of a TD; `None` for any other VM.
    fn tdr(&self) -> Option<Hpa>;
    /// See [`Machine::destroy`].
    fn destroy(self: Box<Self>) -> FreeReport;
}

impl<H: Host> AnyMachine for Machine<H> {
    fn run_while(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
        work: &mut dyn FnMut(&dyn Inside),
    ) -> Result<RunReport, MachineError> {
        let ran = Machine::run_while(self, handler, limits, |parts| work(parts));
        ran.map(|(report, ())| report)
    }

    fn stopper(&self) -> Stopper {
        Machine::stopper(self)
    }

    fn devices(&self, console: ConsoleSink) -> Devices {
        Machine::devices(self, console)
    }

    fn q35(&self, console: ConsoleSink) -> Q35 {
        Machine::q35(self, console)
    }

    fn tech(&self) -> Tech {
        Machine::tech(self)
    }

    fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), MachineError> {
        self.memory().read(gpa, data)
    }
    fn measurement(&self) -> Result<Measurement> {
        self.vm().measurement()
    }

    fn gctx(&self) -> Option<Pfn> {
        match self.vm().back_end() {
            AnyVm::Amd(AmdVm::Sev(guest)) => match guest.identity() {
                Some(kvm_ops::sev::Identity::Gctx(gctx)) => Some(gctx),
                _ => None,
            },
            _ => None,
        }
    }

    fn tdr(&self) -> Option<Hpa> {
        match self.vm().back_end() {
            AnyVm::Intel(IntelVm::Tdx(td)) => td.tdr(),
            _ => None,
        }
    }

    fn destroy(self: Box<Self>) -> FreeReport {
        Machine::destroy(*self)
    }
}

/// A host of any type.
pub(crate) trait AnyHost {
    /// See [`Host::name`].
    fn name(&self) -> &'static str;
    /// See [`Host::vendor`].
    fn vendor(&self) -> Vendor;
    /// Creates such a VM without memory and tears it down, to see if the host can hold it.
    fn try_create(&self, kind: Kind, vcpus: u32, irqchip: Irqchip) -> Result<()>;
    /// See [`Machine::build`].
    fn build(&self, config: MachineConfig) -> Result<Box<dyn AnyMachine>, MachineError>;
}

impl<H: Host> AnyHost for H {
    fn name(&self) -> &'static str {
        Host::name(self)
    }

    fn vendor(&self) -> Vendor {
        Host::vendor(self)
    }

    fn try_create(&self, kind: Kind, vcpus: u32, irqchip: Irqchip) -> Result<()> {
        let config = VmConfig::new(kind).vcpus(vcpus).irqchip(irqchip);
        let vm = create(self, &config)?;
        let report = vm.destroy();
        match report.leaks.first() {
            None => Ok(()),
            Some(leak) => Err(leak.error),
        }
    }

    fn build(&self, config: MachineConfig) -> Result<Box<dyn AnyMachine>, MachineError> {
        Ok(Box::new(Machine::build(self, config)?))
    }
}

/// A VM's requirement on its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// A processor, for machine code.
    Processor,
    /// Any host: the guest exists as machine code and as a guest program.
    Anything,
}

/// A VM to find a host for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) choice: HostChoice,
    pub(crate) needs: Needs,
    pub(crate) kind: Kind,
    pub(crate) vcpus: u32,
    /// Bytes of memory.
    pub(crate) memory: u64,
    pub(crate) irqchip: Irqchip,
}

/// A host and its properties.
pub(crate) struct Place {
    pub(crate) host: Box<dyn AnyHost>,
    /// The software platform, if the host is one: built-in guests are programs there.
    pub(crate) platform: Option<SimHost>,
}

impl Place {
    pub(crate) const fn is_platform(&self) -> bool {
        self.platform.is_some()
    }

    /// Checks that the host can hold the VM.
    fn holds(&self, wanted: &Wanted, limits: &Limits) -> Result<(), String> {
        let tech = wanted.kind.tech(self.host.vendor());
        let code = wanted.needs == Needs::Processor || !self.is_platform();
        limits.maps(wanted.memory)?;
        if !self.is_platform() {
            if tech.is_confidential() {
                return Err(PLATFORM_ONLY.into());
            }
            limits.addresses(wanted.memory)?;
        }
        // A machine with guest programs has no irqchip.
        let irqchip = if code { wanted.irqchip } else { Irqchip::None };
        self.host
            .try_create(wanted.kind, wanted.vcpus, irqchip)
            .map_err(|error| {
                let text = error.to_string();
                text.strip_prefix("not supported: ")
                    .unwrap_or(&text)
                    .to_owned()
            })
    }

    /// The counts of a firmware, if the host shows them.
    pub(crate) fn books(&self, firmware: Firmware) -> Option<Books> {
        Books::of(self.platform.as_ref()?, firmware)
    }
}

/// Every host of this build on this machine.
pub(crate) struct Hosts {
    places: Vec<Place>,
    /// The reason why `/dev/kvm` is not available.
    no_kvm: Option<Failure>,
}

impl Hosts {
    /// Opens the hosts that `choice` allows. A failure is reported only when a VM needs that host. With `threads` the
    /// vCPUs of a VM execute at the same time on the software platform, too.
    pub(crate) fn open(choice: HostChoice, threads: bool) -> Self {
        let mut hosts = Self {
            places: Vec::new(),
            no_kvm: None,
        };
        if choice != HostChoice::Sim {
            match open_kvm() {
                Ok(host) => hosts.places.push(Place {
                    host,
                    platform: None,
                }),
                Err(failure) => hosts.no_kvm = Some(failure),
            }
        }
        hosts.places.extend(platforms(threads));
        hosts
    }

    /// Takes the reason why `/dev/kvm` could not be opened, if it was tried.
    pub(crate) fn take_no_kvm(&mut self) -> Option<Failure> {
        self.no_kvm.take()
    }

    /// The same reason, borrowed for a note.
    pub(crate) const fn no_kvm(&self) -> Option<&Failure> {
        self.no_kvm.as_ref()
    }

    fn platform_of(&self, vendor: Vendor) -> Option<&Place> {
        self.places
            .iter()
            .find(|place| place.is_platform() && place.host.vendor() == vendor)
    }

    /// Returns the first host that `choice` allows and that can hold the VM, or the reasons why
    /// none can.
    pub(crate) fn place(&self, wanted: &Wanted) -> Result<&Place, NoPlace> {
        let limits = Limits::of_system();
        let mut reasons = Vec::new();
        let mut hint = None;
        if wanted.choice != HostChoice::Sim
            && let Some(failure) = &self.no_kvm
        {
            reasons.push(failure.in_a_line());
            hint = failure.first_hint();
        }
        let allowed = |place: &&Place| match wanted.choice {
            HostChoice::Kvm => !place.is_platform(),
            HostChoice::Sim => place.is_platform(),
            HostChoice::Auto => true,
        };
        // Skip the other vendor's platform if the VM's own vendor has one: its refusal adds no
        // information.
        let foreign = |place: &&Place| match wanted.kind {
            Kind::Of(tech) if place.is_platform() => {
                let own = tech.vendor().and_then(|vendor| self.platform_of(vendor));
                tech.vendor() != Some(place.host.vendor()) && own.is_some()
            }
            _ => false,
        };
        for place in self.places.iter().filter(allowed).filter(|p| !foreign(p)) {
            match place.holds(wanted, &limits) {
                Ok(()) => return Ok(place),
                Err(why) => {
                    let (name, vendor) = (place.host.name(), place.host.vendor());
                    reasons.push(format!("{name} ({vendor}): {why}"));
                }
            }
        }
        Err(NoPlace { reasons, hint })
    }
}

/// The reasons why no host can hold a VM.
#[derive(Clone, Debug)]
pub(crate) struct NoPlace {
    /// The reason of each host.
    pub(crate) reasons: Vec<String>,
    /// Advice for the user.
    pub(crate) hint: Option<String>,
}

/// Opens `/dev/kvm`.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn open_kvm() -> Result<Box<dyn AnyHost>, Failure> {
    match kvm_ops::kvm::KvmHost::open() {
        Ok(host) => Ok(Box::new(host)),
        Err(error) => {
            let hint = error.hint();
            Err(Failure::because("/dev/kvm cannot be used", error).hint(hint))
        }
    }
}

/// Returns the reason why this build has no `/dev/kvm`.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn open_kvm() -> Result<Box<dyn AnyHost>, Failure> {
    Err(Failure::new("/dev/kvm exists on x86-64 Linux only")
        .hint("`--host sim` runs VMs on the software platform"))
}

/// One software platform for each vendor; see [`Hosts::open`].
pub(crate) fn platforms(threads: bool) -> Vec<Place> {
    let place = |platform: SimHost| Place {
        host: Box::new(platform.clone()),
        platform: Some(platform),
    };
    [platform::intel(threads), platform::amd(threads)]
        .map(place)
        .into()
}
