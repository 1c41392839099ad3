//! The vCPU of a SEV, SEV-ES or SEV-SNP guest.

use alloc::sync::Arc;
use core::fmt;

use kvm_ops::{
    Answer, CpuId, CpuidEntry, DebugRegs, Error, Events, Exit, GuestDebug, Host, Kick, MpState,
    Msr, OpName, Programs, Regs, Result, Sregs, Step, TableRoot, VcpuId, VcpuOps, VmPort, Xcrs,
    Xsave,
};

use crate::cell::Cell;
use crate::shared::Shared;
use crate::vmsa::StartState;

/// A vCPU of [`SevVm`](crate::SevVm).
///
/// Plain SEV encrypts memory alone: the host reads and writes the registers. The registers of a
/// SEV-ES or SNP guest are its start state until its VMSA is encrypted, which measures them; from
/// then on every operation on them answers [`Error::Protected`].
///
/// It runs while the VM is [`Runnable`](Step::Runnable), a vCPU of SEV-ES or SNP only from register
/// state that was measured or received. [`Error::Busy`] means that the VM is stopped for the last
/// part of a migration and may go on. A handle may outlive the VM: it answers
/// [`Error::WrongState`] then.
pub struct SevVcpu<H: Host> {
    shared: Arc<Shared<H>>,
    cell: Arc<Cell>,
    port: <H::Vm as VmPort>::Vcpu,
}

impl<H: Host> SevVcpu<H> {
    pub(crate) fn new(
        shared: Arc<Shared<H>>,
        cell: Arc<Cell>,
        port: <H::Vm as VmPort>::Vcpu,
    ) -> Self {
        Self { shared, cell, port }
    }

    /// The vCPU below, for operations that only its platform offers.
    #[inline]
    pub fn port(&self) -> &<H::Vm as VmPort>::Vcpu {
        &self.port
    }

    /// The same, to change it.
    #[inline]
    pub fn port_mut(&mut self) -> &mut <H::Vm as VmPort>::Vcpu {
        &mut self.port
    }

    /// True if the registers are the guest's secret.
    #[inline]
    pub fn is_protected(&self) -> bool {
        self.cell.is_protected()
    }

    fn open(&self, operation: &'static OpName) -> Result<()> {
        match self.is_protected() {
            true => Err(Error::Protected(operation)),
            false => Ok(()),
        }
    }

    fn run(&mut self) -> Result<Exit> {
        let step = self.shared.step();
        step.require(Step::Runnable)?;
        // Registers that were neither measured nor received are the host's choice.
        if self.shared.is_es() && !self.is_protected() {
            return Err(Error::WrongState(step));
        }
        let Some(inside) = self.shared.gate.enter() else {
            // While its VM's context is stopped for a move, the vCPU waits.
            let refused = self.shared.step().require(Step::Runnable).err();
            return Err(refused.unwrap_or(Error::Busy));
        };
        let exit = self.port.vcpu_run();
        drop(inside);
        exit.inspect_err(|error| self.shared.run_failed(self.cell.id, *error))
    }

    /// Keeps the start state that is measured equal to the registers of the port.
    fn sync(&self) {
        if self.shared.is_es() && !self.is_protected() {
            self.cell.state().start = StartState::of(&self.port);
        }
    }
}

/// Register groups: the port's until the registers are the guest's secret.
macro_rules! groups {
    () => {};
    (read $name:ident($($arg:ident: $ty:ty)?) -> $value:ty; $($rest:tt)*) => {
        #[inline]
        fn $name(&self, $($arg: $ty)?) -> Result<$value> {
            static NAME: OpName = OpName(stringify!($name));
            self.open(&NAME)?;
            self.port.$name($($arg)?)
        }
        groups! { $($rest)* }
    };
    (write $name:ident($arg:ident: $ty:ty); $($rest:tt)*) => {
        #[inline]
        fn $name(&mut self, $arg: $ty) -> Result<()> {
            static NAME: OpName = OpName(stringify!($name));
            self.open(&NAME)?;
            let done = self.port.$name($arg);
            self.sync();
            done
        }
        groups! { $($rest)* }
    };
}

impl<H: Host> VcpuOps for SevVcpu<H> {
    fn id(&self) -> VcpuId {
        self.cell.id
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        let name = |vcpu: &Self| (vcpu.shared.tech(), vcpu.shared.id(), vcpu.cell.id);
        crate::trace::run(self, name, Self::run)
    }

    fn exit_data(&mut self) -> &mut [u8] {
        self.port.exit_data()
    }

    fn answer(&mut self, answer: Answer) -> Result<()> {
        self.port.answer(answer)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.cell.kick)
    }

    fn programs(&mut self) -> Option<&mut dyn Programs> {
        self.port.programs()
    }

    fn vcpu_load(&mut self, cpu: CpuId) -> Result<()> {
        self.port.vcpu_load(cpu)
    }

    fn vcpu_put(&mut self) {
        self.port.vcpu_put();
    }

    fn vcpu_free(self) -> Result<()> {
        self.port.vcpu_free()
    }

    fn instructions(&self) -> Option<u64> {
        self.port.instructions()
    }

    fn clock(&self) -> Option<u64> {
        self.port.clock()
    }

    fn refusal(&self, operation: &'static OpName) -> Error {
        match self.is_protected() {
            true => Error::Protected(operation),
            false => Error::NotOffered(operation),
        }
    }

    fn cpuid_leaf(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4]> {
        static NAME: OpName = OpName("cpuid_leaf");
        self.open(&NAME)?;
        self.port.cpuid_leaf(leaf, subleaf)
    }

    groups! {
        read regs() -> Regs;
        write set_regs(regs: &Regs);
        read sregs() -> Sregs;
        write set_sregs(sregs: &Sregs);
        read xsave() -> Xsave;
        write set_xsave(xsave: &Xsave);
        read events() -> Events;
        write set_events(events: &Events);
        read debug_regs() -> DebugRegs;
        write set_debug_regs(regs: &DebugRegs);
        read msrs(msrs: &mut [Msr]) -> ();
        write set_msrs(msrs: &[Msr]);
        read xcrs() -> Xcrs;
        write set_xcrs(xcrs: &Xcrs);
        read mp_state() -> MpState;
        write set_mp_state(state: MpState);
        write set_cpuid(entries: &[CpuidEntry]);
        // A protected vCPU is not reset from outside: its guest resets it.
        write vcpu_reset(init_event: bool);
        write set_guest_debug(debug: GuestDebug);
        write write_tsc_offset(offset: u64);
        write write_tsc_multiplier(khz: u32);
        write setup_mce(mcg_cap: u64);
    }

    // EVENTINJ of the VMCB is not encrypted: the hypervisor injects into any guest.

    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        self.port.inject_irq(vector)
    }

    fn inject_nmi(&mut self) -> Result<()> {
        self.port.inject_nmi()
    }

    fn enable_irq_window(&mut self) -> Result<()> {
        self.port.enable_irq_window()
    }

    fn load_mmu_pgd(&mut self, root: TableRoot) -> Result<()> {
        self.port.load_mmu_pgd(root)
    }
}

impl<H: Host> fmt::Debug for SevVcpu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SevVcpu")
            .field("vm", &self.shared.id())
            .field("id", &self.cell.id)
            .field("protected", &self.is_protected())
            .finish_non_exhaustive()
    }
}
