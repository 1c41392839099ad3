//! The machine: built in steps that are undone in reverse, run, and given back.

use std::fmt;
use std::mem;

use crate::guest::{GuestProgram, Script};
use crate::{
    AnyVcpu, AnyVm, Error, FreeReport, Gfn, Host, Irqchip, Leak, Leaked, MemSlot, SlotInfo, Tech,
    VcpuId, VcpuOps, Vm, VmConfig, create,
};

use super::convert::Convert;
use super::launch::{LaunchStep, bytes_below_4_gib};
use super::run::{Run, ShutdownScope, State};
use super::{
    ConsoleSink, Devices, ExitHandler, GuestRam, MachineConfig, MachineError, Payload, RunLimits,
    RunReport, Stopper, load, start,
};

/// A VM with its memory and vCPUs, ready to run.
///
/// Dropping it gives everything back, as [`destroy`](Self::destroy) does, but only logs what
/// leaked.
pub struct Machine<H: Host> {
    /// `None` only once `tear_down` took it, which ends the machine.
    vm: Option<Vm<AnyVm<H>>>,
    vcpus: Vec<AnyVcpu<H>>,
    /// Which vCPUs have something to run.
    runs: Vec<bool>,
    /// What was lent to the VM.
    slots: Vec<MemSlot>,
    ram: Option<GuestRam>,
    stopper: Stopper,
    scope: ShutdownScope,
}

impl<H: Host> Machine<H> {
    /// Builds a machine: the VM, its memory with the image in it, and its vCPUs.
    ///
    /// # Errors
    /// A [`MachineError`] that names the step or the value. What was built so far is undone.
    pub fn build(host: &H, config: MachineConfig) -> Result<Self, MachineError> {
        let irqchip = config.chosen_irqchip();
        if let Payload::Programs(programs) = &config.payload {
            if programs.len() as u64 > u64::from(config.vcpus) {
                return Err(MachineError::TooManyPrograms {
                    programs: programs.len(),
                    vcpus: config.vcpus,
                });
            }
        }
        let confidential = config.kind.tech(host.vendor()).is_confidential();
        let rom = match &config.payload {
            // What the host writes into memory is not what such a guest starts with.
            Payload::Image(image) if confidential => {
                let name = image.name.clone();
                return Err(MachineError::NotLaunchable { name });
            }
            Payload::Image(image) => load::rom_bytes(image)?,
            Payload::None | Payload::Programs(_) => bytes_below_4_gib(&config.launch),
        };
        let vm_config = VmConfig::new(config.kind)
            .vcpus(config.vcpus)
            .irqchip(irqchip)
            .enc(config.enc);
        let vm = create(host, &vm_config).map_err(step("create the VM"))?;
        // From here on the value undoes what it holds when a step fails.
        let mut machine = Self {
            vm: Some(vm),
            vcpus: Vec::new(),
            runs: Vec::new(),
            slots: Vec::new(),
            ram: None,
            stopper: Stopper::new(Vec::new()),
            scope: ShutdownScope::Machine,
        };
        let ram = GuestRam::new(config.memory, rom, confidential)?;
        let first = match &config.payload {
            Payload::Image(image) => {
                load::describe(image, &ram, config.vcpus, irqchip)?;
                Some(load::load(image, &ram)?)
            }
            Payload::None | Payload::Programs(_) => None,
        };
        machine.lend(ram, config.log_dirty)?;
        machine.create_vcpus(config.vcpus, irqchip)?;
        match config.payload {
            Payload::None => {}
            Payload::Image(image) => {
                if let (Some(first), Some(vcpu)) = (first, machine.vcpus.first_mut()) {
                    // A platform that takes programs would leave the image lying there. No host
                    // says so beforehand, so the operation itself is the question.
                    if vcpu.load_program(Box::new(Script::new())).is_ok() {
                        let host = host.name();
                        let name = image.name;
                        return Err(MachineError::NeedsProcessor { name, host });
                    }
                    start::set(vcpu, &first).map_err(of_vcpu("set the registers", VcpuId(0)))?;
                }
            }
            Payload::Programs(programs) => machine.load_programs(programs)?,
        }
        for launched in &config.launch {
            let vm = machine.vm_mut();
            match launched {
                LaunchStep::Add(page) => vm
                    .add_initial_page(&page.as_initial())
                    .map_err(step("add a page to the measured start"))?,
                LaunchStep::Measure(gpa) => vm
                    .measure_initial_page(*gpa)
                    .map_err(step("measure a page of the start"))?,
            }
        }
        if !config.awaits_guest {
            machine
                .vm_mut()
                .finalize()
                .map_err(step("finalise the VM"))?;
        }
        Ok(machine)
    }

    fn lend(&mut self, ram: GuestRam, log_dirty: bool) -> Result<(), MachineError> {
        let slots = ram.slots(log_dirty)?;
        // Before the first slot: from then on the memory must stay.
        self.ram = Some(ram);
        for slot in slots {
            self.vm_mut()
                .set_memory_slot(slot)
                .map_err(step("set a memory slot"))?;
            self.slots.push(slot);
        }
        Ok(())
    }

    fn create_vcpus(&mut self, vcpus: u32, irqchip: Irqchip) -> Result<(), MachineError> {
        for id in (0..vcpus).map(VcpuId) {
            let vcpu = self
                .vm()
                .create_vcpu(id)
                .map_err(of_vcpu("create the state", id))?;
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

    fn load_programs(&mut self, programs: Vec<Box<dyn GuestProgram>>) -> Result<(), MachineError> {
        self.scope = ShutdownScope::Vcpu;
        self.runs.fill(false);
        for ((vcpu, runs), program) in self.vcpus.iter_mut().zip(&mut self.runs).zip(programs) {
            let id = vcpu.id();
            vcpu.load_program(program)
                .map_err(of_vcpu("load the program", id))?;
            *runs = true;
        }
        Ok(())
    }

    /// Runs the machine until it ends, on one thread for each vCPU that has something to run; all
    /// of them have ended when it returns. It may be run again, and goes on where it was.
    ///
    /// # Errors
    /// [`MachineError::Thread`] where the system gives no thread. How the guest ended, failures of
    /// vCPUs included, stands in the report.
    pub fn run(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
    ) -> Result<RunReport, MachineError> {
        let vm = self.vm.as_ref().expect(WHOLE);
        let run = Run {
            handler,
            vm: vm.tech().is_confidential().then_some(vm as &dyn Convert),
            limits,
            stopper: &self.stopper,
            scope: self.scope,
            state: State::default(),
        };
        run.go(&mut self.vcpus, &self.runs)
    }

    /// Stops runs from other threads.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The devices of a PC that this machine's guests may want, with their console.
    pub fn devices(&self, console: ConsoleSink) -> Devices {
        let vcpus = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        Devices::new(self.memory().size(), vcpus, console)
    }

    /// The memory.
    pub fn memory(&self) -> &GuestRam {
        self.ram.as_ref().expect(WHOLE)
    }

    /// The VM.
    pub fn vm(&self) -> &Vm<AnyVm<H>> {
        self.vm.as_ref().expect(WHOLE)
    }

    /// The VM, to add slots or for operations of its technology.
    pub fn vm_mut(&mut self) -> &mut Vm<AnyVm<H>> {
        self.vm.as_mut().expect(WHOLE)
    }

    /// The VM and its vCPUs, for embedders that run the vCPUs on threads of their own while they work
    /// on the VM.
    pub fn parts_mut(&mut self) -> (&mut Vm<AnyVm<H>>, &mut [AnyVcpu<H>]) {
        (self.vm.as_mut().expect(WHOLE), &mut self.vcpus)
    }

    /// The technology that holds it.
    pub fn tech(&self) -> Tech {
        self.vm().tech()
    }

    /// A vCPU, to look at or set its registers while it does not run.
    pub fn vcpu_mut(&mut self, id: VcpuId) -> Option<&mut AnyVcpu<H>> {
        self.vcpus.get_mut(id.0 as usize)
    }

    /// Lets a vCPU take part in the next run, though it got no program and nothing wakes it: the
    /// embedder has set its registers. Answers whether there is such a vCPU.
    pub fn enable_vcpu(&mut self, id: VcpuId) -> bool {
        self.runs
            .get_mut(id.0 as usize)
            .map(|runs| *runs = true)
            .is_some()
    }

    /// The frames that the guest wrote since the last call, of a machine built with
    /// [`log_dirty`](MachineConfig::log_dirty).
    ///
    /// # Errors
    /// [`MachineError::Step`] without a dirty log, or where the platform refuses.
    pub fn dirty_frames(&self) -> Result<Vec<Gfn>, MachineError> {
        let mut frames = Vec::new();
        for slot in self.slots.iter().filter(|slot| !slot.flags.read_only) {
            let mut bitmap = vec![0; slot.dirty_words()];
            self.vm()
                .dirty_log(slot.id, &mut bitmap)
                .map_err(step("read the dirty log"))?;
            let first = Gfn::containing(slot.gpa).get();
            for (base, word) in (first..).step_by(64).zip(bitmap) {
                let bits = (0..64).filter(|bit| word & (1 << bit) != 0);
                frames.extend(bits.map(|bit| Gfn::new(base + bit)));
            }
        }
        Ok(frames)
    }

    /// Gives everything back: vCPUs, slots, the VM, and at last the memory.
    ///
    /// # Errors
    /// [`MachineError::Step`] where the VM's key cannot be released, and
    /// [`MachineError::ForeignVm`]; the memory is leaked then. Other leaks stand in the report.
    pub fn destroy(mut self) -> Result<FreeReport, MachineError> {
        self.tear_down()
    }

    /// The steps of [`build`](Self::build), reversed.
    fn tear_down(&mut self) -> Result<FreeReport, MachineError> {
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
        let Some(mut vm) = self.vm.take() else {
            return Err(MachineError::ForeignVm);
        };
        let mut lent = false;
        let mut foreign = false;
        for slot in self.slots.drain(..).rev() {
            // `vm_mut` lets the VM be swapped for another one, which then has other slots. The VM
            // that holds ours may be alive elsewhere.
            if !vm.slots().any(|held| held == SlotInfo::of(&slot)) {
                foreign = true;
            } else if vm.tech().is_confidential() {
                // Deleting the slot would take its private pages out one by one, under a live key.
                // Without the key they cost one call each, and no vCPU can run; closing the VM
                // lets the memory go.
            } else if let Err(error) = vm.delete_memory_slot(slot.id) {
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
            if lent || foreign {
                mem::forget(ram);
            }
        }
        if foreign {
            return Err(MachineError::ForeignVm);
        }
        report.leaks.extend(leaks);
        Ok(report)
    }
}

/// Why the parts of a machine are there: `build` hands no machine out before all are, and
/// `destroy` takes the machine with them.
const WHOLE: &str = "a machine has its VM and memory until it is destroyed";

fn step(step: &'static str) -> impl Fn(Error) -> MachineError {
    move |source| MachineError::Step { step, source }
}

fn of_vcpu(step: &'static str, vcpu: VcpuId) -> impl Fn(Error) -> MachineError {
    move |source| MachineError::Vcpu { step, vcpu, source }
}

impl<H: Host> Drop for Machine<H> {
    fn drop(&mut self) {
        if self.vm.is_none() {
            return;
        }
        match self.tear_down() {
            Ok(report) => {
                for leak in &report.leaks {
                    tracing::error!(vm = report.vm.0, %leak, "leaked by drop");
                }
            }
            Err(error) => tracing::error!(%error, "machine leaked by drop"),
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
