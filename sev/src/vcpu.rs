//! The vCPU of a SEV, SEV-ES or SEV-SNP guest.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;

use kvm_ops::control::cr0;
use kvm_ops::guest::GuestProgram;
use kvm_ops::{
    CpuId, CpuidEntry, DescTable, Error, Exception, Exit, Host, Hpa, Kick, Regs, Result, Segment,
    SegmentName, Step, VcpuId, VcpuOps, VmPort,
};

use crate::answers::Answers;
use crate::cell::{CR0_RESET, Cell};
use crate::shared::Shared;
use crate::vmsa::StartState;

/// A vCPU of [`SevVm`](crate::SevVm).
///
/// Plain SEV encrypts memory alone: registers are the host's to read and write. The registers of a
/// SEV-ES or SNP guest are, until its VMSA is encrypted, its start state, which is measured; from
/// then on they are the guest's secret, and every operation on them has a fixed answer
/// ([`protected_vcpu_answers!`](kvm_ops::protected_vcpu_answers)).
///
/// It runs while the VM is [`Runnable`](Step::Runnable); [`Error::Busy`] says that the VM is stopped
/// for the last part of a migration and may go on. A handle may outlive the VM: it answers
/// [`Error::WrongState`] then.
pub struct SevVcpu<H: Host> {
    shared: Arc<Shared<H>>,
    cell: Arc<Cell>,
    port: <H::Vm as VmPort>::Vcpu,
    answers: Answers,
}

impl<H: Host> SevVcpu<H> {
    pub(crate) fn new(
        shared: Arc<Shared<H>>,
        cell: Arc<Cell>,
        port: <H::Vm as VmPort>::Vcpu,
    ) -> Self {
        let answers = Answers(cell.id);
        Self {
            shared,
            cell,
            port,
            answers,
        }
    }

    /// The vCPU below, for what only its platform offers.
    #[inline]
    pub fn port(&self) -> &<H::Vm as VmPort>::Vcpu {
        &self.port
    }

    /// Whether its registers are the guest's secret.
    #[inline]
    pub fn is_protected(&self) -> bool {
        self.cell.is_protected()
    }

    /// Keeps the start state that is measured equal to what the port holds.
    fn sync(&self) {
        if self.shared.is_es() && !self.cell.is_protected() {
            let mut state = self.cell.state();
            state.start = StartState::of(&self.port, state.start.cr0, state.start.cr4);
        }
    }
}

/// To the port while the registers are the host's, to the fixed answers afterwards.
macro_rules! registers {
    ($( fn $name:ident(&$($m:ident)? $(, $arg:ident: $ty:ty)*) -> $ret:ty; )*) => {
        $( registers!(@method [$($m)?] $name ($($arg: $ty),*) $ret); )*
    };
    (@method [] $name:ident ($($arg:ident: $ty:ty),*) $ret:ty) => {
        #[inline]
        fn $name(&self, $($arg: $ty),*) -> $ret {
            if self.cell.is_protected() {
                self.answers.$name($($arg),*)
            } else {
                self.port.$name($($arg),*)
            }
        }
    };
    (@method [mut] $name:ident ($($arg:ident: $ty:ty),*) $ret:ty) => {
        #[inline]
        fn $name(&mut self, $($arg: $ty),*) -> $ret {
            if self.cell.is_protected() {
                return self.answers.$name($($arg),*);
            }
            let done = self.port.$name($($arg),*);
            self.sync();
            done
        }
    };
}

impl<H: Host> VcpuOps for SevVcpu<H> {
    fn id(&self) -> VcpuId {
        self.cell.id
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        let step = self.shared.step();
        step.require(Step::Runnable)?;
        // Registers that were not measured or received are the host's choice.
        if self.shared.is_es() && !self.cell.is_protected() {
            return Err(Error::WrongState(step));
        }
        let Some(inside) = self.shared.gate.enter() else {
            // While its VM's context is stopped for a move, the vCPU waits.
            let refused = self.shared.step().require(Step::Runnable).err();
            return Err(refused.unwrap_or(Error::Busy));
        };
        let exit = self.port.vcpu_run();
        drop(inside);
        exit
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.cell.kick)
    }

    /// A protected vCPU is not reset: its state is encrypted, and its guest resets it by itself.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        if self.cell.is_protected() {
            return kvm_ops::unsupported!("vcpu_reset of a protected vCPU");
        }
        self.port.vcpu_reset(init_event)?;
        let mut state = self.cell.state();
        state.start = StartState::of(&self.port, CR0_RESET, 0);
        Ok(())
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

    fn load_program(&mut self, program: Box<dyn GuestProgram>) -> Result<()> {
        self.port.load_program(program)
    }

    fn load_mmu_pgd(&mut self, root: Hpa, levels: u8) -> Result<()> {
        self.port.load_mmu_pgd(root, levels)
    }

    fn inject_nmi(&mut self) -> Result<()> {
        self.port.inject_nmi()
    }

    fn interrupt_allowed(&self) -> Result<bool> {
        self.port.interrupt_allowed()
    }

    fn set_cr0(&mut self, value: u64) -> Result<()> {
        if self.cell.is_protected() {
            return self.answers.set_cr0(value);
        }
        self.port.set_cr0(value)?;
        self.cell.state().start.cr0 = (value & !(cr0::CD | cr0::NW)) | CR0_RESET;
        Ok(())
    }

    fn set_cr4(&mut self, value: u64) -> Result<()> {
        if self.cell.is_protected() {
            return self.answers.set_cr4(value);
        }
        self.port.set_cr4(value)?;
        self.cell.state().start.cr4 = value;
        Ok(())
    }

    registers! {
        fn get_regs(&) -> Result<Regs>;
        fn set_regs(&mut, regs: &Regs) -> Result<()>;
        fn set_cpuid(&mut, entries: &[CpuidEntry]) -> Result<()>;
        fn get_msr(&, index: u32) -> Result<u64>;
        fn set_msr(&mut, index: u32, value: u64) -> Result<()>;
        fn set_efer(&mut, value: u64) -> Result<()>;
        fn get_segment_base(&, segment: SegmentName) -> Result<u64>;
        fn get_segment(&, segment: SegmentName) -> Result<Segment>;
        fn set_segment(&mut, segment: SegmentName, value: &Segment) -> Result<()>;
        fn get_cpl(&) -> Result<u8>;
        fn get_cs_db_l_bits(&) -> Result<(bool, bool)>;
        fn get_idt(&) -> Result<DescTable>;
        fn set_idt(&mut, table: DescTable) -> Result<()>;
        fn get_gdt(&) -> Result<DescTable>;
        fn set_gdt(&mut, table: DescTable) -> Result<()>;
        fn set_dr7(&mut, value: u64) -> Result<()>;
        fn get_rflags(&) -> Result<u64>;
        fn set_rflags(&mut, value: u64) -> Result<()>;
        fn get_if_flag(&) -> Result<bool>;
        fn set_guest_debug(&mut, debug: bool, single_step: bool) -> Result<()>;
        fn inject_exception(&mut, exception: Exception) -> Result<()>;
        fn nmi_allowed(&) -> Result<bool>;
        fn get_nmi_mask(&) -> Result<bool>;
        fn set_nmi_mask(&mut, masked: bool) -> Result<()>;
        fn get_interrupt_shadow(&) -> Result<u32>;
        fn set_interrupt_shadow(&mut, shadow: u32) -> Result<()>;
        fn write_tsc_offset(&mut, offset: u64) -> Result<()>;
        fn write_tsc_multiplier(&mut, khz: u32) -> Result<()>;
        fn setup_mce(&mut, mcg_cap: u64) -> Result<()>;
    }

    fn is_valid_cr0(&self, value: u64) -> bool {
        self.cell.is_protected() || self.port.is_valid_cr0(value)
    }

    fn is_valid_cr4(&self, value: u64) -> bool {
        self.cell.is_protected() || self.port.is_valid_cr4(value)
    }

    /// The hypervisor injects into a SEV-ES guest as into any other (EVENTINJ is not encrypted).
    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        self.port.inject_irq(vector)
    }

    fn cancel_injection(&mut self) -> Result<()> {
        self.port.cancel_injection()
    }

    fn enable_irq_window(&mut self) -> Result<()> {
        self.port.enable_irq_window()
    }
}

impl<H: Host> fmt::Debug for SevVcpu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SevVcpu")
            .field("vm", &self.shared.id)
            .field("id", &self.cell.id)
            .field("protected", &self.cell.is_protected())
            .finish_non_exhaustive()
    }
}
