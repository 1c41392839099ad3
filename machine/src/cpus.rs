//! The vCPUs of a machine, apart from its VM.

use kvm_ops::guest::GuestProgram;
use kvm_ops::{AnyVcpu, AnyVm, Error, Field, Host, Irqchip, MemSlot, OpName, VcpuId, VcpuOps, Vm};

use crate::inside::Wiring;
use crate::run::{Code, Run, ShutdownScope, State};
use crate::traps::Traps;
use crate::{ExitHandler, GuestRam, MachineError, Parts, RunLimits, RunReport, Stopper};

/// The vCPUs of a [`Machine`](crate::Machine), apart from its VM
/// ([`Machine::split`](crate::Machine::split)): they run while something else uses the VM, such as the end of a
/// migration from which a guest comes that runs before its pages are here.
pub struct Cpus<'m, H: Host> {
    pub(crate) vm: &'m Vm<AnyVm<H>>,
    pub(crate) ram: &'m GuestRam,
    pub(crate) slots: &'m [MemSlot],
    pub(crate) wiring: &'m Wiring,
    pub(crate) irqchip: Irqchip,
    pub(crate) traps: Option<&'m Traps>,
    pub(crate) vcpus: &'m mut Vec<AnyVcpu<H>>,
    pub(crate) runs: &'m mut Vec<bool>,
    pub(crate) stopper: &'m mut Stopper,
    pub(crate) scope: &'m mut ShutdownScope,
    pub(crate) runs_code: &'m mut bool,
}

impl<H: Host> Cpus<'_, H> {
    /// As [`Machine::take_arrived_vcpus`](crate::Machine::take_arrived_vcpus).
    ///
    /// # Errors
    /// As there.
    pub fn take_arrived_vcpus(&mut self, vcpus: u32) -> kvm_ops::Result<()> {
        if !self.vcpus.is_empty() {
            return Err(Error::Exists(Field::VcpuCount, self.vcpus.len() as u64));
        }
        self.take(vcpus)
    }

    /// Takes the handles of the vCPUs that came with a TD. After a failure those that came can be used.
    pub(crate) fn take(&mut self, vcpus: u32) -> kvm_ops::Result<()> {
        let taken = (0..vcpus).map(VcpuId).try_for_each(|id| {
            self.vcpus.push(self.vm.create_vcpu(id)?);
            Ok(())
        });
        self.runs.resize(self.vcpus.len(), false);
        *self.stopper = Stopper::new(self.vcpus.iter().map(VcpuOps::kick_handle).collect());
        taken
    }

    /// As [`Machine::load_program`](crate::Machine::load_program).
    ///
    /// # Errors
    /// As there.
    pub fn load_program(
        &mut self,
        id: VcpuId,
        program: Box<dyn GuestProgram>,
    ) -> Result<(), MachineError> {
        let index = id.0 as usize;
        let loaded = self
            .vcpus
            .get_mut(index)
            .ok_or(Error::NotFound(Field::Vcpu, id.0.into()))
            .and_then(|vcpu| vcpu.programs().ok_or(Error::HostLacks(&PROGRAMS)))
            .and_then(|programs| programs.load_program(program));
        on_vcpu(self.vm, "load the program", id, loaded)?;
        self.runs[index] = true;
        *self.runs_code = false;
        // A guest program that ends does so for its vCPU alone.
        *self.scope = ShutdownScope::Vcpu;
        Ok(())
    }

    /// As [`Machine::stopper`](crate::Machine::stopper).
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// As [`Machine::run`](crate::Machine::run).
    ///
    /// # Errors
    /// As there.
    pub fn run(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
    ) -> Result<RunReport, MachineError> {
        self.run_while(handler, limits, |_| ())
            .map(|(report, ())| report)
    }

    pub(crate) fn run_while<T>(
        &mut self,
        handler: &dyn ExitHandler,
        limits: RunLimits,
        work: impl FnOnce(&Parts<'_, H>) -> T,
    ) -> Result<(RunReport, T), MachineError> {
        let machine = Parts {
            vm: self.vm,
            ram: self.ram,
            slots: self.slots,
            stopper: self.stopper,
            wiring: self.wiring,
            irqchip: self.irqchip,
        };
        let span = span_of(self.vm);
        let _entered = span.enter();
        let run = Run {
            handler,
            machine: &machine,
            events: &self.wiring.events,
            vm: &machine,
            limits,
            stopper: self.stopper,
            scope: *self.scope,
            code: self.runs_code.then_some(Code {
                ram: self.ram,
                traps: self.traps,
            }),
            state: State::default(),
        };
        run.go(self.vcpus, self.runs, || work(&machine))
    }
}

static PROGRAMS: OpName = OpName("guest programs: it runs machine code");

/// The span of everything that happens to a VM.
pub(crate) fn span_of<H: Host>(vm: &Vm<AnyVm<H>>) -> tracing::Span {
    tracing::debug_span!("vm", technology = %vm.tech(), vm = vm.id().0)
}

/// The error of a step that concerns one vCPU, as the VM explains it.
pub(crate) fn on_vcpu<H: Host, T>(
    vm: &Vm<AnyVm<H>>,
    step: &'static str,
    vcpu: VcpuId,
    done: kvm_ops::Result<T>,
) -> Result<T, MachineError> {
    done.map_err(|error| {
        let why = vm.explain(error);
        // Another vCPU's failure may be the cause.
        let source = Box::new(why.on_vcpu(why.vcpu.unwrap_or(vcpu)));
        MachineError::Vcpu { step, vcpu, source }
    })
}

impl<H: Host> std::fmt::Debug for Cpus<'_, H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpus")
            .field("vm", &self.vm.id())
            .field("vcpus", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}
