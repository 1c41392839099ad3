//! A VM: its memory and the mailboxes of its vCPUs. For a confidential VM this is the part that it
//! shares with the host.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_ops::{
    Error, Field, Gfn, Gpa, Irqchip, Kick, MemSlot, Result, SevPort, SharedMemory, Step, TdPort,
    Tech, VcpuId, VmParams, VmPort,
};

use crate::access::{Copy, host_access};
use crate::host::Machine;
use crate::irq::Wake;
use crate::memory::Memory;
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
    vcpus: Mutex<BTreeMap<VcpuId, Arc<Wake>>>,
    /// Set when the VM is closed: no vCPU runs afterwards.
    closed: AtomicBool,
}

impl SimVm {
    pub(crate) fn new(machine: Arc<Machine>, tech: Tech, params: VmParams) -> Self {
        machine.vm_created();
        Self {
            inner: Arc::new(VmInner {
                machine,
                tech,
                sev: crate::sev::Guest::default(),
                params,
                memory: RwLock::default(),
                vcpus: Mutex::default(),
                closed: AtomicBool::new(false),
            }),
        }
    }

    /// The state of the second-level table.
    pub fn table_stats(&self) -> TableStats {
        self.inner.read().stats()
    }
}

impl VmInner {
    pub(crate) fn irqchip(&self) -> Irqchip {
        self.params.irqchip
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
        *self.write() = Memory::default();
        self.sev.close();
        self.vcpus().values().for_each(|wake| wake.kick());
    }

    fn vcpus(&self) -> MutexGuard<'_, BTreeMap<VcpuId, Arc<Wake>>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mailbox of a TD vCPU, made on first use: the vCPU itself is in the TDX module.
    pub(crate) fn td_wake(&self, vcpu: VcpuId) -> Result<Arc<Wake>> {
        if vcpu.0 >= self.params.vcpus {
            return Err(Error::NotFound(Field::Vcpu, vcpu.0.into()));
        }
        Ok(Arc::clone(self.vcpus().entry(vcpu).or_default()))
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
        vcpus.insert(id, Arc::clone(&wake));
        Ok(SimVcpu::new(id, Arc::clone(&self.inner), wake))
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        tracing::debug!(slot = slot.id.0, gpa = %slot.gpa, bytes = slot.bytes(), "slot set");
        self.inner.write().set_slot(slot)
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        tracing::debug!(slot = slot.id.0, gpa = %slot.gpa, "slot deleted");
        self.inner.write().delete_slot(slot)
    }

    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.inner.write().dirty_log(slot, bitmap)
    }

    /// Does nothing: guest programs have no real mode that would need pages.
    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    /// Does nothing: guest programs have no real mode that would need pages.
    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        crate::registers::has_msr(index)
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        let wake = match self.inner.tech {
            Tech::Tdx => self.inner.td_wake(vcpu)?,
            _ => {
                let vcpus = self.inner.vcpus();
                let wake = vcpus.get(&vcpu);
                Arc::clone(wake.ok_or(Error::NotFound(Field::Vcpu, vcpu.0.into()))?)
            }
        };
        wake.post(vector);
        Ok(())
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
        self.inner.write().set_shared(first, pages, shared);
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
