//! A back end of our own: a VM that holds a number for its guest, and nothing else.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use kvm_ops::{
    Arc, Backend, Drained, Error, Exit, Field, FreeReport, KeyReleased, Kick, Life, MemSlot,
    OpName, Result, Step, Tech, VcpuId, VcpuOps, VmId, VmOps,
};

/// The name of our technology.
static ENCLAVE: OpName = OpName("enclave");

/// The VM. Its key is the number; the teardown forgets it.
#[derive(Debug)]
pub struct EnclaveVm {
    life: Arc<Life>,
    key: u64,
    vcpus: Mutex<BTreeSet<VcpuId>>,
}

impl EnclaveVm {
    /// Creates it.
    pub fn new(id: VmId, key: u64) -> Self {
        Self {
            life: Arc::new(Life::new(id, Tech::Other(&ENCLAVE))),
            key,
            vcpus: Mutex::new(BTreeSet::new()),
        }
    }
}

impl VmOps for EnclaveVm {
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
        self.key = 0;
        // SAFETY: the key was a number of our own, and it is forgotten; no hardware knew it.
        Ok(unsafe { self.life.key_released() })
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        self.life.drain_without_private_pages(released)
    }

    fn vm_free(self, _: Drained) -> FreeReport {
        FreeReport::new(self.life.id(), self.life.tech())
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::not_offered!("set_memory_slot")
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::not_offered!("delete_memory_slot")
    }
}

impl Backend for EnclaveVm {
    type Vcpu = EnclaveVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<EnclaveVcpu> {
        self.life.require_live()?;
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
            life: self.life.clone(),
            data: self.key.to_le_bytes(),
        })
    }
}

/// Its vCPU prints the number on port 2, for ever.
#[derive(Debug)]
pub struct EnclaveVcpu {
    id: VcpuId,
    life: Arc<Life>,
    data: [u8; 8],
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl VcpuOps for EnclaveVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        self.life.require(Step::Runnable)?;
        Ok(Exit::IoOut {
            port: 2,
            size: 4,
            count: 2,
        })
    }

    fn exit_data(&mut self) -> &mut [u8] {
        &mut self.data
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
