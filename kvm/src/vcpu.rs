//! A vCPU of the kernel.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, Msrs, kvm_guest_debug, kvm_msr_entry,
    kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use kvm_ops::{
    Call, CpuidEntry, DescTable, Error, Exception, Exit, Field, Irqchip, Kick, Regs, Result,
    Segment, SegmentName, Step, VcpuId, VcpuOps, VmParams, control,
};

use crate::error::{host_lacks, sys};
use crate::kick::Kicker;
use crate::run_page::RunPage;
use crate::vm::Shared;
use crate::{KvmHost, cpuid, exit, regs, reset, signal, sys as ioctls};

const EFER: u32 = 0xc000_0080;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// More parts than any instruction's access has.
const MAX_PARTS: u32 = 64;
/// DR7 without breakpoints: bit 10 reads as one.
const DR7_NONE: u64 = 0x400;

/// A vCPU in the kernel. It holds its VM.
///
/// Its kick is a signal: the first vCPU of a process takes a real-time signal that has no handler
/// (see [`VcpuOps::kick_handle`]); a thread that runs vCPUs must not block it afterwards.
pub struct KvmVcpu {
    id: VcpuId,
    fd: VcpuFd,
    page: Arc<RunPage>,
    kicker: Arc<Kicker>,
    vm: Arc<Shared>,
}

impl KvmVcpu {
    pub(crate) fn new(vm: Arc<Shared>, id: VcpuId) -> Result<Self> {
        // First, because a vCPU that the kernel has made takes its number for good.
        let signal = signal::kick_signal()?;
        let fd = vm
            .fd
            .create_vcpu(id.0.into())
            .map_err(|error| match error.errno() {
                libc::EEXIST => Error::Exists(Field::Vcpu, id.0.into()),
                _ => sys(Call::CreateVcpu)(error),
            })?;
        let shape = cpuid::Shape {
            apic_id: id.0,
            irqchip: vm.params.irqchip,
            tsc_deadline: vm.host.check(KVM_CAP_TSC_DEADLINE_TIMER) != 0,
        };
        let cpuid = cpuid::for_vcpu(vm.host.supported_cpuid(), &shape);
        fd.set_cpuid2(&cpuid).map_err(sys(Call::SetCpuid))?;
        let page = Arc::new(RunPage::map(&fd, vm.host.run_size())?);
        let kicker = Kicker::new(page.clone(), signal);
        Ok(Self {
            id,
            fd,
            page,
            kicker,
            vm,
        })
    }

    /// The vCPU's file descriptor, for what this type does not wrap.
    ///
    /// Only by shared reference: a descriptor that could be swapped with that of another vCPU
    /// would run behind this vCPU's mapped page, and the data of an exit would change while it is
    /// borrowed.
    ///
    /// ```compile_fail,E0596
    /// fn alias(vcpu: &mut kvm_ops_kvm::KvmVcpu) {
    ///     vcpu.fd().get_kvm_run(); // needs `&mut VcpuFd`
    /// }
    /// ```
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The CPUID that the vCPU shows. It starts with what the host supports, with the vCPU's own
    /// APIC id and without features of an APIC that the VM does not have.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let most = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
        let cpuid = self.fd.get_cpuid2(most).map_err(sys(Call::GetCpuid))?;
        Ok(cpuid::to_entries(&cpuid))
    }

    pub(crate) fn vm_params(&self) -> &VmParams {
        &self.vm.params
    }

    pub(crate) fn host(&self) -> &KvmHost {
        &self.vm.host
    }

    /// Lets the kernel complete the access of the last exit, so that it does not write its result
    /// over registers that are set now. What the guest reads is what the exit's data holds.
    ///
    /// # Errors
    /// [`Error::WrongState`] once the VM is closed: an access that the kernel completes may write
    /// to memory.
    pub(crate) fn finish_exit(&mut self) -> Result<()> {
        self.require_open()?;
        self.fd.get_kvm_run().request_interrupt_window = 0;
        // An access that KVM splits, such as an unaligned one, exits once for each part.
        for _ in 0..MAX_PARTS {
            let running = self.kicker.enter_to_finish();
            let done = self.fd.run().map(drop);
            drop(running);
            match done {
                Ok(()) => {}
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
                Err(error) => return Err(Error::Sys(Call::Run, error.errno())),
            }
        }
        Err(Error::Busy)
    }

    fn require_open(&self) -> Result<()> {
        match self.vm.is_closed() {
            false => Ok(()),
            true => Err(Error::WrongState(Step::Drained)),
        }
    }

    fn sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs().map_err(sys(Call::Sregs))
    }

    fn change_sregs(&self, change: impl FnOnce(&mut kvm_sregs)) -> Result<()> {
        let mut sregs = self.sregs()?;
        change(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(sys(Call::Sregs))
    }

    /// The index of what was refused, instead of the errno, where the kernel says no more.
    fn refused<T>(result: Result<T>, field: Field, value: u64) -> Result<T> {
        match result {
            Err(error) if error.errno() == libc::EINVAL => Err(Error::Invalid(field, value)),
            result => result,
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kicker.retire();
    }
}

/// IA32_EFER as the processor keeps it: LMA is no bit of its own but LME with paging on.
fn efer_with_lma(efer: u64, cr0: u64) -> u64 {
    if efer & EFER_LME != 0 && cr0 & control::cr0::PG != 0 {
        efer | EFER_LMA
    } else {
        efer & !EFER_LMA
    }
}

impl VcpuOps for KvmVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    /// A vCPU that waits for INIT or SIPI, or halted with an irqchip in the kernel, waits inside;
    /// a kick ends the wait.
    ///
    /// # Errors
    /// [`Error::WrongState`] once the VM is closed; otherwise the kernel's answer.
    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        self.require_open()?;
        let mut running = self.kicker.enter();
        let reason = match self.fd.run() {
            Ok(VcpuExit::Intr) => Err(libc::EINTR),
            Ok(VcpuExit::IrqWindowOpen) => {
                self.fd.get_kvm_run().request_interrupt_window = 0;
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error.errno()),
        };
        running.interrupted = matches!(reason, Err(libc::EINTR | libc::EAGAIN));
        let interrupted = running.interrupted;
        drop(running);
        match reason {
            // SAFETY: `&mut self` is the exclusive use that is asked for: the exit borrows it, so
            // the next KVM_RUN comes after the exit is gone. Kicks touch `immediate_exit` only.
            Ok(()) => Ok(unsafe { exit::decode(&self.page) }),
            Err(_) if interrupted => Ok(Exit::Interrupted),
            Err(errno) => Err(Error::Sys(Call::Run, errno)),
        }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    /// With an irqchip in the kernel, the first vCPU starts at the reset vector and the others
    /// wait for a start-up message; without one, all start at the reset vector. CPUID and guest
    /// debugging stay as they are. Takes some milliseconds.
    ///
    /// # Errors
    /// [`Error::Invalid`] names an MSR that could not be reset; all else is reset then.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        reset::reset(self, init_event)
    }

    fn vcpu_free(self) -> Result<()> {
        // Linux reports no error from closing a vCPU.
        drop(self);
        Ok(())
    }

    fn get_regs(&self) -> Result<Regs> {
        let kvm = self.fd.get_regs().map_err(sys(Call::Regs))?;
        Ok(regs::from_kvm_regs(&kvm))
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        let kvm = regs::to_kvm_regs(regs);
        self.fd.set_regs(&kvm).map_err(sys(Call::Regs))
    }

    /// Only before the vCPU first ran; Linux refuses a change later.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let cpuid: CpuId = cpuid::from_entries(entries)?;
        self.fd.set_cpuid2(&cpuid).map_err(sys(Call::SetCpuid))
    }

    fn get_msr(&self, index: u32) -> Result<u64> {
        let mut msrs = one_msr(index, 0)?;
        match self.fd.get_msrs(&mut msrs).map_err(sys(Call::Msrs))? {
            0 => Err(Error::Invalid(Field::Msr, index.into())),
            _ => Ok(msrs.as_slice()[0].data),
        }
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        let msrs = one_msr(index, value)?;
        match self.fd.set_msrs(&msrs).map_err(sys(Call::Msrs))? {
            0 => Err(Error::Invalid(Field::Msr, index.into())),
            _ => Ok(()),
        }
    }

    /// LMA is no bit that is written: it follows LME and CR0.PG, as in the processor.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a change of LME with paging on, or a bit that CPUID does not offer.
    fn set_efer(&mut self, value: u64) -> Result<()> {
        // As an MSR, because KVM checks what comes that way and not what comes with KVM_SET_SREGS.
        self.set_msr(EFER, value)
    }

    fn get_segment(&self, segment: SegmentName) -> Result<Segment> {
        let mut sregs = self.sregs()?;
        Ok(regs::from_kvm_segment(regs::segment_mut(
            &mut sregs, segment,
        )))
    }

    fn set_segment(&mut self, segment: SegmentName, value: &Segment) -> Result<()> {
        let value = regs::to_kvm_segment(value);
        self.change_sregs(|sregs| *regs::segment_mut(sregs, segment) = value)
    }

    /// EFER.LMA follows, as in the processor: with LME set, PG switches long mode.
    fn set_cr0(&mut self, value: u64) -> Result<()> {
        if !self.is_valid_cr0(value) {
            return Err(Error::Invalid(Field::Cr0, value));
        }
        let changed = self.change_sregs(|sregs| {
            sregs.cr0 = value;
            sregs.efer = efer_with_lma(sregs.efer, value);
        });
        Self::refused(changed, Field::Cr0, value)
    }

    fn set_cr4(&mut self, value: u64) -> Result<()> {
        if !self.is_valid_cr4(value) {
            return Err(Error::Invalid(Field::Cr4, value));
        }
        Self::refused(
            self.change_sregs(|sregs| sregs.cr4 = value),
            Field::Cr4,
            value,
        )
    }

    fn get_idt(&self) -> Result<DescTable> {
        Ok(regs::from_kvm_dtable(&self.sregs()?.idt))
    }

    fn set_idt(&mut self, table: DescTable) -> Result<()> {
        self.change_sregs(|sregs| sregs.idt = regs::to_kvm_dtable(table))
    }

    fn get_gdt(&self) -> Result<DescTable> {
        Ok(regs::from_kvm_dtable(&self.sregs()?.gdt))
    }

    fn set_gdt(&mut self, table: DescTable) -> Result<()> {
        self.change_sregs(|sregs| sregs.gdt = regs::to_kvm_dtable(table))
    }

    fn set_dr7(&mut self, value: u64) -> Result<()> {
        let mut debug = self.fd.get_debug_regs().map_err(sys(Call::DebugRegs))?;
        debug.dr7 = value;
        self.fd.set_debug_regs(&debug).map_err(sys(Call::DebugRegs))
    }

    /// While debugging is on, the guest's own breakpoints rest: the debug registers are the
    /// debugger's, and set to none.
    fn set_guest_debug(&mut self, debug: bool, single_step: bool) -> Result<()> {
        let mut request = kvm_guest_debug::default();
        if debug || single_step {
            request.control |= KVM_GUESTDBG_ENABLE;
        }
        if debug {
            request.control |= KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW_BP;
            request.arch.debugreg[7] = DR7_NONE;
        }
        if single_step {
            request.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        self.fd
            .set_guest_debug(&request)
            .map_err(sys(Call::SetGuestDebug))
    }

    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        if self.vm.params.irqchip == Irqchip::Full {
            return kvm_ops::unsupported!("inject_irq with an irqchip in the platform");
        }
        let pending = self.events()?.interrupt;
        if pending.injected != 0 {
            return Err(Error::Exists(Field::Vector, pending.nr.into()));
        }
        ioctls::interrupt(&self.fd, vector).map_err(|error| match error.errno() {
            // With the split irqchip KVM keeps one vector until the APIC takes it.
            libc::EEXIST => Error::Exists(Field::Vector, vector.into()),
            _ => error,
        })
    }

    fn inject_nmi(&mut self) -> Result<()> {
        self.fd.nmi().map_err(sys(Call::Nmi))
    }

    /// # Errors
    /// [`Error::Invalid`] for a vector above 31 or the NMI's, [`Error::Exists`] while another
    /// exception is pending: what two of them become is the embedder's to say.
    fn inject_exception(&mut self, exception: Exception) -> Result<()> {
        self.event_inject_exception(exception)
    }

    fn cancel_injection(&mut self) -> Result<()> {
        self.event_cancel()
    }

    fn get_nmi_mask(&self) -> Result<bool> {
        Ok(self.events()?.nmi.masked != 0)
    }

    fn set_nmi_mask(&mut self, masked: bool) -> Result<()> {
        self.change_events(|events| events.nmi.masked = masked.into())
    }

    fn enable_irq_window(&mut self) -> Result<()> {
        if self.vm.params.irqchip == Irqchip::Full {
            return kvm_ops::unsupported!("enable_irq_window with an irqchip in the platform");
        }
        self.fd.get_kvm_run().request_interrupt_window = 1;
        Ok(())
    }

    fn get_interrupt_shadow(&self) -> Result<u32> {
        Ok(self.events()?.interrupt.shadow.into())
    }

    fn set_interrupt_shadow(&mut self, shadow: u32) -> Result<()> {
        self.event_set_shadow(shadow)
    }

    /// # Errors
    /// [`Error::HostLacks`] where KVM takes the offset and does not keep it, as modules do whose
    /// guests see the host's TSC.
    fn write_tsc_offset(&mut self, offset: u64) -> Result<()> {
        ioctls::set_tsc_offset(&self.fd, offset)?;
        if ioctls::tsc_offset(&self.fd)? != offset {
            return host_lacks!("a TSC offset of its own for each vCPU");
        }
        Ok(())
    }

    fn write_tsc_multiplier(&mut self, khz: u32) -> Result<()> {
        if khz == 0 {
            // To KVM 0 means its default, and to a caller it is a mistake.
            return Err(Error::Invalid(Field::TscRatio, 0));
        }
        let set = self.fd.set_tsc_khz(khz).map_err(sys(Call::SetTscKhz));
        Self::refused(set, Field::TscRatio, khz.into())
    }

    fn setup_mce(&mut self, mcg_cap: u64) -> Result<()> {
        ioctls::setup_mce(&self.fd, mcg_cap)
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| Error::NoMemory)
}

impl fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVcpu")
            .field("id", &self.id)
            .field("fd", &self.fd)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lma_is_lme_with_paging() {
        for (lme, pg) in [(false, false), (false, true), (true, false), (true, true)] {
            for lma in [0, EFER_LMA] {
                let efer = if lme { EFER_LME } else { 0 } | lma | 1;
                let cr0 = if pg { control::cr0::PG } else { 0 } | 1;
                let kept = efer_with_lma(efer, cr0);
                assert_eq!(kept & EFER_LMA != 0, lme && pg);
                assert_eq!(kept & !EFER_LMA, efer & !EFER_LMA);
            }
        }
    }
}
