//! The operations of a vCPU, grouped as Linux `arch/x86/kvm/vmx/main.c` groups them.

use crate::{
    Answer, Arc, CpuId, CpuidEntry, DebugRegs, EncCmd, Error, Events, Exit, GuestDebug, Kick,
    MpState, Msr, OpName, Programs, Regs, Result, Sregs, TableRoot, VcpuId, Xcrs, Xsave,
    dispatchable,
};

/// The operations that every back end implements for a vCPU.
///
/// One thread at a time owns a vCPU. Other threads act on it through the VM, or through its
/// [`kick_handle`](Self::kick_handle).
///
/// Register state comes in the groups that KVM has. A group that is the guest's secret answers
/// [`Error::Protected`], for reads and for writes: all groups of a TD's
/// vCPU, and of an SEV-ES or SNP vCPU after its launch. A group that a back end does not have
/// answers [`Error::NotOffered`].
///
/// ```
/// use kvm_ops::{Exit, Kind, Vendor, VcpuId, VcpuOps, VmConfig, create, guest::Script, sim::SimHost};
///
/// let host = SimHost::new(Vendor::Amd);
/// let mut vm = create(&host, &VmConfig::normal())?;
/// let mut vcpu = vm.create_vcpu(VcpuId(0))?;
/// if let Some(programs) = vcpu.programs() {
///     programs.load_program(Box::new(Script::new().output(0x80, &[7])))?;
/// }
/// vm.finalize()?;
/// assert_eq!(vcpu.vcpu_run()?, Exit::IoOut { port: 0x80, size: 1, count: 1 });
/// assert_eq!(vcpu.exit_data(), [7]);
/// assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown);
/// # Ok::<(), kvm_ops::Error>(())
/// ```
#[dispatchable]
pub trait VcpuOps: Send {
    // ------------------------------------------------------------------ identity and life

    /// The index of the vCPU.
    fn id(&self) -> VcpuId;

    /// Resets the vCPU to the state after power-on, or after INIT (`vcpu_reset`).
    ///
    /// # Errors
    /// [`Error::Protected`] for INIT to a protected vCPU.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()>;

    /// Places the vCPU on a processor until [`vcpu_put`](Self::vcpu_put) (`vcpu_load`).
    ///
    /// # Errors
    /// The answer of firmware if the vCPU is still associated with another processor.
    fn vcpu_load(&mut self, cpu: CpuId) -> Result<()> {
        let _ = cpu;
        Ok(())
    }

    /// Takes the vCPU off its processor (`vcpu_put`).
    fn vcpu_put(&mut self) {}

    /// Gives the vCPU back (`vcpu_free`).
    ///
    /// # Errors
    /// The answer of the host; the vCPU is leaked then.
    fn vcpu_free(self) -> Result<()>
    where
        Self: Sized;

    // --------------------------------------------------------------------- running

    /// Runs the guest until it needs the embedder (`vcpu_pre_run`, `vcpu_run`, `handle_exit`).
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the VM is
    /// [`Runnable`](crate::Step::Runnable); the answer of the host.
    fn vcpu_run(&mut self) -> Result<Exit>;

    /// The data of the last exit: bytes that the guest writes ([`Exit::IoOut`], [`Exit::MmioWrite`]),
    /// or a buffer to fill for a read ([`Exit::IoIn`], [`Exit::MmioRead`]), which the guest sees after
    /// the next `vcpu_run`. For [`Exit::SystemEvent`] and [`Exit::InternalError`] it holds 64-bit words
    /// in the byte order of the processor. Empty for every other exit, and before the first run.
    fn exit_data(&mut self) -> &mut [u8] {
        &mut []
    }

    /// Answers the last exit. The next `vcpu_run` hands the answer to the guest. An exit that is not
    /// answered has the default that [`Answer`] names.
    ///
    /// # Errors
    /// [`Error::Invalid`] with [`Field::Answer`](crate::Field::Answer) for an
    /// answer that does not fit the last exit.
    ///
    /// ```
    /// use kvm_ops::{Answer, Exit, VcpuOps};
    /// # use kvm_ops::{Vendor, VcpuId, VmConfig, create, guest::Script, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = Script::new().hypercall(7, [0; 4]);
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// if let Exit::Hypercall { nr: 7, .. } = vcpu.vcpu_run()? {
    ///     vcpu.answer(Answer::Value(0))?;
    /// }
    /// # assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn answer(&mut self, answer: Answer) -> Result<()> {
        let _ = answer;
        refused!(self, "answer")
    }

    /// A handle that makes `vcpu_run` return, from any thread.
    fn kick_handle(&self) -> Arc<dyn Kick>;

    /// The way to load a guest program, on a host that runs programs and not machine code
    /// ([`Runs::Programs`](crate::Runs::Programs)). `None` on a processor.
    fn programs(&mut self) -> Option<&mut dyn Programs> {
        None
    }

    // ---------------------------------------------------------------- register state, by group

    /// The error of an operation that the back end does not implement. A protected vCPU overrides it
    /// with [`Error::Protected`].
    fn refusal(&self, operation: &'static OpName) -> Error {
        Error::NotOffered(operation)
    }

    /// Reads the general registers, RIP and RFLAGS (KVM_GET_REGS; `cache_reg`, `get_rflags`,
    /// `get_if_flag`).
    ///
    /// # Errors
    /// See [`VcpuOps`], as for every group.
    ///
    /// ```
    /// # use kvm_ops::{Vendor, VcpuId, VcpuOps, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let mut regs = vcpu.regs()?;
    /// assert!(!regs.interrupts_enabled()); // after reset
    /// regs.rip = 0x1000;
    /// vcpu.set_regs(&regs)?;
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn regs(&self) -> Result<Regs> {
        refused!(self, "regs")
    }

    /// Writes the general registers, RIP and RFLAGS (KVM_SET_REGS; `set_rflags`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        let _ = regs;
        refused!(self, "set_regs")
    }

    /// Reads segments, descriptor tables and control registers (KVM_GET_SREGS; `get_segment`,
    /// `get_cpl`, `get_cs_db_l_bits`, `get_idt`, `get_gdt`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{Vendor, VcpuId, VcpuOps, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let sregs = vcpu.sregs()?;
    /// assert_eq!((sregs.cpl(), sregs.cs.base), (0, 0xffff_0000)); // after reset
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn sregs(&self) -> Result<Sregs> {
        refused!(self, "sregs")
    }

    /// Writes segments, descriptor tables and control registers (KVM_SET_SREGS; `set_segment`,
    /// `set_cr0`, `set_cr4`, `set_efer`, `set_idt`, `set_gdt`).
    ///
    /// # Errors
    /// [`Error::Invalid`] for values that [`Sregs::validate`] refuses
    /// (`is_valid_cr0`, `is_valid_cr4`); see [`VcpuOps`].
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        let _ = sregs;
        refused!(self, "set_sregs")
    }

    /// Reads x87, SSE and extended state in the standard format of XSAVE (KVM_GET_XSAVE).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn xsave(&self) -> Result<Xsave> {
        refused!(self, "xsave")
    }

    /// Writes x87, SSE and extended state (KVM_SET_XSAVE).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a component that the vCPU does not have; see
    /// [`VcpuOps`].
    fn set_xsave(&mut self, xsave: &Xsave) -> Result<()> {
        let _ = xsave;
        refused!(self, "set_xsave")
    }

    /// Reads pending and injected events and their masks (KVM_GET_VCPU_EVENTS;
    /// `get_interrupt_shadow`, `get_nmi_mask`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn events(&self) -> Result<Events> {
        refused!(self, "events")
    }

    /// Writes pending and injected events and their masks (KVM_SET_VCPU_EVENTS; `inject_exception`,
    /// `cancel_injection`, `set_interrupt_shadow`, `set_nmi_mask`).
    ///
    /// # Errors
    /// [`Error::Invalid`] for an exception vector above 31; see [`VcpuOps`].
    fn set_events(&mut self, events: &Events) -> Result<()> {
        let _ = events;
        refused!(self, "set_events")
    }

    /// Reads the debug registers (KVM_GET_DEBUGREGS; `sync_dirty_debug_regs`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn debug_regs(&self) -> Result<DebugRegs> {
        refused!(self, "debug_regs")
    }

    /// Writes the debug registers (KVM_SET_DEBUGREGS; `set_dr7`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        let _ = regs;
        refused!(self, "set_debug_regs")
    }

    /// Reads the MSRs whose indexes the entries name (KVM_GET_MSRS; `get_msr`).
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first MSR that cannot be read; the entries
    /// before it are filled. See [`VcpuOps`].
    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        let _ = msrs;
        refused!(self, "msrs")
    }

    /// Writes MSRs, in order (KVM_SET_MSRS; `set_msr`).
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first MSR that cannot be written; those
    /// before it are written. See [`VcpuOps`].
    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        let _ = msrs;
        refused!(self, "set_msrs")
    }

    /// Reads the extended control registers (KVM_GET_XCRS).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn xcrs(&self) -> Result<Xcrs> {
        refused!(self, "xcrs")
    }

    /// Writes the extended control registers (KVM_SET_XCRS).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        let _ = xcrs;
        refused!(self, "set_xcrs")
    }

    /// Reads the multiprocessing state (KVM_GET_MP_STATE).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn mp_state(&self) -> Result<MpState> {
        refused!(self, "mp_state")
    }

    /// Writes the multiprocessing state (KVM_SET_MP_STATE).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        let _ = state;
        refused!(self, "set_mp_state")
    }

    /// Sets the values of CPUID (KVM_SET_CPUID2; `vcpu_after_set_cpuid`).
    ///
    /// # Errors
    /// [`Error::Protected`] for a TD, whose CPUID values are part of
    /// [`TdParams`](crate::TdParams); the answer of the host.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let _ = entries;
        refused!(self, "set_cpuid")
    }

    // ---------------------------------------------------------------------- events

    /// Injects an external interrupt (`inject_irq`; KVM_INTERRUPT), for an embedder with interrupt
    /// controllers of its own.
    ///
    /// # Errors
    /// [`Error::Exists`] while an interrupt is pending;
    /// [`Error::NotOffered`] with an irqchip in the platform;
    /// [`Error::Protected`] for a TD, which takes interrupts by
    /// [`VmOps::deliver_interrupt`](crate::VmOps::deliver_interrupt).
    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        let _ = vector;
        refused!(self, "inject_irq")
    }

    /// Injects an NMI (`inject_nmi`; KVM_NMI). It waits in the platform until the guest takes it.
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn inject_nmi(&mut self) -> Result<()> {
        refused!(self, "inject_nmi")
    }

    /// Asks for [`Exit::IrqWindow`] as soon as the guest can take an interrupt (`enable_irq_window`,
    /// `interrupt_allowed`).
    ///
    /// # Errors
    /// [`Error::NotOffered`] with an irqchip in the platform; see
    /// [`VcpuOps`].
    fn enable_irq_window(&mut self) -> Result<()> {
        refused!(self, "enable_irq_window")
    }

    /// Switches guest debugging (KVM_SET_GUEST_DEBUG; `update_exception_bitmap`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn set_guest_debug(&mut self, debug: GuestDebug) -> Result<()> {
        let _ = debug;
        refused!(self, "set_guest_debug")
    }

    // --------------------------------------------------------------- tables, time, platform

    /// Sets the root of the tables of shared memory (`load_mmu_pgd`): EPTP, nested CR3, or a TD's
    /// shared EPTP.
    ///
    /// # Errors
    /// The answer of firmware.
    fn load_mmu_pgd(&mut self, root: TableRoot) -> Result<()> {
        let _ = root;
        refused!(self, "load_mmu_pgd")
    }

    /// Sets the offset that is added to the host's TSC, in cycles (`write_tsc_offset`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    fn write_tsc_offset(&mut self, offset: u64) -> Result<()> {
        let _ = offset;
        refused!(self, "write_tsc_offset")
    }

    /// Sets the frequency of the guest's TSC, in kHz (`write_tsc_multiplier`; KVM_SET_TSC_KHZ).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a frequency out of range.
    fn write_tsc_multiplier(&mut self, khz: u32) -> Result<()> {
        let _ = khz;
        refused!(self, "write_tsc_multiplier")
    }

    /// Gives the vCPU machine-check banks (`setup_mce`; KVM_X86_SETUP_MCE). `mcg_cap` is the value of
    /// IA32_MCG_CAP.
    ///
    /// # Errors
    /// [`Error::Invalid`] for capabilities that the host does not offer.
    fn setup_mce(&mut self, mcg_cap: u64) -> Result<()> {
        let _ = mcg_cap;
        refused!(self, "setup_mce")
    }

    /// Runs a command of the technology on the vCPU (`vcpu_mem_enc_ioctl`; KVM_MEMORY_ENCRYPT_OP).
    ///
    /// # Errors
    /// As [`VmOps::mem_enc_op`](crate::VmOps::mem_enc_op).
    fn vcpu_mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        let _ = cmd;
        refused!(self, "vcpu_mem_enc_op")
    }
}
