//! The smallest back end: a VM without memory whose vCPU shuts down at once.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{
    Arc, Backend, Drained, Error, Exit, Field, FreeReport, KeyReleased, Kick, MemSlot, Result,
    Step, Tech, VcpuId, VcpuOps, VmId, VmOps,
};

/// A VM that holds nothing; an example of a back end, and a variant for examples of enums.
#[derive(Debug)]
pub struct NullVm {
    id: VmId,
    step: Step,
    /// The vCPUs and slots that exist, one bit each: the VM has 64 of either at the most.
    vcpus: AtomicU64,
    slots: AtomicU64,
}

impl NullVm {
    /// Creates it.
    pub const fn new(id: VmId) -> Self {
        Self {
            id,
            step: Step::Created,
            vcpus: AtomicU64::new(0),
            slots: AtomicU64::new(0),
        }
    }
}

fn bit(number: u32, field: Field) -> Result<u64> {
    1u64.checked_shl(number)
        .ok_or(Error::Invalid(field, number.into()))
}

impl VmOps for NullVm {
    fn tech(&self) -> Tech {
        Tech::Vmx
    }

    fn id(&self) -> VmId {
        self.id
    }

    fn step(&self) -> Step {
        self.step
    }

    fn vm_init(&mut self) -> Result<()> {
        self.step.require(Step::Created)?;
        self.step = Step::Initialized;
        Ok(())
    }

    fn vm_finalize(&mut self) -> Result<()> {
        self.step.require(Step::Initialized)?;
        self.step = Step::Runnable;
        Ok(())
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        self.step
            .require_one_of(&[Step::Created, Step::Initialized, Step::Runnable])?;
        self.step = Step::KeyReleased;
        Ok(KeyReleased::without_key(self.id))
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        if released.vm() != self.id {
            return Err((Error::Invalid(Field::Token, released.vm().0), released));
        }
        if let Err(error) = self.step.require(Step::KeyReleased) {
            return Err((error, released));
        }
        self.step = Step::Drained;
        Ok(released.without_private_pages())
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        FreeReport::new(self.id, self.tech())
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.step.require_live()?;
        slot.last()?;
        self.slots
            .fetch_or(bit(slot.id.0, Field::Slot)?, Ordering::Relaxed);
        Ok(())
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.step.require_live()?;
        let bit = bit(slot.id.0, Field::Slot)?;
        if self.slots.fetch_and(!bit, Ordering::Relaxed) & bit == 0 {
            return Err(Error::NotFound(Field::Slot, slot.id.0.into()));
        }
        Ok(())
    }
}

impl Backend for NullVm {
    type Vcpu = NullVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<NullVcpu> {
        self.step.require_live()?;
        let bit = bit(id.0, Field::Vcpu)?;
        if self.vcpus.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return Err(Error::Exists(Field::Vcpu, id.0.into()));
        }
        Ok(NullVcpu { id })
    }
}

/// A vCPU that shuts down at once.
#[derive(Debug)]
pub struct NullVcpu {
    id: VcpuId,
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl VcpuOps for NullVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
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
