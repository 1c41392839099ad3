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
    ///
    /// ```
    /// use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    ///
    /// let vm = create(&SimHost::new(Vendor::Amd), &VmConfig::normal().vcpus(2))?;
    /// let vcpu = vm.create_vcpu(VcpuId(1))?;
    /// assert_eq!(vcpu.id(), VcpuId(1));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn id(&self) -> VcpuId;

    /// Resets the vCPU to the state after power-on, or after INIT (`vcpu_reset`).
    ///
    /// # Errors
    /// [`Error::Protected`] for INIT to a protected vCPU.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let mut regs = vcpu.regs()?;
    /// regs.rip = 0x1000;
    /// vcpu.set_regs(&regs)?;
    /// vcpu.vcpu_reset(false)?;
    /// assert_eq!(vcpu.regs()?.rip, 0xfff0); // the reset vector
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()>;

    /// Places the vCPU on a processor until [`vcpu_put`](Self::vcpu_put) (`vcpu_load`).
    ///
    /// # Errors
    /// The answer of firmware if the vCPU is still associated with another processor.
    ///
    /// ```
    /// # use kvm_ops::{Kind, Tech, VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::{CpuId, Error, Field};
    ///
    /// vcpu.vcpu_load(CpuId(0))?; // its SEAMCALLs go to processor 0 from here on
    /// vcpu.vcpu_put();
    /// assert_eq!(vcpu.vcpu_load(CpuId(999)), Err(Error::Invalid(Field::Cpu, 999)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vcpu_load(&mut self, cpu: CpuId) -> Result<()> {
        let _ = cpu;
        Ok(())
    }

    /// Takes the vCPU off its processor (`vcpu_put`).
    ///
    /// ```
    /// # use kvm_ops::{Kind, Tech, VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let mut vm = create(&host, &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new();
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// use kvm_ops::{CpuId, Exit};
    ///
    /// for cpu in [CpuId(1), CpuId(0)] {
    ///     vcpu.vcpu_load(cpu)?; // where the scheduler places its thread
    ///     assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown);
    ///     vcpu.vcpu_put();
    /// }
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vcpu_put(&mut self) {}

    /// Gives the vCPU back (`vcpu_free`).
    ///
    /// # Errors
    /// The answer of the host; the vCPU is leaked then.
    ///
    /// ```
    /// use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    ///
    /// let vm = create(&SimHost::new(Vendor::Amd), &VmConfig::normal())?;
    /// let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// vcpu.vcpu_free()?;
    /// assert!(vm.destroy().is_clean());
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vcpu_free(self) -> Result<()>
    where
        Self: Sized;

    // --------------------------------------------------------------------- running

    /// Runs the guest until it needs the embedder (`vcpu_pre_run`, `vcpu_run`, `handle_exit`).
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the VM is
    /// [`Runnable`](crate::Step::Runnable); the answer of the host.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new().halt();
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// use kvm_ops::{Error, Exit, Step};
    ///
    /// assert_eq!(vcpu.vcpu_run(), Err(Error::WrongState(Step::Initialized)));
    /// vm.finalize()?;
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Hlt);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vcpu_run(&mut self) -> Result<Exit>;

    /// The data of the last exit: bytes that the guest writes ([`Exit::IoOut`], [`Exit::MmioWrite`]),
    /// or a buffer to fill for a read ([`Exit::IoIn`], [`Exit::MmioRead`]), which the guest sees after
    /// the next `vcpu_run`. For [`Exit::SystemEvent`] and [`Exit::InternalError`] it holds 64-bit words
    /// in the byte order of the processor. Empty for every other exit, and before the first run.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new().input(0x60, 1).output(0x80, &[7]);
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// use kvm_ops::Exit;
    ///
    /// assert_eq!(vcpu.vcpu_run()?, Exit::IoIn { port: 0x60, size: 1, count: 1 });
    /// vcpu.exit_data()[0] = 0x1c; // the guest reads it in the next run
    /// assert_eq!(vcpu.vcpu_run()?, Exit::IoOut { port: 0x80, size: 1, count: 1 });
    /// assert_eq!(vcpu.exit_data(), [7]);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use kvm_ops::{Irqchip, VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal().irqchip(Irqchip::Full))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new().halt();
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// use kvm_ops::Exit;
    ///
    /// let handle = vcpu.kick_handle();
    /// std::thread::spawn(move || handle.kick());
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Interrupted); // the guest sleeps in HLT
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn kick_handle(&self) -> Arc<dyn Kick>;

    /// The way to load a guest program, on a host that runs programs
    /// ([`Runs::programs`](crate::Runs::programs)). `None` on a processor.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::{Exit, guest::Script};
    ///
    /// let program = Script::new().output(0x80, &[7]);
    /// vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// vm.finalize()?;
    /// assert_eq!(vcpu.vcpu_run()?, Exit::IoOut { port: 0x80, size: 1, count: 1 });
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn programs(&mut self) -> Option<&mut dyn Programs> {
        None
    }

    /// The number of instructions that the vCPU executed since it was created. `None` on a processor
    /// that does not count them, and for guest programs.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// assert_eq!(vcpu.instructions(), Some(0));
    /// # let program = kvm_ops::guest::Script::new();
    /// vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// assert_eq!(vcpu.instructions(), None);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn instructions(&self) -> Option<u64> {
        None
    }

    /// Nanoseconds of the guest's time since its VM was created, where the platform counts it: what the guest's timers
    /// should go by. `None` where a guest's time is the host's, and for guest programs.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// assert_eq!(vcpu.clock(), Some(0));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn clock(&self) -> Option<u64> {
        None
    }

    // ---------------------------------------------------------------- register state, by group

    /// The error of an operation that the back end does not implement. A protected vCPU overrides it
    /// with [`Error::Protected`].
    ///
    /// ```
    /// use kvm_ops::{Error, OpName};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// static SMI: OpName = OpName("inject_smi");
    /// assert_eq!(vcpu.refusal(&SMI), Error::NotOffered(&SMI));
    /// assert_eq!(td_vcpu.refusal(&SMI), Error::Protected(&SMI));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// use kvm_ops::{Error, Regs};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let mut td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// let regs = Regs { rip: 0x1000, rsi: 0x9_0000, ..vcpu.regs()? };
    /// vcpu.set_regs(&regs)?;
    /// assert_eq!(vcpu.regs()?, regs);
    /// assert!(matches!(td_vcpu.set_regs(&regs), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::{Error, Field, cr0};
    ///
    /// let mut sregs = vcpu.sregs()?;
    /// (sregs.cs.selector, sregs.cs.base) = (0, 0);
    /// vcpu.set_sregs(&sregs)?;
    /// assert_eq!(vcpu.sregs()?.cs.base, 0);
    /// sregs.cr0 |= cr0::PG; // paging without protected mode
    /// assert_eq!(vcpu.set_sregs(&sregs), Err(Error::Invalid(Field::Cr0, sregs.cr0)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        let _ = sregs;
        refused!(self, "set_sregs")
    }

    /// Reads x87, SSE and extended state in the standard format of XSAVE (KVM_GET_XSAVE).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let xsave = vcpu.xsave()?;
    /// assert_eq!(xsave.components(), 0); // all are in their initial state
    /// assert_eq!(xsave.as_bytes()[..2], 0x37f_u16.to_le_bytes()); // FCW
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn xsave(&self) -> Result<Xsave> {
        refused!(self, "xsave")
    }

    /// Writes x87, SSE and extended state (KVM_SET_XSAVE).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a component that the vCPU does not have; see
    /// [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let mut xsave = vcpu.xsave()?;
    /// xsave.as_bytes_mut()[160] = 0xff; // the low byte of XMM0
    /// xsave.as_bytes_mut()[512] = 0b10; // XSTATE_BV: SSE
    /// vcpu.set_xsave(&xsave)?;
    /// assert_eq!(vcpu.xsave()?, xsave);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_xsave(&mut self, xsave: &Xsave) -> Result<()> {
        let _ = xsave;
        refused!(self, "set_xsave")
    }

    /// Reads pending and injected events and their masks (KVM_GET_VCPU_EVENTS;
    /// `get_interrupt_shadow`, `get_nmi_mask`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// assert!(!vcpu.events()?.nmi.pending);
    /// vcpu.inject_nmi()?;
    /// assert!(vcpu.events()?.nmi.pending);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn events(&self) -> Result<Events> {
        refused!(self, "events")
    }

    /// Writes pending and injected events and their masks (KVM_SET_VCPU_EVENTS; `inject_exception`,
    /// `cancel_injection`, `set_interrupt_shadow`, `set_nmi_mask`).
    ///
    /// # Errors
    /// [`Error::Invalid`] for an exception vector above 31; see [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new().output(0x80, &[7]);
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// use kvm_ops::{Exception, Exit};
    ///
    /// let gp = Exception::new(13, Some(0));
    /// vcpu.set_events(&vcpu.events()?.with_exception(gp)?)?;
    /// // A guest program has no handler for #GP.
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_events(&mut self, events: &Events) -> Result<()> {
        let _ = events;
        refused!(self, "set_events")
    }

    /// Reads the debug registers (KVM_GET_DEBUGREGS; `sync_dirty_debug_regs`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let regs = vcpu.debug_regs()?; // after reset
    /// assert_eq!(regs.db, [0; 4]);
    /// assert_eq!((regs.dr6, regs.dr7), (0xffff_0ff0, 0x400));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn debug_regs(&self) -> Result<DebugRegs> {
        refused!(self, "debug_regs")
    }

    /// Writes the debug registers (KVM_SET_DEBUGREGS; `set_dr7`).
    ///
    /// # Errors
    /// [`Error::HostLacks`] for a breakpoint that DR7 enables, on a processor without them; see
    /// [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let mut regs = vcpu.debug_regs()?;
    /// regs.db[0] = 0x1000;
    /// vcpu.set_debug_regs(&regs)?;
    /// assert_eq!(vcpu.debug_regs()?, regs);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        let _ = regs;
        refused!(self, "set_debug_regs")
    }

    /// Reads the MSRs whose indexes the entries name (KVM_GET_MSRS; `get_msr`).
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first MSR that cannot be read; the entries
    /// before it are filled. See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::{Error, Field, Msr};
    ///
    /// let mut msrs = [Msr::read(0x277), Msr::read(0x9e)]; // IA32_PAT, IA32_SMBASE
    /// assert_eq!(vcpu.msrs(&mut msrs), Err(Error::Invalid(Field::Msr, 0x9e)));
    /// assert_eq!(msrs[0].value, 0x0007_0406_0007_0406);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        let _ = msrs;
        refused!(self, "msrs")
    }

    /// Writes MSRs, in order (KVM_SET_MSRS; `set_msr`).
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first MSR that cannot be written; those
    /// before it are written. See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::Msr;
    ///
    /// let mut msrs = [Msr::write(0xc000_0082, 0x1000)]; // IA32_LSTAR
    /// vcpu.set_msrs(&msrs)?;
    /// msrs[0].value = 0;
    /// vcpu.msrs(&mut msrs)?;
    /// assert_eq!(msrs[0].value, 0x1000);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        let _ = msrs;
        refused!(self, "set_msrs")
    }

    /// Reads the extended control registers (KVM_GET_XCRS).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// use kvm_ops::{Error, Xcrs};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// assert_eq!(vcpu.xcrs()?, Xcrs { xcr0: 1 }); // after reset: x87
    /// assert!(matches!(td_vcpu.xcrs(), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn xcrs(&self) -> Result<Xcrs> {
        refused!(self, "xcrs")
    }

    /// Writes the extended control registers (KVM_SET_XCRS).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let mut xcrs = vcpu.xcrs()?;
    /// xcrs.xcr0 |= 0b10; // SSE
    /// vcpu.set_xcrs(&xcrs)?;
    /// assert_eq!(vcpu.xcrs()?.xcr0, 0b11);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        let _ = xcrs;
        refused!(self, "set_xcrs")
    }

    /// Reads the multiprocessing state (KVM_GET_MP_STATE).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// use kvm_ops::{Error, MpState};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// assert_eq!(vcpu.mp_state()?, MpState::Runnable);
    /// assert!(matches!(td_vcpu.mp_state(), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn mp_state(&self) -> Result<MpState> {
        refused!(self, "mp_state")
    }

    /// Writes the multiprocessing state (KVM_SET_MP_STATE).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{Irqchip, VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal().irqchip(Irqchip::Full))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::MpState;
    ///
    /// vcpu.set_mp_state(MpState::InitReceived)?; // waits for a SIPI
    /// assert_eq!(vcpu.mp_state()?, MpState::InitReceived);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        let _ = state;
        refused!(self, "set_mp_state")
    }

    /// Sets the values of CPUID (KVM_SET_CPUID2; `vcpu_after_set_cpuid`).
    ///
    /// # Errors
    /// [`Error::Protected`] for a TD, whose CPUID values are part of
    /// [`TdParams`](crate::TdParams); the answer of the host.
    ///
    /// ```
    /// use kvm_ops::{CpuidEntry, Error};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let mut td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// let (subleaf, subleaf_significant) = (0, false);
    /// let leaf = CpuidEntry { leaf: 0x4000_0000, subleaf, subleaf_significant, regs: [0; 4] };
    /// vcpu.set_cpuid(&[leaf])?;
    /// assert!(matches!(td_vcpu.set_cpuid(&[leaf]), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let _ = entries;
        refused!(self, "set_cpuid")
    }

    /// Reads the answer to CPUID: EAX, EBX, ECX and EDX (KVM_GET_CPUID2). A leaf that is not there is zeros.
    ///
    /// # Errors
    /// See [`VcpuOps`]; [`Error::NotOffered`](crate::Error::NotOffered) for a vCPU that runs guest programs.
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let vcpu = vm.create_vcpu(VcpuId(0))?;
    /// let [_, name, ..] = vcpu.cpuid_leaf(0, 0)?;
    /// assert_eq!(name.to_le_bytes(), *b"Auth");
    /// assert_eq!(vcpu.cpuid_leaf(0x4000_0000, 0)?, [0; 4]);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn cpuid_leaf(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4]> {
        let _ = (leaf, subleaf);
        refused!(self, "cpuid_leaf")
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
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::{Error, Field};
    ///
    /// vcpu.inject_irq(0x20)?;
    /// assert_eq!(vcpu.inject_irq(0x21), Err(Error::Exists(Field::Vector, 0x20)));
    /// assert_eq!(vcpu.events()?.interrupt.map(|pending| pending.vector), Some(0x20));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        let _ = vector;
        refused!(self, "inject_irq")
    }

    /// Injects an NMI (`inject_nmi`; KVM_NMI). It waits in the platform until the guest takes it.
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new().halt();
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// use kvm_ops::Exit;
    ///
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Hlt);
    /// vcpu.inject_nmi()?;
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown); // the NMI ended the HLT
    /// assert!(!vcpu.events()?.nmi.pending);
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn inject_nmi(&mut self) -> Result<()> {
        refused!(self, "inject_nmi")
    }

    /// Asks for [`Exit::IrqWindow`] as soon as the guest can take an interrupt (`enable_irq_window`,
    /// `interrupt_allowed`).
    ///
    /// # Errors
    /// [`Error::NotOffered`] with an irqchip in the platform; see
    /// [`VcpuOps`].
    ///
    /// ```
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let mut vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let program = kvm_ops::guest::Script::new().halt();
    /// # vcpu.programs().expect("a software host").load_program(Box::new(program))?;
    /// # vm.finalize()?;
    /// use kvm_ops::Exit;
    ///
    /// vcpu.enable_irq_window()?;
    /// assert_eq!(vcpu.vcpu_run()?, Exit::IrqWindow);
    /// vcpu.inject_irq(0x20)?;
    /// assert_eq!(vcpu.vcpu_run()?, Exit::Shutdown); // taken
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn enable_irq_window(&mut self) -> Result<()> {
        refused!(self, "enable_irq_window")
    }

    /// Switches guest debugging (KVM_SET_GUEST_DEBUG; `update_exception_bitmap`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// use kvm_ops::{Error, GuestDebug};
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let mut td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// let step = GuestDebug { enabled: true, single_step: true, hardware: None };
    /// vcpu.set_guest_debug(step)?;
    /// assert!(matches!(td_vcpu.set_guest_debug(step), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use kvm_ops::{Kind, Tech, VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::new(Kind::Of(Tech::Tdx)))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// use kvm_ops::{Error, Field, Hpa, TableRoot};
    ///
    /// // SAFETY: the software platform keeps the tables of shared memory itself and reads none here.
    /// let root = |at| unsafe { TableRoot::new(Hpa::new(at), 4) };
    /// vcpu.load_mmu_pgd(root(0x7000))?;
    /// assert_eq!(vcpu.load_mmu_pgd(root(0x7001)), Err(Error::Invalid(Field::HostAddress, 0x7001)));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn load_mmu_pgd(&mut self, root: TableRoot) -> Result<()> {
        let _ = root;
        refused!(self, "load_mmu_pgd")
    }

    /// Sets the offset that is added to the host's TSC, in cycles (`write_tsc_offset`).
    ///
    /// # Errors
    /// See [`VcpuOps`].
    ///
    /// ```
    /// use kvm_ops::Error;
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let mut td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// // The software platform takes no offset; a TD's is the TDX module's matter.
    /// assert!(matches!(vcpu.write_tsc_offset(1 << 20), Err(Error::NotOffered(_))));
    /// assert!(matches!(td_vcpu.write_tsc_offset(1 << 20), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn write_tsc_offset(&mut self, offset: u64) -> Result<()> {
        let _ = offset;
        refused!(self, "write_tsc_offset")
    }

    /// Sets the frequency of the guest's TSC, in kHz (`write_tsc_multiplier`; KVM_SET_TSC_KHZ).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a frequency out of range.
    ///
    /// ```
    /// use kvm_ops::Error;
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let mut td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// // The software platform's TSC counts instructions; a TD's frequency is in `TdParams::tsc_khz`.
    /// assert!(matches!(vcpu.write_tsc_multiplier(2_000_000), Err(Error::NotOffered(_))));
    /// assert!(matches!(td_vcpu.write_tsc_multiplier(2_000_000), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn write_tsc_multiplier(&mut self, khz: u32) -> Result<()> {
        let _ = khz;
        refused!(self, "write_tsc_multiplier")
    }

    /// Gives the vCPU machine-check banks (`setup_mce`; KVM_X86_SETUP_MCE). `mcg_cap` is the value of
    /// IA32_MCG_CAP.
    ///
    /// # Errors
    /// [`Error::Invalid`] for capabilities that the host does not offer.
    ///
    /// ```
    /// use kvm_ops::Error;
    /// # use kvm_ops::{VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Intel);
    /// # let vm = create(&host, &VmConfig::normal())?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    /// # let td = create(&host, &VmConfig::new(kvm_ops::Kind::Of(kvm_ops::Tech::Tdx)))?;
    /// # let mut td_vcpu = td.create_vcpu(VcpuId(0))?;
    ///
    /// let mcg_cap = 1 << 24 | 10; // MCG_SER_P, 10 banks
    /// // The software platform has no machine checks.
    /// assert!(matches!(vcpu.setup_mce(mcg_cap), Err(Error::NotOffered(_))));
    /// assert!(matches!(td_vcpu.setup_mce(mcg_cap), Err(Error::Protected(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn setup_mce(&mut self, mcg_cap: u64) -> Result<()> {
        let _ = mcg_cap;
        refused!(self, "setup_mce")
    }

    /// Runs a command of the technology on the vCPU (`vcpu_mem_enc_ioctl`; KVM_MEMORY_ENCRYPT_OP).
    ///
    /// # Errors
    /// As [`VmOps::mem_enc_op`](crate::VmOps::mem_enc_op).
    ///
    /// ```
    /// use kvm_ops::{EncCmd, Error};
    /// # use kvm_ops::{Kind, Tech, VcpuId, VcpuOps, Vendor, VmConfig, create, sim::SimHost};
    /// # let host = SimHost::new(Vendor::Amd);
    /// # let vm = create(&host, &VmConfig::new(Kind::Of(Tech::SevEs)))?;
    /// # let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    ///
    /// let mut cmd = EncCmd { id: 4, flags: 0, data: &mut [], firmware_status: 0 };
    /// // KVM_SEV_LAUNCH_UPDATE_VMSA is a command of the VM; SEV has none of a vCPU.
    /// assert!(matches!(vcpu.vcpu_mem_enc_op(&mut cmd), Err(Error::NotOffered(_))));
    /// # Ok::<(), kvm_ops::Error>(())
    /// ```
    fn vcpu_mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        let _ = cmd;
        refused!(self, "vcpu_mem_enc_op")
    }
}
