//! The vCPU of a VM that the system below holds.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ops::{
    Answer, CpuId, CpuidEntry, DebugRegs, Error, Events, Exit, GuestDebug, Kick, MpState, Msr,
    OpName, Programs, Regs, Result, Sregs, Step, TableRoot, VcpuId, VcpuOps, Xcrs, Xsave,
};

use crate::vm::Shared;

/// A vCPU of [`HeldVm`](crate::HeldVm) over the vCPU `P` of its host.
///
/// Its registers are its start state until the launch measures them: LAUNCH_UPDATE_VMSA for SEV-ES, SNP_LAUNCH_FINISH
/// for SNP, its creation for a TD. From then on every operation on them answers [`Error::Protected`], as the
/// registers are the guest's secret. The registers of a plain SEV guest stay the host's.
pub struct HeldVcpu<P> {
    port: P,
    vm: Arc<Shared>,
    /// True while the last exit waits for its answer.
    waits: Arc<AtomicBool>,
}

impl<P: VcpuOps> HeldVcpu<P> {
    pub(crate) fn new(port: P, vm: Arc<Shared>) -> Self {
        let waits = Arc::default();
        vm.gate
            .add(port.id(), port.kick_handle(), Arc::clone(&waits));
        Self { port, vm, waits }
    }
}

impl<P> HeldVcpu<P> {
    /// The vCPU below, for operations that only its host offers.
    pub fn port(&self) -> &P {
        &self.port
    }

    fn open(&self, operation: &'static OpName) -> Result<()> {
        match self.vm.is_protected() {
            true => Err(Error::Protected(operation)),
            false => Ok(()),
        }
    }
}

/// True for an exit that the system completes in the next run.
const fn waits(exit: &Exit) -> bool {
    !matches!(
        exit,
        Exit::Hlt
            | Exit::Shutdown
            | Exit::Interrupted
            | Exit::IrqWindow
            | Exit::MemoryFault { .. }
            | Exit::Debug { .. }
            | Exit::SystemEvent { .. }
            | Exit::FailEntry { .. }
            | Exit::InternalError { .. }
    )
}

/// Register groups: the port's until they are the guest's secret.
macro_rules! groups {
    () => {};
    (read $name:ident($($arg:ident: $ty:ty)?) -> $value:ty; $($rest:tt)*) => {
        fn $name(&self, $($arg: $ty)?) -> Result<$value> {
            static NAME: OpName = OpName(stringify!($name));
            self.open(&NAME)?;
            self.port.$name($($arg)?)
        }
        groups! { $($rest)* }
    };
    (write $name:ident($arg:ident: $ty:ty); $($rest:tt)*) => {
        fn $name(&mut self, $arg: $ty) -> Result<()> {
            static NAME: OpName = OpName(stringify!($name));
            self.open(&NAME)?;
            self.port.$name($arg)
        }
        groups! { $($rest)* }
    };
}

impl<P: VcpuOps> VcpuOps for HeldVcpu<P> {
    fn id(&self) -> VcpuId {
        self.port.id()
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        let _inside = self.vm.gate.enter();
        self.vm.life.require(Step::Runnable)?;
        let exit = self.port.vcpu_run();
        let waits = exit.as_ref().is_ok_and(waits);
        self.waits.store(waits, Ordering::SeqCst);
        exit.inspect_err(|error| self.vm.run_failed(self.port.id(), *error))
    }

    fn exit_data(&mut self) -> &mut [u8] {
        self.port.exit_data()
    }

    fn answer(&mut self, answer: Answer) -> Result<()> {
        self.port.answer(answer)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.port.kick_handle()
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

    fn refusal(&self, operation: &'static OpName) -> Error {
        match self.vm.is_protected() {
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

impl<P: fmt::Debug> fmt::Debug for HeldVcpu<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldVcpu")
            .field("vm", &self.vm.life.id())
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}
