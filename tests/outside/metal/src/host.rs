//! The host: Intel processors, whose "VM" prints a text and halts.

use kvm_ops::{
    Arc, Error, Exit, Field, Gpa, Host, Kick, MemSlot, NoPort, Result, Tech, VcpuId, VcpuOps,
    Vendor, VmId, VmIds, VmParams, VmPort, not_offered,
};

/// The machine.
#[derive(Clone)]
pub struct Metal {
    vendor: Vendor,
    ids: Arc<VmIds>,
}

impl Metal {
    /// A machine with processors of this vendor.
    pub fn new(vendor: Vendor) -> Self {
        Self {
            vendor,
            ids: Arc::new(VmIds::new()),
        }
    }
}

impl Host for Metal {
    type Vm = MetalVm;
    type Seam = NoPort;
    type Psp = NoPort;
    type Pages = NoPort;

    fn name(&self) -> &'static str {
        "metal"
    }

    fn vendor(&self) -> Vendor {
        self.vendor
    }

    fn next_vm_id(&self) -> VmId {
        self.ids.next()
    }

    fn create_vm(&self, _: Tech, params: &VmParams) -> Result<MetalVm> {
        Ok(MetalVm {
            vcpus: params.vcpus,
        })
    }
}

/// A VM without memory.
pub struct MetalVm {
    vcpus: u32,
}

impl VmPort for MetalVm {
    type Vcpu = MetalVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<MetalVcpu> {
        if id.0 >= self.vcpus {
            return Err(Error::Invalid(Field::Vcpu, id.0.into()));
        }
        Ok(MetalVcpu {
            id,
            text: *b"metal\n",
            data: 0..0,
        })
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        not_offered!("set_memory_slot")
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        not_offered!("delete_memory_slot")
    }

    fn dirty_log(&self, _: &MemSlot, _: &mut [u64]) -> Result<()> {
        not_offered!("dirty_log")
    }

    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, _: u32) -> bool {
        false
    }

    fn deliver_interrupt(&self, _: VcpuId, _: u8) -> Result<()> {
        not_offered!("deliver_interrupt")
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

/// A vCPU.
pub struct MetalVcpu {
    id: VcpuId,
    text: [u8; 6],
    /// The part of the text in the last exit.
    data: core::ops::Range<usize>,
}

/// Its runs are short, so there is nothing to interrupt.
struct Never;

impl Kick for Never {
    fn kick(&self) {}
}

impl VcpuOps for MetalVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        let next = self.data.end;
        if next == self.text.len() {
            self.data = next..next;
            return Ok(Exit::Hlt);
        }
        self.data = next..next + 1;
        let (port, size, count) = (0x3f8, 1, 1);
        Ok(Exit::IoOut { port, size, count })
    }

    fn exit_data(&mut self) -> &mut [u8] {
        &mut self.text[self.data.clone()]
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(Never)
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        self.data = 0..0;
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }
}
