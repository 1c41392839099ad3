//! A VM: its memory and the mailboxes of its vCPUs. For a confidential VM this is the part that it
//! shares with the host.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use kvm_ops_cpu::{ApicAddress, CodePages, Cpu};

use kvm_ops::{
    DevicePort, Error, Field, Gfn, Gpa, Irqchip, Kick, MemSlot, Privacy, Result, SevPort,
    SharedMemory, Step, TdPort, Tech, VcpuId, VmParams, VmPort,
};

use crate::access::{Copy, host_access};
use crate::chips::Chips;
use crate::host::Machine;
use crate::irq::Wake;
use crate::mailbox::{self, Mailbox};
use crate::memory::Memory;
use crate::processor::{Command, Processors, Turns};
use crate::wires::EndHook;
use crate::{SimVcpu, TableStats};

/// A VM of the software platform: a normal one, or the shared part of a confidential one.
///
/// [`close`](VmPort::close), and dropping this value, deletes every slot and ends all runs; a vCPU
/// that is left answers [`Error::WrongState`] from then on.
pub struct SimVm {
    pub(crate) inner: Arc<VmInner>,
}

/// The part of a VM that its vCPUs hold too.
pub(crate) struct VmInner {
    pub(crate) machine: Arc<Machine>,
    pub(crate) tech: Tech,
    /// Empty but for a SEV guest.
    pub(crate) sev: crate::sev::Guest,
    params: VmParams,
    /// One lock for slots and table: an access holds it shared while it copies, so a deleted slot
    /// is out of use when the deletion returns.
    memory: RwLock<Memory>,
    vcpus: Mutex<BTreeMap<VcpuId, Mailbox>>,
    /// The way of a TD's programs to this VM.
    home: Mutex<Option<Arc<Home>>>,
    /// Set when the VM is closed: no vCPU runs afterwards.
    closed: AtomicBool,
    /// The turns of processors. Who changes slots has one too.
    pub(crate) turns: Turns,
    /// Grows whenever a processor must forget its translations: slots or dirty logs changed.
    generation: AtomicU64,
    processors: Mutex<Processors>,
    /// The place of the interrupt controllers, where it was chosen late.
    irqchip: OnceLock<Irqchip>,
    /// Interrupt controllers and timer, with a full irqchip.
    chips: OnceLock<Mutex<Chips>>,
    /// Told when a guest ends an interrupt.
    pub(crate) end_hook: EndHook,
    /// Frames with code that processors decoded.
    code: OnceLock<Arc<CodePages>>,
}

/// The fewest and the most frames that code pages tell apart; others share entries. A VM may get its
/// memory when its first processor is in use.
const CODE_FRAMES: (u64, u64) = (1 << 14, 1 << 20);

/// The VM whose shared memory a TD's programs see.
pub(crate) struct Home(RwLock<Weak<VmInner>>);

impl Home {
    #[allow(dead_code)] // Only a TD's programs come this way.
    pub(crate) fn vm(&self) -> Option<Arc<VmInner>> {
        let vm = self.0.read().unwrap_or_else(PoisonError::into_inner);
        vm.upgrade()
    }
}

impl SimVm {
    pub(crate) fn new(machine: Arc<Machine>, tech: Tech, params: VmParams) -> Self {
        machine.vm_created();
        let turns = match machine.parallel {
            true => Turns::parallel(),
            false => Turns::default(),
        };
        let chips = OnceLock::new();
        if params.irqchip == Irqchip::Full {
            let _ = chips.set(Mutex::default());
        }
        Self {
            inner: Arc::new(VmInner {
                machine,
                tech,
                sev: crate::sev::Guest::default(),
                params,
                memory: RwLock::default(),
                vcpus: Mutex::default(),
                home: Mutex::default(),
                closed: AtomicBool::new(false),
                turns,
                generation: AtomicU64::new(0),
                processors: Mutex::default(),
                irqchip: OnceLock::new(),
                chips,
                end_hook: EndHook::default(),
                code: OnceLock::new(),
            }),
        }
    }

    /// Declares frames as memory that is not there, as a hypervisor knows it whose user took it away. Where
    /// no slot is, an access of a vCPU that executes machine code leaves as [`Exit::MemoryFault`](kvm_ops::Exit::MemoryFault) of that
    /// kind, and not as MMIO; its instruction begins again in the next run. `None` takes it back.
    pub fn set_missing(&self, first: Gfn, pages: u64, kind: Option<Privacy>) {
        self.inner
            .change_memory(|memory| memory.set_missing(first, pages, kind));
    }

    /// Chooses the place of the interrupt controllers after all, as a hypervisor does whose caller makes them when
    /// the VM exists: once, and before the first vCPU. The parameters say [`Irqchip::None`] then.
    ///
    /// # Errors
    /// [`Error::Exists`] if it was chosen before, or a vCPU exists.
    pub fn set_irqchip(&self, irqchip: Irqchip) -> Result<()> {
        let inner = &self.inner;
        let exists = Error::Exists(Field::Vcpu, 0);
        if inner.irqchip() != Irqchip::None || !inner.vcpus().is_empty() {
            return Err(exists);
        }
        inner.irqchip.set(irqchip).map_err(|_| exists)?;
        if irqchip == Irqchip::Full {
            let _ = inner.chips.set(Mutex::default());
        }
        Ok(())
    }

    /// The state of the second-level table.
    pub fn table_stats(&self) -> TableStats {
        self.inner.read().stats()
    }
}

impl VmInner {
    pub(crate) fn irqchip(&self) -> Irqchip {
        self.irqchip.get().copied().unwrap_or(self.params.irqchip)
    }

    pub(crate) fn is_sev(&self) -> bool {
        matches!(self.tech, Tech::Sev | Tech::SevEs | Tech::SevSnp)
    }

    /// # Errors
    /// [`Error::WrongState`] once the VM is closed.
    pub(crate) fn require_open(&self) -> Result<()> {
        match self.closed.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::WrongState(Step::Drained)),
        }
    }

    /// Deletes the slots and all mappings, and ends the runs of vCPUs that are left. An access
    /// copies under the memory's lock, so none is under way when this returns.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        tracing::debug!(tech = %self.tech, "VM closed");
        self.change_memory(|memory| *memory = Memory::default());
        self.sev.close();
        crate::tdx::vm_closed(self);
        self.vcpus().values().for_each(|vcpu| vcpu.wake.kick());
    }

    /// Changes slots or logs while no processor executes. All of them ask for their pages again
    /// afterwards.
    fn change_memory<T>(&self, change: impl FnOnce(&mut Memory) -> T) -> T {
        self.change_pages(|| change(&mut self.write()))
    }

    /// Changes where pages are, in the same way.
    pub(crate) fn change_pages<T>(&self, change: impl FnOnce() -> T) -> T {
        let _turn = self.turns.take();
        self.generation.fetch_add(1, Ordering::AcqRel);
        change()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn processors(&self) -> MutexGuard<'_, Processors> {
        self.processors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn chips(&self) -> Option<MutexGuard<'_, Chips>> {
        let chips = self.chips.get()?;
        Some(chips.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a message, by the processor `from` or by a device, and wakes who hears it. Returns true if there is
    /// a processor that it is for.
    pub(crate) fn send(&self, command: &Command, from: Option<u32>) -> bool {
        let is_for_one = self.processors().deliver(command, from);
        self.turns.heard();
        is_for_one
    }

    /// Sends the messages of the chips, and tells vCPU 0 if the 8259A pair interrupts.
    pub(crate) fn send_from(&self, mut chips: MutexGuard<'_, Chips>) {
        let (messages, interrupts) = (chips.take_messages(), chips.takes_attention());
        drop(chips);
        let processors = self.processors();
        for message in &messages {
            processors.deliver(message, None);
        }
        if interrupts {
            processors.nudge(0);
        }
        drop(processors);
        if interrupts {
            self.turns.rise(0);
        }
        if !messages.is_empty() {
            self.turns.heard();
        }
    }

    /// The frames with decoded code, made for the memory that the VM has when its first processor
    /// is used.
    pub(crate) fn code_pages(&self) -> Arc<CodePages> {
        let pages = self.code.get_or_init(|| {
            let frames = self.read().frames().clamp(CODE_FRAMES.0, CODE_FRAMES.1);
            CodePages::new(frames as usize)
        });
        Arc::clone(pages)
    }

    /// True if its vCPUs are processors unless they get programs, and hosts see their registers.
    pub(crate) fn runs_machine_code(&self) -> bool {
        !self.tech.is_confidential() || self.tech == Tech::Sev
    }

    /// True if its vCPUs have encrypted register state.
    pub(crate) fn has_vmsas(&self) -> bool {
        matches!(self.tech, Tech::SevEs | Tech::SevSnp)
    }

    pub(crate) fn vcpus(&self) -> MutexGuard<'_, BTreeMap<VcpuId, Mailbox>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mailbox of a TD vCPU, made on first use: the vCPU itself is in the TDX module.
    pub(crate) fn td_wake(&self, vcpu: VcpuId) -> Result<Arc<Wake>> {
        if vcpu.0 >= self.params.vcpus {
            return Err(Error::NotFound(Field::Vcpu, vcpu.0.into()));
        }
        Ok(mailbox::of_td(self, vcpu))
    }

    /// The way to this VM, which programs keep: the VM may change.
    #[allow(dead_code)] // Only a TD's programs keep it.
    pub(crate) fn home(self: &Arc<Self>) -> Arc<Home> {
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        let own = || Arc::new(Home(RwLock::new(Arc::downgrade(self))));
        Arc::clone(home.get_or_insert_with(own))
    }

    /// Frames with decoded code, and a generation that no processor has seen, for the processors of a TD
    /// that go on in `to`.
    pub(crate) fn move_code(&self, to: &Self) {
        if let Some(code) = self.code.get() {
            // A VM whose processors never ran has none.
            let _ = to.code.set(Arc::clone(code));
        }
        to.generation.fetch_max(self.generation(), Ordering::AcqRel);
        to.change_memory(|_| ());
    }

    /// Whoever has the way to this VM comes to `to` from now on.
    pub(crate) fn move_home(&self, to: &Arc<Self>) {
        let own = self
            .home
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(moved) = own else { return };
        *moved.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(to);
        *to.home.lock().unwrap_or_else(PoisonError::into_inner) = Some(moved);
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VmInner {
    fn drop(&mut self) {
        self.machine.vm_gone();
    }
}

impl VmPort for SimVm {
    type Vcpu = SimVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<SimVcpu> {
        if id.0 >= self.inner.params.vcpus {
            return Err(Error::Invalid(Field::Vcpu, id.0.into()));
        }
        let mut vcpus = self.inner.vcpus();
        if vcpus.contains_key(&id) {
            return Err(Error::Exists(Field::Vcpu, id.0.into()));
        }
        let wake = Arc::new(Wake::default());
        let executes = self.inner.runs_machine_code() || self.inner.has_vmsas();
        if executes && self.inner.irqchip() != Irqchip::None {
            // Messages to a vCPU that has not run yet wait for it.
            let address = ApicAddress::after_reset(id.0);
            self.inner.processors().set(id.0, address, &wake);
        }
        let vcpu = SimVcpu::new(id, Arc::clone(&self.inner), Arc::clone(&wake));
        vcpus.insert(id, Mailbox::new(wake, &vcpu.core));
        Ok(vcpu)
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        tracing::debug!(slot = slot.id.0, gpa = %slot.gpa, bytes = slot.bytes(), "slot set");
        self.inner.change_memory(|memory| memory.set_slot(slot))
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        tracing::debug!(slot = slot.id.0, gpa = %slot.gpa, "slot deleted");
        self.inner.change_memory(|memory| memory.delete_slot(slot))
    }

    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.inner
            .change_memory(|memory| memory.dirty_log(slot, bitmap))
    }

    /// Does nothing: real mode needs no pages here.
    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    /// Does nothing: real mode needs no pages here.
    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        match self.inner.runs_machine_code() {
            true => Cpu::has_msr(index),
            false => crate::registers::has_msr(index),
        }
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        let wake = match self.inner.tech {
            Tech::Tdx => self.inner.td_wake(vcpu)?,
            _ => {
                let vcpus = self.inner.vcpus();
                let found = vcpus.get(&vcpu);
                Arc::clone(
                    &found
                        .ok_or(Error::NotFound(Field::Vcpu, vcpu.0.into()))?
                        .wake,
                )
            }
        };
        wake.post(vector);
        self.inner.turns.heard();
        Ok(())
    }

    /// A VM with interrupt controllers in the platform has them, unless it is a TD.
    fn devices(&self) -> Option<&dyn DevicePort> {
        let chips = self.inner.tech != Tech::Tdx && self.inner.irqchip() == Irqchip::Full;
        chips.then_some(self as &dyn DevicePort)
    }

    fn take_guest(&self, from: &Self) -> Result<()> {
        mailbox::hand_over(&self.inner, &from.inner)
    }

    fn td(&self) -> Option<&dyn TdPort> {
        crate::tdx::port(self)
    }

    fn sev(&self) -> Option<&dyn SevPort> {
        crate::sev::port(self)
    }

    /// Never fails.
    fn close(self) -> Result<()> {
        Ok(())
    }
}

impl SharedMemory for SimVm {
    fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()> {
        // Its page tables alone decide.
        if self.inner.shows_slots() {
            return Ok(());
        }
        // Processors may have pointers to the frames.
        self.inner
            .change_memory(|memory| memory.set_shared(first, pages, shared));
        Ok(())
    }

    fn read_slot(&self, gpa: Gpa, data: &mut [u8]) -> Result<()> {
        host_access(&self.inner, gpa, Copy::FromGuest(data))
    }

    fn write_slot(&self, gpa: Gpa, data: &[u8]) -> Result<()> {
        host_access(&self.inner, gpa, Copy::ToGuest(data))
    }
}

impl Drop for SimVm {
    fn drop(&mut self) {
        self.inner.close();
    }
}

impl fmt::Debug for SimVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimVm")
            .field("params", &self.inner.params)
            .field("table", &self.table_stats())
            .finish_non_exhaustive()
    }
}
