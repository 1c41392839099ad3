//! A vCPU as its embedder holds it: a processor, or a guest program that its VM knows too.

use std::cell::OnceCell;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::guest::MAX_ACCESS;
use kvm_ops::{Exit, Irqchip, Result, VcpuId};
use kvm_ops_cpu::{APIC_PAGE_BYTES, Debugger};

use crate::irq::Wake;
use crate::msr_exits::{MsrExits, MsrRefusal};
use crate::processor::{HaltHook, MsrWait, Processor};
use crate::registers::X2APIC_MODE;
use crate::vcpu::Core;
use crate::vm::VmInner;

/// A vCPU of the software platform.
pub struct SimVcpu {
    pub(crate) id: VcpuId,
    pub(crate) vm: Arc<VmInner>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) guest: GuestCpu,
    /// The guest program. Shared with the VM, which hands an encrypted guest over when it moves.
    pub(crate) core: Arc<Mutex<Core>>,
    /// The last exit, its data in `buffer`, and the answer to it.
    pub(crate) exit: Exit,
    pub(crate) buffer: Box<[u8; MAX_ACCESS]>,
    pub(crate) data: Range<usize>,
    pub(crate) ret: u64,
}

/// What executes a vCPU's guest.
pub(crate) enum GuestCpu {
    /// A processor, made on first use.
    Processor(OnceCell<Box<Processor>>),
    /// A processor whose registers are encrypted. What a host sets before they are is the start state
    /// that the program's registers hold.
    Protected(OnceCell<Box<Processor>>),
    /// A guest program, once it is loaded.
    Program,
}

impl GuestCpu {
    /// The processor whose registers hosts see, if the vCPU has one.
    pub(crate) fn processor(
        &self,
        id: VcpuId,
        vm: &Arc<VmInner>,
        wake: &Arc<Wake>,
    ) -> Option<&Processor> {
        match self {
            Self::Processor(_) => self.executing(id, vm, wake),
            Self::Protected(_) | Self::Program => None,
        }
    }

    /// That processor, to change it.
    pub(crate) fn processor_mut(
        &mut self,
        id: VcpuId,
        vm: &Arc<VmInner>,
        wake: &Arc<Wake>,
    ) -> Option<&mut Processor> {
        self.processor(id, vm, wake)?;
        self.executing_mut(id, vm, wake)
    }

    /// The processor, unless the vCPU runs programs.
    pub(crate) fn executing(
        &self,
        id: VcpuId,
        vm: &Arc<VmInner>,
        wake: &Arc<Wake>,
    ) -> Option<&Processor> {
        match self {
            Self::Processor(cell) | Self::Protected(cell) => {
                Some(cell.get_or_init(|| Box::new(Processor::new(id, vm, wake))))
            }
            Self::Program => None,
        }
    }

    /// That processor, to change it.
    pub(crate) fn executing_mut(
        &mut self,
        id: VcpuId,
        vm: &Arc<VmInner>,
        wake: &Arc<Wake>,
    ) -> Option<&mut Processor> {
        self.executing(id, vm, wake)?;
        match self {
            Self::Processor(cell) | Self::Protected(cell) => {
                cell.get_mut().map(|processor| &mut **processor)
            }
            Self::Program => None,
        }
    }
}

/// Locks a guest program. A panic of one leaves it between two steps.
pub(crate) fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimVcpu {
    pub(crate) fn new(id: VcpuId, vm: Arc<VmInner>, wake: Arc<Wake>) -> Self {
        let guest = if vm.runs_machine_code() {
            GuestCpu::Processor(OnceCell::new())
        } else if vm.has_vmsas() {
            GuestCpu::Protected(OnceCell::new())
        } else {
            GuestCpu::Program
        };
        let core = Core::new(id, Arc::clone(&vm), Arc::clone(&wake));
        Self {
            id,
            vm,
            wake,
            guest,
            core: Arc::new(Mutex::new(core)),
            exit: Exit::Interrupted,
            buffer: Box::new([0; MAX_ACCESS]),
            data: 0..0,
            ret: 0,
        }
    }

    /// Sets a source that is asked whether the vCPU shall leave the guest with [`Exit::Interrupted`], as
    /// for a kick: on the thread that runs it, whenever it has executed some 20,000 instructions, and each
    /// millisecond while it sleeps. A hypervisor that has to look for signals asks here. Only the first
    /// source counts.
    pub fn set_interrupt_source(&self, source: impl Fn() -> bool + Send + Sync + 'static) {
        self.wake.set_source(Box::new(source));
    }

    /// The registers of the local APIC, in the layout of its page: 4 bytes at each multiple of 16. `None` for a vCPU
    /// without one in the platform, and for one that runs guest programs.
    pub fn apic_registers(&self) -> Option<[u8; APIC_PAGE_BYTES]> {
        self.executing()?.cpu.apic_registers()
    }

    /// True if the local APIC is in x2APIC mode, whose registers have a wide number.
    pub fn is_in_x2apic_mode(&self) -> bool {
        let processor = self.executing();
        processor.is_some_and(|processor| processor.cpu.apic_base() & X2APIC_MODE != 0)
    }

    /// Loads them. False for a vCPU that has none.
    pub fn set_apic_registers(&mut self, page: &[u8; APIC_PAGE_BYTES]) -> bool {
        let Some(processor) = self
            .executing_mut()
            .filter(|processor| processor.has_apic())
        else {
            return false;
        };
        processor.cpu.set_apic_registers(page);
        processor.publish();
        true
    }

    /// Gives the processor banks of the machine-check architecture: IA32_MCG_CAP, whose low 8 bits are their number.
    /// False for a vCPU that runs guest programs.
    pub fn set_mce(&mut self, cap: u64) -> bool {
        let processor = self.executing_mut();
        processor
            .map(|processor| processor.cpu.set_mce(cap))
            .is_some()
    }

    /// Sets the debugger of a guest whose registers are no secret. What is its leaves as [`Exit::Debug`], with DR6 and DR7 as
    /// data, 8 bytes each. False for other vCPUs.
    pub fn set_debugger(&mut self, debugger: Debugger) -> bool {
        let processor = self.processor_mut();
        processor
            .map(|processor| processor.cpu.set_debugger(debugger))
            .is_some()
    }

    /// Gives the embedder a say in the guest's RDMSR and WRMSR. Those that leave are [`Exit::ReadMsr`] and
    /// [`Exit::WriteMsr`]. Of a SEV-ES or SNP guest they are the requests in its GHCB. False for a vCPU that runs guest
    /// programs.
    pub fn set_msr_exits(&mut self, exits: Arc<MsrExits>) -> bool {
        let processor = self.executing_mut();
        processor
            .map(|processor| processor.msr_exits = Some(exits))
            .is_some()
    }

    /// Shares a switch with the vCPU of a normal VM: while it is true, a hypercall instruction of the other vendor is
    /// overwritten with the processor's own and executed, as KVM does by default. Otherwise it is #UD. False for a
    /// vCPU that runs guest programs.
    pub fn set_hypercall_fix(&mut self, fix: Arc<AtomicBool>) -> bool {
        let processor = self.executing_mut();
        processor
            .map(|processor| processor.hypercall_fix = Some(fix))
            .is_some()
    }

    /// The reason of the last exit, if it was [`Exit::ReadMsr`] or [`Exit::WriteMsr`].
    pub fn msr_refusal(&mut self) -> Option<MsrRefusal> {
        self.msr_wait().map(|wait| wait.refusal)
    }

    pub(crate) fn msr_wait(&mut self) -> Option<&mut MsrWait> {
        self.executing_mut()?.resume.msr_wait()
    }

    /// Sets a function that is called when the guest executed HLT and waits in the platform, with the number of these
    /// instructions since the last call: on the thread that runs the vCPU, in its turn. False for a vCPU that runs
    /// guest programs.
    pub fn on_halt(&mut self, hook: impl Fn(u64) + Send + Sync + 'static) -> bool {
        let processor = self.executing_mut();
        processor
            .map(|processor| processor.halt_hook = HaltHook(Some(Box::new(hook))))
            .is_some()
    }

    /// Sets the nanoseconds of a tick of the local APIC's timer. False for a vCPU that runs guest programs.
    pub fn set_apic_bus_cycle(&mut self, nanoseconds: u64) -> bool {
        let processor = self.executing_mut();
        processor
            .map(|processor| processor.cpu.set_apic_ticks(nanoseconds))
            .is_some()
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }

    /// Checks that the vCPU has no irqchip in the platform, whose work the embedder does then.
    pub(crate) fn has_irqchip(&self) -> bool {
        self.vm.irqchip() != Irqchip::None
    }

    pub(crate) fn processor(&self) -> Option<&Processor> {
        self.guest.processor(self.id, &self.vm, &self.wake)
    }

    /// The processor, also one with encrypted registers: its local APIC and machine checks are the platform's.
    fn executing(&self) -> Option<&Processor> {
        self.guest.executing(self.id, &self.vm, &self.wake)
    }

    fn executing_mut(&mut self) -> Option<&mut Processor> {
        let guest = &mut self.guest;
        guest.executing_mut(self.id, &self.vm, &self.wake)
    }

    /// The processor, to change.
    pub(crate) fn processor_mut(&mut self) -> Option<&mut Processor> {
        let guest = &mut self.guest;
        guest.processor_mut(self.id, &self.vm, &self.wake)
    }

    /// Instructions that the processor executed. `None` for a vCPU that runs guest programs.
    pub(crate) fn executed(&self) -> Option<u64> {
        match &self.guest {
            GuestCpu::Processor(cell) | GuestCpu::Protected(cell) => {
                Some(cell.get().map_or(0, |processor| processor.instructions()))
            }
            GuestCpu::Program => None,
        }
    }

    /// Runs the processor. `None` for a vCPU that runs guest programs.
    pub(crate) fn run_processor(&mut self) -> Option<Result<Exit>> {
        if matches!(self.guest, GuestCpu::Protected(_)) && self.core().program.is_some() {
            // It came with a guest that moved here.
            self.guest = GuestCpu::Program;
        }
        let guest = &mut self.guest;
        let processor = guest.executing_mut(self.id, &self.vm, &self.wake)?;
        let left = processor.run(&mut self.buffer, self.ret);
        Some(left.map(|(exit, len)| {
            /// `EIO`, for an embedder that says nothing about certificates.
            const EIO: u64 = 5;
            let ret = match exit {
                Exit::SnpCertificates { .. } => EIO,
                _ => 0,
            };
            (self.exit, self.data, self.ret) = (exit, 0..len, ret);
            exit
        }))
    }

    /// Runs the guest program, with the data with which the embedder answered the last exit.
    pub(crate) fn run_program(&mut self, answered: Range<usize>) -> Result<Exit> {
        let mut core = lock(&self.core);
        let left = core.run(&self.buffer[answered], self.ret);
        let data = core.exit_data();
        self.buffer[..data.len()].copy_from_slice(data);
        (self.data, self.ret) = (0..data.len(), 0);
        if let Ok(exit) = left {
            self.exit = exit;
        }
        left
    }
}

impl fmt::Debug for SimVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core().fmt(f)
    }
}
