//! A vCPU of the kernel.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_TSC_DEADLINE_TIMER, KVM_MAX_CPUID_ENTRIES, kvm_mp_state};
use kvm_ioctls::{VcpuExit, VcpuFd};
use kvm_ops::{
    Answer, Call, CpuidEntry, DebugRegs, Error, Events, Exit, Field, GuestDebug, Irqchip, Kick,
    MpState, Msr, Regs, Result, Sregs, Step, VcpuId, VcpuOps, Xcrs, Xsave,
};

use crate::error::{host_lacks, sys};
use crate::exit::{self, DataRange};
use crate::kick::Kicker;
use crate::run_page::RunPage;
use crate::vm::VmInner;
use crate::{cpuid, events, msrs, reset, signal, state, sys as ioctls};

/// More parts than any instruction's access has.
const MAX_PARTS: u32 = 64;
/// The bits of IA32_EFER that a processor defines (APM vol. 2, 3.1.7; SDM vol. 4, table 2-2).
const EFER_DEFINED: u64 = 1 | 0b1101 << 8 | 0b1111 << 12 | 0b1_1011 << 17;
const EFER: u32 = 0xc000_0080;
const EFER_LME: u64 = 1 << 8;
const CR0_PG: u64 = kvm_ops::cr0::PG;
const CR4_PAE: u64 = 1 << 5;

/// A vCPU in the kernel. It holds its VM.
///
/// Its kick is a signal: the first vCPU of a process takes a real-time signal that has no handler
/// (see [`VcpuOps::kick_handle`]); a thread that runs vCPUs must not block it afterwards.
///
/// Each group of registers is read or written by one ioctl.
pub struct KvmVcpu {
    id: VcpuId,
    fd: VcpuFd,
    page: Arc<RunPage>,
    kicker: Arc<Kicker>,
    /// The last exit, and its data in `page`.
    exit: Exit,
    data: DataRange,
    vm: Arc<VmInner>,
}

impl KvmVcpu {
    pub(crate) fn new(vm: Arc<VmInner>, id: VcpuId) -> Result<Self> {
        // First, because the kernel never frees the number of a vCPU that it made.
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
        tracing::debug!(vcpu = id.0, "vCPU created");
        Ok(Self {
            id,
            fd,
            page,
            kicker,
            exit: Exit::Interrupted,
            data: DataRange::default(),
            vm,
        })
    }

    /// The vCPU's file descriptor, for ioctls that this type does not wrap.
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

    /// The CPUID that the vCPU shows. It starts with the CPUID that the host supports, with the
    /// vCPU's APIC id and without features of an APIC that the VM does not have.
    ///
    /// # Errors
    /// The answer of the kernel.
    pub fn cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let most = KVM_MAX_CPUID_ENTRIES;
        let cpuid = self.fd.get_cpuid2(most).map_err(sys(Call::GetCpuid))?;
        Ok(cpuid::to_entries(&cpuid))
    }

    pub(crate) fn vm(&self) -> &VmInner {
        &self.vm
    }

    /// Lets the kernel complete the access of the last exit, so that it does not write its result
    /// over registers that are set now. The guest reads the exit's data as it is.
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
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    (self.exit, self.data) = (Exit::Interrupted, DataRange::default());
                    return Ok(());
                }
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
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kicker.retire();
    }
}

impl VcpuOps for KvmVcpu {
    #[inline]
    fn id(&self) -> VcpuId {
        self.id
    }

    /// A vCPU that waits for INIT or SIPI, or halted with an irqchip in the kernel, waits inside;
    /// a kick ends the wait.
    ///
    /// # Errors
    /// [`Error::WrongState`] once the VM is closed; the answer of the kernel.
    fn vcpu_run(&mut self) -> Result<Exit> {
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
        (self.exit, self.data) = match reason {
            // SAFETY: `&mut self` is exclusive use of the vCPU: a slice of the data borrows it.
            // Kicks touch `immediate_exit` only.
            Ok(()) => unsafe { exit::decode(&self.page) },
            Err(_) if interrupted => (Exit::Interrupted, DataRange::default()),
            Err(errno) => {
                (self.exit, self.data) = (Exit::Interrupted, DataRange::default());
                tracing::warn!(vcpu = self.id.0, errno, "KVM_RUN failed");
                return Err(Error::Sys(Call::Run, errno));
            }
        };
        Ok(self.exit)
    }

    /// The bytes lie in the pages that the kernel shares: no copy is made.
    fn exit_data(&mut self) -> &mut [u8] {
        let DataRange { offset, len } = self.data;
        // SAFETY: `decode` checked the range against the mapping, which lives as long as `self`.
        // It covers data only, which no other thread touches: the kernel writes it in KVM_RUN,
        // which needs `&mut self`, as every other access of this process does.
        unsafe { std::slice::from_raw_parts_mut(self.page.run().cast::<u8>().add(offset), len) }
    }

    fn answer(&mut self, answer: Answer) -> Result<()> {
        // SAFETY: `&mut self` is exclusive use of the vCPU, and `exit` was decoded last.
        unsafe { exit::answer(&self.page, &self.exit, answer) }
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    /// With an irqchip in the kernel, the first vCPU starts at the reset vector and the others
    /// wait for a start-up message; without one, all start at the reset vector. CPUID and guest
    /// debugging stay as they are. Takes some milliseconds.
    ///
    /// # Errors
    /// [`Error::Invalid`] names an MSR that could not be reset; everything else is reset then.
    /// [`Error::WrongState`] once the VM is closed.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        reset::reset(self, init_event)
    }

    fn vcpu_free(self) -> Result<()> {
        // Linux reports no error from closing a vCPU.
        drop(self);
        Ok(())
    }

    fn regs(&self) -> Result<Regs> {
        let kvm = self.fd.get_regs().map_err(sys(Call::Regs))?;
        Ok(state::from_kvm_regs(&kvm))
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        let kvm = state::to_kvm_regs(regs);
        self.fd.set_regs(&kvm).map_err(sys(Call::Regs))
    }

    fn sregs(&self) -> Result<Sregs> {
        let kvm = self.fd.get_sregs().map_err(sys(Call::Sregs))?;
        Ok(state::from_kvm_sregs(&kvm))
    }

    /// EFER.LMA is not written: it follows LME and CR0.PG, as in the processor.
    ///
    /// # Errors
    /// [`Error::Invalid`] for values that [`Sregs::validate`] refuses, for paging in long mode
    /// without CR4.PAE, and for EFER bits that no processor has; [`Error::Sys`] with `EINVAL` for a
    /// bit of CR4 that the vCPU's CPUID does not offer.
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        sregs.validate()?;
        if sregs.efer & !EFER_DEFINED != 0 {
            // KVM_SET_SREGS would take it.
            return Err(Error::Invalid(Field::Msr, EFER.into()));
        }
        if sregs.efer & EFER_LME != 0 && sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE == 0 {
            return Err(Error::Invalid(Field::Cr4, sregs.cr4));
        }
        let kvm = state::to_kvm_sregs(sregs);
        self.fd.set_sregs(&kvm).map_err(sys(Call::Sregs))
    }

    fn xsave(&self) -> Result<Xsave> {
        let mut area = vec![0; self.vm.xsave_bytes()];
        ioctls::get_xsave(&self.fd, &mut area)?;
        Xsave::new(area.into())
    }

    /// An area that is shorter than the vCPU's is extended with zeros.
    fn set_xsave(&mut self, xsave: &Xsave) -> Result<()> {
        let (area, bytes) = (xsave.as_bytes(), self.vm.xsave_bytes());
        if area.len() >= bytes {
            return ioctls::set_xsave(&self.fd, area, bytes);
        }
        let mut extended = vec![0; bytes];
        extended[..area.len()].copy_from_slice(area);
        ioctls::set_xsave(&self.fd, &extended, bytes)
    }

    fn events(&self) -> Result<Events> {
        let kvm = self.fd.get_vcpu_events().map_err(sys(Call::VcpuEvents))?;
        Ok(events::from_kvm(&kvm))
    }

    /// # Errors
    /// [`Error::Invalid`] for a vector above 31 or that of an NMI; [`Error::HostLacks`] for an
    /// event that this KVM would drop.
    fn set_events(&mut self, events: &Events) -> Result<()> {
        let kvm = events::to_kvm(events, self.vm.event_parts)?;
        let set = self.fd.set_vcpu_events(&kvm);
        set.map_err(sys(Call::VcpuEvents))
    }

    fn debug_regs(&self) -> Result<DebugRegs> {
        let kvm = self.fd.get_debug_regs().map_err(sys(Call::DebugRegs))?;
        Ok(state::from_kvm_debug_regs(&kvm))
    }

    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        let kvm = state::to_kvm_debug_regs(regs);
        self.fd.set_debug_regs(&kvm).map_err(sys(Call::DebugRegs))
    }

    /// One ioctl for each 255 MSRs.
    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        msrs::get(&self.fd, msrs)
    }

    /// One ioctl for each 255 MSRs.
    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        msrs::set(&self.fd, msrs)
    }

    fn xcrs(&self) -> Result<Xcrs> {
        let kvm = self.fd.get_xcrs().map_err(sys(Call::Fpu))?;
        Ok(state::from_kvm_xcrs(&kvm))
    }

    fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        let kvm = state::to_kvm_xcrs(xcrs);
        self.fd.set_xcrs(&kvm).map_err(sys(Call::Fpu))
    }

    fn mp_state(&self) -> Result<MpState> {
        let kvm = self.fd.get_mp_state().map_err(sys(Call::MpState))?;
        let known = MpState::ALL
            .iter()
            .find(|(_, number)| *number == kvm.mp_state);
        match known {
            Some((state, _)) => Ok(*state),
            None => Err(Error::Sys(Call::MpState, libc::EPROTO)),
        }
    }

    /// # Errors
    /// `EINVAL` without an irqchip in the kernel, where the embedder keeps this state, unless it is
    /// [`MpState::Runnable`].
    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        let known = MpState::ALL.iter().find(|(known, _)| *known == state);
        let Some((_, mp_state)) = known else {
            return Err(Error::Sys(Call::MpState, libc::EINVAL));
        };
        let kvm = kvm_mp_state {
            mp_state: *mp_state,
        };
        self.fd.set_mp_state(kvm).map_err(sys(Call::MpState))
    }

    /// Only before the vCPU first ran; Linux refuses a change later.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let cpuid = cpuid::from_entries(entries)?;
        self.fd.set_cpuid2(&cpuid).map_err(sys(Call::SetCpuid))
    }

    fn cpuid_leaf(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4]> {
        let entries = self.cpuid()?;
        let found = CpuidEntry::find(&entries, leaf, subleaf);
        Ok(found.map_or([0; 4], |entry| entry.regs))
    }

    /// While debugging is on, the guest's own breakpoints rest: the debug registers are the
    /// debugger's.
    fn set_guest_debug(&mut self, debug: GuestDebug) -> Result<()> {
        let kvm = state::to_kvm_guest_debug(&debug);
        self.fd
            .set_guest_debug(&kvm)
            .map_err(sys(Call::SetGuestDebug))
    }

    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        if self.vm.params.irqchip == Irqchip::Full {
            return kvm_ops::not_offered!("inject_irq with an irqchip in the platform");
        }
        // Without an irqchip KVM_INTERRUPT overwrites the interrupt that waits.
        if let Some(waiting) = self.events()?.interrupt {
            return Err(Error::Exists(Field::Vector, waiting.vector.into()));
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

    fn enable_irq_window(&mut self) -> Result<()> {
        if self.vm.params.irqchip == Irqchip::Full {
            return kvm_ops::not_offered!("enable_irq_window with an irqchip in the platform");
        }
        self.fd.get_kvm_run().request_interrupt_window = 1;
        Ok(())
    }

    /// # Errors
    /// [`Error::HostLacks`] if KVM accepts the offset but does not keep it, as modules do whose guests
    /// see the host's TSC.
    fn write_tsc_offset(&mut self, offset: u64) -> Result<()> {
        ioctls::set_tsc_offset(&self.fd, offset)?;
        if ioctls::tsc_offset(&self.fd)? != offset {
            return host_lacks!("a TSC offset for each vCPU");
        }
        Ok(())
    }

    fn write_tsc_multiplier(&mut self, khz: u32) -> Result<()> {
        let refused = Error::Invalid(Field::TscRatio, khz.into());
        if khz == 0 {
            // KVM takes 0 for its default; a caller who passes it made a mistake.
            return Err(refused);
        }
        self.fd
            .set_tsc_khz(khz)
            .map_err(|error| match error.errno() {
                libc::EINVAL => refused,
                _ => sys(Call::SetTscKhz)(error),
            })
    }

    fn setup_mce(&mut self, mcg_cap: u64) -> Result<()> {
        ioctls::setup_mce(&self.fd, mcg_cap)
    }
}

impl fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVcpu")
            .field("id", &self.id)
            .field("fd", &self.fd)
            .field("exit", &self.exit)
            .finish_non_exhaustive()
    }
}
