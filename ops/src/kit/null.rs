//! The smallest back end: a VM without memory whose vCPU shuts down at once.

use crate::{
    Arc, Backend, Drained, Exit, FreeReport, KeyReleased, Kick, MemSlot, Result, Step, Tech,
    VcpuId, VcpuOps, VmId, VmOps,
};

/// A VM that holds nothing; an example of a back end, and a variant for examples of enums.
#[derive(Debug)]
pub struct NullVm {
    id: VmId,
    step: Step,
}

impl NullVm {
    /// Creates it.
    pub const fn new(id: VmId) -> Self {
        Self {
            id,
            step: Step::Created,
        }
    }
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

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained> {
        self.step.require(Step::KeyReleased)?;
        self.step = Step::Drained;
        Ok(released.without_private_pages())
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        FreeReport::new(self.id, self.tech())
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.step.require_live()?;
        slot.last().map(drop)
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        self.step.require_live()
    }
}

impl Backend for NullVm {
    type Vcpu = NullVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<NullVcpu> {
        self.step.require_live()?;
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
