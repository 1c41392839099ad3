//! The smallest back end: a VM without memory whose vCPU shuts down at once.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;

use crate::{
    Backend, Drained, Error, Exit, Field, FreeReport, KeyReleased, Kick, Life, MemSlot, OpName,
    Result, SlotId, Step, Tech, VcpuId, VcpuOps, VmId, VmOps,
};

/// A VM that holds nothing: an example of a back end, and a variant for examples of enums.
#[derive(Debug)]
pub struct NullVm {
    life: Arc<Life>,
    /// The vCPUs that exist, one bit each: the VM has at most 64.
    vcpus: AtomicU64,
    slots: Mutex<BTreeMap<SlotId, MemSlot>>,
}

static NULL: OpName = OpName("null");

impl NullVm {
    /// Creates it.
    pub fn new(id: VmId) -> Self {
        Self {
            life: Arc::new(Life::new(id, Tech::Other(&NULL))),
            vcpus: AtomicU64::new(0),
            slots: Mutex::new(BTreeMap::new()),
        }
    }
}

impl VmOps for NullVm {
    fn tech(&self) -> Tech {
        self.life.tech()
    }

    fn id(&self) -> VmId {
        self.life.id()
    }

    fn step(&self) -> Step {
        self.life.step()
    }

    fn vm_init(&mut self) -> Result<()> {
        self.life.advance(Step::Initialized)
    }

    fn vm_finalize(&mut self) -> Result<()> {
        self.life.advance(Step::Runnable)
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        Ok(self.life.release_without_key())
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        self.life.drain_without_private_pages(released)
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        FreeReport::new(self.life.id(), self.life.tech())
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.life.require_live()?;
        slot.last()?;
        self.slots.lock().insert(slot.id, *slot);
        Ok(())
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.life.require_live()?;
        let mut slots = self.slots.lock();
        match slots.get(&slot.id) {
            Some(known) if known.is_same_place(slot) => {
                slots.remove(&slot.id);
                Ok(())
            }
            _ => Err(Error::NotFound(Field::Slot, slot.id.0.into())),
        }
    }
}

impl Backend for NullVm {
    type Vcpu = NullVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<NullVcpu> {
        self.life.require_live()?;
        let bit = 1u64
            .checked_shl(id.0)
            .ok_or(Error::Invalid(Field::Vcpu, id.0.into()))?;
        if self.vcpus.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return Err(Error::Exists(Field::Vcpu, id.0.into()));
        }
        let life = self.life.clone();
        Ok(NullVcpu { id, life })
    }
}

/// A vCPU that shuts down at once.
#[derive(Debug)]
pub struct NullVcpu {
    id: VcpuId,
    life: Arc<Life>,
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl VcpuOps for NullVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        self.life.require(Step::Runnable)?;
        Ok(Exit::Shutdown)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }
}
