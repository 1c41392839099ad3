//! The machine: built in steps that are undone in reverse, run, and given back.

use std::fmt;
use std::mem;

use kvm_ops::guest::GuestProgram;
use kvm_ops::{
    AnyVcpu, AnyVm, EncCmd, FreeReport, Gfn, Host, IrqEvent, Irqchip, Leak, Leaked, MemSlot, Tech,
    VcpuId, VcpuOps, Vm, VmConfig, VmOps, create,
};

#[cfg(feature = "sev")]
use kvm_ops::InitialPageKind;

use crate::cpus::{self, span_of};
use crate::inside::Wiring;
use crate::launch::{LaunchStep, bytes_below_4_gib};
use crate::run::ShutdownScope;
use crate::traps::Traps;
use crate::{
    ConsoleSink, Cpus, Devices, ExitHandler, GuestRam, Image, MachineConfig, MachineError, Parts,
    Payload, Q35, RunLimits, RunReport, Stopper, load, start,
};

/// A VM with its memory and vCPUs, ready to run.
///
/// Dropping it gives everything back, as [`destroy`](Self::destroy) does, but only logs what
/// leaked.
pub struct Machine<H: Host> {
    /// `None` only once `tear_down` took it, which ends the machine.
    vm: Option<Vm<AnyVm<H>>>,
    vcpus: Vec<AnyVcpu<H>>,
    /// True for each vCPU that has something to run.
    runs: Vec<bool>,
    /// The slots that were lent to the VM.
    slots: Vec<MemSlot>,
    ram: Option<GuestRam>,
    stopper: Stopper,
    scope: ShutdownScope,
    irqchip: Irqchip,
    wiring: Wiring,
    /// The handlers of a guest that has none.
    traps: Option<Traps>,
    /// True if vCPUs run code that lies in memory.
    runs_code: bool,
    /// The image, for what firmware starts of it.
    image: Option<Image>,
}

impl<H: Host> Machine<H> {
    /// Builds a machine: the VM, its memory with the image in it, and its vCPUs.
    ///
    /// ```
    /// use kvm_ops::{Vendor, sim::SimHost};
    /// use kvm_ops_machine::{Machine, MachineConfig};
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let machine = Machine::build(&host, MachineConfig::new().memory(1 << 20))?;
    /// assert_eq!(machine.memory().size(), 1 << 20);
    ///
    /// let odd = Machine::build(&host, MachineConfig::new().memory(0x1001)).unwrap_err();
    /// assert_eq!(odd.to_string(), "memory of 0x1001 bytes is not a multiple of 4 KiB");
    /// assert_eq!(odd.hint(), Some("use a multiple of 4 KiB between 4 KiB and 1 TiB"));
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    ///
    /// # Errors
    /// A [`MachineError`] that names the step or the value. What was built so far is undone.
    pub fn build(host: &H, config: MachineConfig) -> Result<Self, MachineError> {
        if let Payload::Programs(programs) = &config.payload
            && programs.len() as u64 > u64::from(config.vcpus)
        {
            return Err(MachineError::TooManyPrograms {
                programs: programs.len(),
                vcpus: config.vcpus,
            });
        }
        let tech = config.kind.tech(host.vendor());
        let confidential = tech.is_confidential();
        let irqchip = config.chosen_irqchip(tech);
        let rom = match &config.payload {
            Payload::Image(image) if confidential => {
                load::measured::rom_bytes(image, tech, config.vcpus)?
                    .max(bytes_below_4_gib(&config.launch))
            }
            Payload::Image(image) if !host.runs().machine_code() => {
                let (name, host) = (image.name.clone(), host.name());
                return Err(MachineError::NeedsProcessor { name, host });
            }
            Payload::Image(image) => load::rom_bytes(image)?,
            Payload::None | Payload::Programs(_) => bytes_below_4_gib(&config.launch),
        };
        let vm_config = VmConfig::new(config.kind)
            .vcpus(config.vcpus)
            .irqchip(irqchip)
            .enc(config.enc);
        let vm = create(host, &vm_config).map_err(MachineError::Create)?;
        let span = span_of(&vm);
        let _entered = span.enter();
        // From here on the value undoes what it holds when a step fails.
        let mut machine = Self {
            vm: Some(vm),
            vcpus: Vec::new(),
            runs: Vec::new(),
            slots: Vec::new(),
            ram: None,
            stopper: Stopper::new(Vec::new()),
            scope: ShutdownScope::Machine,
            irqchip,
            wiring: Wiring::default(),
            traps: None,
            runs_code: host.runs().machine_code()
                && (!confidential || matches!(config.payload, Payload::Image(_))),
            image: None,
        };
        let ram = match config.ram {
            Some(ram) => ram.with_rom(rom, confidential)?,
            None => GuestRam::new(config.memory, rom, confidential)?,
        };
        let mut launch = config.launch;
        #[cfg(feature = "sev")]
        let given = launch.len();
        let mut guest = None;
        // A TD comes with its vCPUs, and with the pages of its image.
        let comes = config.awaits_guest && tech == Tech::Tdx;
        let first = match &config.payload {
            Payload::Image(_) if comes => None,
            // Such a guest does not start with what the host writes into memory.
            Payload::Image(image) if confidential => {
                let mask = machine.vm().shared_mask();
                let steps = match tech {
                    Tech::Tdx => load::td::start(
                        image,
                        &ram,
                        mask,
                        config.vcpus,
                        #[cfg(feature = "tdx")]
                        config.launch_order,
                    )?,
                    _ => {
                        let mut start = load::sev::start(
                            image,
                            &ram,
                            mask,
                            tech,
                            #[cfg(feature = "sev")]
                            config.vcpus,
                        )?;
                        let steps = mem::take(&mut start.steps);
                        guest = Some(start);
                        steps
                    }
                };
                launch.splice(0..0, steps);
                None
            }
            Payload::Image(image) => {
                load::describe(image, &ram, config.vcpus, irqchip)?;
                let start = load::load(image, &ram)?;
                machine.traps = load::catch(image, &ram, &start)?;
                Some(start)
            }
            Payload::None | Payload::Programs(_) => None,
        };
        machine.lend(ram, config.log_dirty)?;
        if !comes {
            machine.create_vcpus(config.vcpus, irqchip)?;
        }
        #[cfg(feature = "sev")]
        if guest.is_some() && tech == Tech::SevSnp {
            // The steps of the image come first.
            let own = launch.len() - given;
            machine.fill_cpuid(&mut launch[..own])?;
        }
        match config.payload {
            Payload::None => {}
            Payload::Image(image) => {
                for n in 0..machine.vcpus.len() {
                    if let Some(guest) = &guest {
                        let vcpu = &mut machine.vcpus[n];
                        let (id, registers) = (vcpu.id(), guest.registers(vcpu.id()));
                        let set = start::set_measured(vcpu, &registers);
                        machine.on_vcpu("set the registers", id, set)?;
                    }
                }
                if let (Some(first), Some(vcpu)) = (first, machine.vcpus.first_mut()) {
                    let set = start::set(vcpu, &first);
                    machine.on_vcpu("set the registers", VcpuId(0), set)?;
                }
                machine.image = Some(image);
            }
            Payload::Programs(programs) => machine.load_programs(programs)?,
        }
        for launched in &launch {
            let vm = machine.own_vm();
            let (step, done) = match launched {
                LaunchStep::Add(page) => {
                    let done = vm.add_initial_page(&page.as_initial());
                    ("add a page to the measured start", done)
                }
                LaunchStep::Measure(gpa) => {
                    let done = vm.measure_initial_page(*gpa);
                    ("measure a page of the start", done)
                }
            };
            machine.step(step, done)?;
        }
        if !config.awaits_guest {
            machine.finalize()?;
        }
        Ok(machine)
    }

    fn lend(&mut self, mut ram: GuestRam, log_dirty: bool) -> Result<(), MachineError> {
        if log_dirty {
            ram.log_writes();
        }
        let slots = ram.slots(log_dirty);
        // Before the first slot: from then on the memory must stay.
        self.ram = Some(ram);
        for slot in slots {
            let set = self.own_vm().set_memory_slot(slot);
            self.step("set a memory slot", set)?;
            self.slots.push(slot);
        }
        Ok(())
    }

    fn create_vcpus(&mut self, vcpus: u32, irqchip: Irqchip) -> Result<(), MachineError> {
        for id in (0..vcpus).map(VcpuId) {
            let vcpu = self.on_vcpu("create the state", id, self.vm().create_vcpu(id))?;
            self.vcpus.push(vcpu);
        }
        // The first vCPU runs. The others wait for INIT and SIPI where the platform has local
        // APICs to send them, inside of `vcpu_run`; without, nothing could ever start them.
        self.runs = (0..vcpus)
            .map(|id| id == 0 || irqchip != Irqchip::None)
            .collect();
        self.stopper = Stopper::new(self.vcpus.iter().map(VcpuOps::kick_handle).collect());
        Ok(())
    }

    /// Fills the CPUID pages of a launch with the answers of the first vCPU.
    #[cfg(feature = "sev")]
    fn fill_cpuid(&self, launch: &mut [LaunchStep]) -> Result<(), MachineError> {
        let Some(vcpu) = self.vcpus.first() else {
            return Ok(());
        };
        let page = load::cpuid::page(vcpu);
        let page = self.on_vcpu("read the CPUID", vcpu.id(), page)?;
        for step in launch {
            if let LaunchStep::Add(added) = step
                && added.kind == InitialPageKind::Cpuid
            {
                added.contents.clone_from(&page);
            }
        }
        Ok(())
    }

    fn load_programs(&mut self, programs: Vec<Box<dyn GuestProgram>>) -> Result<(), MachineError> {
        self.runs.fill(false);
        for (id, program) in (0..).map(VcpuId).zip(programs) {
            self.load_program(id, program)?;
        }
        Ok(())
    }

    /// Gives a guest program to a vCPU, which takes part in the next run then.
    ///
    /// ```
    /// use kvm_ops::{VcpuId, Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{End, Machine, MachineConfig, RunLimits};
    ///
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Amd), MachineConfig::new())?;
    /// let devices = machine.devices(Default::default());
    /// for port in [0x80, 0x81] {
    ///     let program = Script::new().output(port, &[1]);
    ///     machine.load_program(VcpuId(0), Box::new(program))?;
    ///     assert_eq!(machine.run(&devices, RunLimits::none())?.end, End::Shutdown);
    /// }
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    ///
    /// # Errors
    /// [`MachineError::Vcpu`] if there is no such vCPU, or the host runs no programs.
    pub fn load_program(
        &mut self,
        id: VcpuId,
        program: Box<dyn GuestProgram>,
    ) -> Result<(), MachineError> {
        self.split().1.load_program(id, program)
    }

    /// Runs the machine until it ends, on one thread for each vCPU that has something to run; all
    /// of them have ended when it returns. It may be run again, and goes on from where it was.
    ///
    /// ```
    /// use kvm_ops::{Exit, ExitKind, Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{End, ExitContext, Flow, Machine, MachineConfig, RunLimits};
    ///
    /// let program = Script::new().input(0x10, 1).output(0x80, &[7]);
    /// let config = MachineConfig::new().program(program);
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    ///
    /// let handler = |exit: &mut ExitContext<'_>| match exit.exit() {
    ///     Exit::IoIn { port: 0x10, .. } => {
    ///         exit.data().fill(42);
    ///         Flow::Continue
    ///     }
    ///     Exit::IoOut { port: 0x80, .. } => Flow::Stop,
    ///     _ => Flow::Continue,
    /// };
    /// let report = machine.run(&handler, RunLimits::none())?;
    /// assert_eq!(report.end, End::Handler);
    /// assert_eq!(report.exits().of(ExitKind::IoIn), 1);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    ///
    /// # Errors
    /// [`MachineError::Thread`] if the system gives no thread. The end of the guest, failures of
    /// vCPUs included, is in the report.
    pub fn run(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
    ) -> Result<RunReport, MachineError> {
        self.run_while(handler, limits, |_| ())
            .map(|(report, ())| report)
    }

    /// Runs the machine as [`run`](Self::run) does, and calls `work` on this thread meanwhile, with
    /// the machine as devices see it: the place for their threads. The run goes on until the guest
    /// ends, also after `work` returned; use a [`stopper`](Self::stopper) to end it.
    ///
    /// ```
    /// use std::sync::Mutex;
    ///
    /// use kvm_ops::guest::Script;
    /// use kvm_ops::{Gpa, IoEvent, IoEventMatch, Vendor, sim::SimHost};
    /// use kvm_ops_machine::{Inside, Machine, MachineConfig, RunLimits};
    ///
    /// // The guest puts a text into memory and rings a bell. A thread reads it.
    /// let program = Script::new().write(Gpa::new(0x1000), b"ready").output(0x80, &[1]);
    /// let config = MachineConfig::new().memory(1 << 20).program(program);
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let bell = machine.parts().io_event(IoEvent::Port(0x80), IoEventMatch::U8(1))?;
    /// let devices = machine.devices(Default::default());
    /// let (report, text) = machine.run_while(&devices, RunLimits::none(), |parts| {
    ///     bell.wait()?;
    ///     let mut text = [0; 5];
    ///     parts.memory().read(Gpa::new(0x1000), &mut text).map(|()| text)
    /// })?;
    /// assert_eq!(&text?, b"ready");
    /// assert_eq!(report.exits().of(kvm_ops::ExitKind::IoOut), 1);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_while<T>(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
        work: impl FnOnce(&Parts<'_, H>) -> T,
    ) -> Result<(RunReport, T), MachineError> {
        self.split().1.run_while(handler, limits, work)
    }

    /// Takes the machine apart: its VM, and its vCPUs, which run while something else uses the VM.
    ///
    /// ```
    /// use kvm_ops::{Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{ConsoleSink, Machine, MachineConfig, RunLimits};
    ///
    /// let config = MachineConfig::new().memory(1 << 20).program(Script::new().print(0x3f8, "beside"));
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let console = ConsoleSink::capture();
    /// let devices = machine.devices(console.clone());
    /// let (vm, mut cpus) = machine.split();
    /// std::thread::scope(|scope| {
    ///     let running = scope.spawn(move || cpus.run(&devices, RunLimits::none()));
    ///     assert!(vm.slots().count() > 0);
    ///     running.join().unwrap()
    /// })?;
    /// assert_eq!(console.text(), "beside");
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn split(&mut self) -> (&Vm<AnyVm<H>>, Cpus<'_, H>) {
        let vm = self.vm.as_ref().expect(WHOLE);
        let cpus = Cpus {
            vm,
            ram: self.ram.as_ref().expect(WHOLE),
            slots: &self.slots,
            wiring: &self.wiring,
            irqchip: self.irqchip,
            traps: self.traps.as_ref(),
            vcpus: &mut self.vcpus,
            runs: &mut self.runs,
            stopper: &mut self.stopper,
            scope: &mut self.scope,
            runs_code: &mut self.runs_code,
        };
        (vm, cpus)
    }

    /// The machine as its devices see it, while it does not run: to set up events and routes.
    pub fn parts(&self) -> Parts<'_, H> {
        Parts {
            vm: self.vm(),
            ram: self.memory(),
            slots: &self.slots,
            stopper: &self.stopper,
            wiring: &self.wiring,
            irqchip: self.irqchip,
        }
    }

    /// Closes the initial contents of a machine that was built to await its guest
    /// ([`MachineConfig::awaits_guest`]), so that it may run.
    ///
    /// # Errors
    /// [`MachineError::Step`] if the VM refuses.
    pub fn finalize(&mut self) -> Result<(), MachineError> {
        let finalised = self.own_vm().finalize();
        self.step("finalise the VM", finalised)
    }

    /// Runs a command of the technology on the VM.
    ///
    /// # Errors
    /// As [`Vm::mem_enc_op`].
    pub fn mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> kvm_ops::Result<()> {
        self.own_vm().mem_enc_op(cmd)
    }

    /// Moves the guest of this machine to `destination`, which was built to await it
    /// ([`MachineConfig::awaits_guest`]) and whose memory must be this machine's, or whose VM has no slots
    /// ([`Vm::move_to`]). Neither machine runs meanwhile. The guest program of a TD, SEV-ES or SNP guest
    /// goes on there.
    ///
    /// ```
    /// use kvm_ops::{Kind, Tech, Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{ConsoleSink, Machine, MachineConfig, RunLimits};
    ///
    /// let host = SimHost::new(Vendor::Intel);
    /// let config = || MachineConfig::new().kind(Kind::Of(Tech::Tdx)).memory(1 << 20);
    /// let guest = Script::new().print(0x3f8, "here").print(0x3f8, " and there");
    /// let mut from = Machine::build(&host, config().program(guest))?;
    /// let mut to = Machine::build(&host, config().awaits_guest(true))?;
    ///
    /// let console = ConsoleSink::capture();
    /// from.run(&from.devices(console.clone()), RunLimits::none().max_exits(4))?;
    /// assert_eq!(console.text(), "here");
    /// from.move_to(&mut to)?;
    /// to.run(&to.devices(console.clone()), RunLimits::none())?;
    /// assert_eq!(console.text(), "here and there");
    /// assert!(from.destroy().is_clean() && to.destroy().is_clean());
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Vm::move_to`]. After an error both are as they were.
    pub fn move_to(&mut self, destination: &mut Self) -> kvm_ops::Result<()> {
        let to = destination.vm.as_mut().expect(WHOLE);
        self.vm.as_mut().expect(WHOLE).move_to(to)?;
        if destination.vcpus.is_empty() {
            destination.split().1.take(self.vcpus.len() as u32)?;
        }
        if destination.vm().tech() != Tech::Sev {
            destination.runs.clone_from(&self.runs);
            destination.scope = self.scope;
            destination.runs_code = self.runs_code;
        }
        Ok(())
    }

    /// Takes the vCPUs that came with a TD from another host, to a machine that was built for it
    /// ([`TdParams::arrives`](kvm_ops::TdParams::arrives)). None has something to run before
    /// [`load_program`](Self::load_program) or [`enable_vcpu`](Self::enable_vcpu).
    ///
    /// # Errors
    /// [`Error::Exists`](kvm_ops::Error::Exists) if the machine has its vCPUs; what the VM answers to
    /// [`create_vcpu`](Vm::create_vcpu), such as for a TD that has not come. What was taken so far
    /// stays, and is given back with the machine.
    pub fn take_arrived_vcpus(&mut self, vcpus: u32) -> kvm_ops::Result<()> {
        self.split().1.take_arrived_vcpus(vcpus)
    }

    /// Stops runs from other threads.
    ///
    /// ```
    /// use kvm_ops::{Vendor, guest::{Action, FnProgram, Outcome}, sim::SimHost};
    /// use kvm_ops_machine::{End, Machine, MachineConfig, RunLimits};
    ///
    /// let endless = FnProgram(|_: Outcome<'_>| Action::Out { port: 0x80, data: &[0] });
    /// let config = MachineConfig::new().program(endless);
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let (stopper, devices) = (machine.stopper(), machine.devices(Default::default()));
    /// std::thread::spawn(move || stopper.stop());
    /// assert_eq!(machine.run(&devices, RunLimits::none())?.end, End::Stopped);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The devices of a PC that this machine's guests may want, with their console. With all interrupt
    /// controllers in the platform ([`Irqchip::Full`]) the serial line interrupts.
    ///
    /// ```
    /// use kvm_ops::{Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{ConsoleSink, Machine, MachineConfig, RunLimits};
    ///
    /// let config = MachineConfig::new().program(Script::new().print(0x3f8, "hi"));
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let console = ConsoleSink::capture();
    /// machine.run(&machine.devices(console.clone()), RunLimits::none())?;
    /// assert_eq!(console.text(), "hi");
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn devices(&self, console: ConsoleSink) -> Devices {
        let vcpus = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        let ram = self.memory().size();
        let Some(line) = self.serial_line() else {
            return Devices::new(ram, vcpus, console);
        };
        Devices::with_serial_interrupt(ram, vcpus, console, move || {
            if let Err(error) = line.signal() {
                tracing::warn!(%error, "the serial line did not interrupt");
            }
        })
    }

    /// The devices of a Q35, for firmware, and for a kernel with [`Image::acpi`]: those of [`devices`](Self::devices), and what OVMF and the Linux that it starts
    /// look for. The configuration device has the kernel, command line and initrd of the machine's image
    /// ([`Image::kernel`]). Make one for each run: firmware changes them.
    ///
    /// ```
    /// use kvm_ops::{Gpa, Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{ConsoleSink, End, Machine, MachineConfig, RunLimits};
    ///
    /// let program = Script::new().print(0x3f8, "off").output(0x604, &[0, 0x20]);
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), MachineConfig::new().program(program))?;
    /// let console = ConsoleSink::capture();
    /// let report = machine.run(&machine.q35(console.clone()), RunLimits::none())?;
    /// assert_eq!((console.text().as_str(), report.end), ("off", End::PowerOff));
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn q35(&self, console: ConsoleSink) -> Q35 {
        let vcpus = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        let in_platform = self.irqchip == Irqchip::Full;
        let devices = in_platform.then(|| self.devices(console.clone()));
        Q35::new(
            self.memory(),
            vcpus,
            self.image.as_ref(),
            self.irqchip,
            console,
            devices,
        )
    }

    /// The interrupt of the serial line, where interrupt controllers with pins are in the platform.
    fn serial_line(&self) -> Option<Box<dyn IrqEvent>> {
        let port = self.vm().back_end().devices();
        let port = port.filter(|_| self.irqchip == Irqchip::Full)?;
        match port.irq_event(Devices::SERIAL_LINE) {
            Ok(line) => Some(line),
            Err(error) => {
                tracing::warn!(%error, "the serial line has no interrupt");
                None
            }
        }
    }

    /// The memory.
    pub fn memory(&self) -> &GuestRam {
        self.ram.as_ref().expect(WHOLE)
    }

    /// The VM.
    ///
    /// The VMs of two machines cannot be swapped, because each lends its own memory:
    ///
    /// ```compile_fail,E0596
    /// # use kvm_ops::Host;
    /// # use kvm_ops_machine::Machine;
    /// fn swap<H: Host>(a: &mut Machine<H>, b: &mut Machine<H>) {
    ///     std::mem::swap(&mut *a.vm(), &mut *b.vm());
    /// }
    /// ```
    pub fn vm(&self) -> &Vm<AnyVm<H>> {
        self.vm.as_ref().expect(WHOLE)
    }

    fn own_vm(&mut self) -> &mut Vm<AnyVm<H>> {
        self.vm.as_mut().expect(WHOLE)
    }

    /// The error of a step that concerns the whole VM, as the VM explains it.
    fn step<T>(&self, step: &'static str, done: kvm_ops::Result<T>) -> Result<T, MachineError> {
        done.map_err(|error| {
            let source = Box::new(self.vm().explain(error));
            MachineError::Step { step, source }
        })
    }

    /// The error of a step that concerns one vCPU, as the VM explains it.
    fn on_vcpu<T>(
        &self,
        step: &'static str,
        vcpu: VcpuId,
        done: kvm_ops::Result<T>,
    ) -> Result<T, MachineError> {
        cpus::on_vcpu(self.vm(), step, vcpu, done)
    }

    /// The technology that holds it.
    pub fn tech(&self) -> Tech {
        self.vm().tech()
    }

    /// A vCPU, to read its registers while it does not run.
    pub fn vcpu(&self, id: VcpuId) -> Option<&AnyVcpu<H>> {
        self.vcpus.get(id.0 as usize)
    }

    /// A vCPU, to set its registers while it does not run.
    ///
    /// vCPUs of two machines cannot be swapped:
    ///
    /// ```compile_fail,E0277
    /// # use kvm_ops::{Host, VcpuId};
    /// # use kvm_ops_machine::Machine;
    /// fn swap<H: Host>(a: &mut Machine<H>, b: &mut Machine<H>) {
    ///     let (a, b) = (a.vcpu_mut(VcpuId(0)).unwrap(), b.vcpu_mut(VcpuId(0)).unwrap());
    ///     std::mem::swap(a, b);
    /// }
    /// ```
    pub fn vcpu_mut(&mut self, id: VcpuId) -> Option<&mut dyn VcpuOps> {
        let vcpu = self.vcpus.get_mut(id.0 as usize)?;
        Some(vcpu)
    }

    /// Lets a vCPU take part in the next run, though it got no program and nothing wakes it: the
    /// embedder has set its registers. Returns false if there is no such vCPU.
    pub fn enable_vcpu(&mut self, id: VcpuId) -> bool {
        self.runs
            .get_mut(id.0 as usize)
            .map(|runs| *runs = true)
            .is_some()
    }

    /// The frames that the guest or a device wrote since the last call, of a machine built with
    /// [`log_dirty`](MachineConfig::log_dirty). Writes by [`memory`](Self::memory) count too.
    ///
    /// ```
    /// use kvm_ops::{Gfn, Gpa, Vendor, guest::Script, sim::SimHost};
    /// use kvm_ops_machine::{Machine, MachineConfig, RunLimits};
    ///
    /// let program = Script::new().write(Gpa::new(0x5000), b"guest");
    /// let config = MachineConfig::new().memory(1 << 20).log_dirty(true).program(program);
    /// let mut machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// machine.run(&machine.devices(Default::default()), RunLimits::none())?;
    /// machine.memory().write(Gpa::new(0x9000), b"host")?;
    /// assert_eq!(machine.dirty_frames()?, [Gfn::new(5), Gfn::new(9)]);
    /// assert_eq!(machine.dirty_frames()?, []);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    ///
    /// # Errors
    /// [`MachineError::Step`] without a dirty log, or where the platform refuses.
    pub fn dirty_frames(&self) -> Result<Vec<Gfn>, MachineError> {
        self.parts().written_frames()
    }

    /// Gives everything back: vCPUs, slots, the VM, and at last the memory.
    ///
    /// The report lists leaks. If a slot could not be deleted or the VM not be closed, the memory is
    /// leaked too, because a guest may still write it.
    ///
    /// ```
    /// use kvm_ops::{Kind, Tech, Vendor, sim::SimHost};
    /// use kvm_ops_machine::{Machine, MachineConfig};
    ///
    /// let config = MachineConfig::new().kind(Kind::Of(Tech::Tdx)).memory(1 << 20);
    /// let machine = Machine::build(&SimHost::new(Vendor::Intel), config)?;
    /// let report = machine.destroy();
    /// assert!(report.is_clean() && report.pages_freed > 0);
    /// assert_eq!(report.keys_freed, 1);
    /// # Ok::<(), kvm_ops_machine::MachineError>(())
    /// ```
    pub fn destroy(mut self) -> FreeReport {
        self.tear_down().expect(WHOLE)
    }

    /// The steps of [`build`](Self::build), reversed. `None` the second time.
    fn tear_down(&mut self) -> Option<FreeReport> {
        let mut vm = self.vm.take()?;
        let span = span_of(&vm);
        let _entered = span.enter();
        let mut leaks = Vec::new();
        for vcpu in self.vcpus.drain(..) {
            let what = Leaked::Handle(vcpu.id().0.into());
            if let Err(error) = vcpu.vcpu_free() {
                leaks.push(Leak {
                    what,
                    operation: "free vCPU",
                    error,
                });
            }
        }
        let mut lent = false;
        // Deleting the slots of a confidential VM would take its private pages out one by one, under a
        // live key. Without the key they cost one call each; closing the VM lets the memory go.
        let confidential = vm.tech().is_confidential();
        for slot in self.slots.drain(..).rev().filter(|_| !confidential) {
            if let Err(error) = vm.delete_memory_slot(slot.id) {
                lent = true;
                leaks.push(Leak {
                    what: Leaked::Handle(slot.id.0.into()),
                    operation: "delete memory slot",
                    error,
                });
            }
        }
        let mut report = vm.destroy();
        // A VM that could not be closed may hold its slots.
        lent |= report
            .leaks
            .iter()
            .any(|leak| matches!(leak.what, Leaked::Handle(_) | Leaked::Vm(_)));
        if let Some(ram) = self.ram.take() {
            // A VM that still holds a slot may write the memory for as long as it lives, so it
            // must stay mapped for ever.
            if lent {
                mem::forget(ram);
            }
        }
        report.leaks.extend(leaks);
        Some(report)
    }
}

/// The reason why the parts of a machine are there: `build` hands no machine out before all are, and
/// `destroy` takes the machine with them.
const WHOLE: &str = "a machine has its VM and memory until it is destroyed";

impl<H: Host> Drop for Machine<H> {
    fn drop(&mut self) {
        if let Some(report) = self.tear_down() {
            for leak in &report.leaks {
                tracing::error!(vm = report.vm.0, %leak, "leaked by drop");
            }
        }
    }
}

impl<H: Host> fmt::Debug for Machine<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vm", &self.vm)
            .field("vcpus", &self.vcpus.len())
            .field("ram", &self.ram)
            .finish_non_exhaustive()
    }
}
