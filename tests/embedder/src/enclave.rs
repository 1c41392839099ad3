//! A back end of our own: a VM that holds a number for its guest, and nothing else.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use kvm_ops::{
    Arc, Backend, Drained, Error, Exit, Field, FreeReport, KeyReleased, Kick, MemSlot, Result,
    Step, Tech, VcpuId, VcpuOps, VmId, VmOps,
};

/// The VM. Its key is the number; the teardown forgets it.
#[derive(Debug)]
pub struct EnclaveVm {
    id: VmId,
    step: Step,
    key: u64,
    vcpus: Mutex<BTreeSet<VcpuId>>,
}

impl EnclaveVm {
    /// Creates it.
    pub fn new(id: VmId, key: u64) -> Self {
        Self {
            id,
            step: Step::Created,
            key,
            vcpus: Mutex::new(BTreeSet::new()),
        }
    }
}

impl VmOps for EnclaveVm {
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
        self.key = 0;
        self.step = Step::KeyReleased;
        // SAFETY: the key was a number of our own, and it is forgotten; no hardware knew it.
        Ok(unsafe { KeyReleased::assert_released(self.id) })
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        if released.vm() != self.id {
            return Err((Error::Invalid(Field::Token, released.vm().0), released));
        }
        if let Err(error) = self.step.require(Step::KeyReleased) {
            return Err((error, released));
        }
        self.step = Step::Drained;
        // SAFETY: the VM never had a private page.
        Ok(unsafe { released.assert_drained() })
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        FreeReport::new(self.id, self.tech())
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::unsupported!("set_memory_slot")
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::unsupported!("delete_memory_slot")
    }
}

impl Backend for EnclaveVm {
    type Vcpu = EnclaveVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<EnclaveVcpu> {
        self.step.require_live()?;
        if id.0 >= 4 {
            return Err(Error::Invalid(Field::Vcpu, id.0.into()));
        }
        if !self
            .vcpus
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id)
        {
            return Err(Error::Exists(Field::Vcpu, id.0.into()));
        }
        Ok(EnclaveVcpu {
            id,
            key: self.key,
            answer: [0; 8],
        })
    }
}

/// Its vCPU prints the number on port 2, for ever.
#[derive(Debug)]
pub struct EnclaveVcpu {
    id: VcpuId,
    key: u64,
    answer: [u8; 8],
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl VcpuOps for EnclaveVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit<'_>> {
        self.answer = self.key.to_le_bytes();
        Ok(Exit::IoOut {
            port: 2,
            size: 4,
            data: &self.answer,
        })
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
