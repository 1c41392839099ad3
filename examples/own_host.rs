//! A host that is neither `/dev/kvm` nor the software platform, as a bare-metal hypervisor has one:
//! no `std` in the host itself, and a "processor" that only prints and halts.
//!
//! `cargo run --example own_host`

use kvm_ops::{
    Arc, Error, Exit, Field, Gpa, Host, Kick, MemSlot, NoPort, Result, Tech, VcpuId, VcpuOps,
    Vendor, VmId, VmIds, VmParams, VmPort,
};

/// The machine: Intel processors, and a counter for VMs.
#[derive(Clone)]
struct Metal(Arc<VmIds>);

impl Host for Metal {
    type Vm = MetalVm;
    type Seam = NoPort;
    type Psp = NoPort;
    type Pages = NoPort;

    fn name(&self) -> &'static str {
        "metal"
    }

    fn vendor(&self) -> Vendor {
        Vendor::Intel
    }

    fn next_vm_id(&self) -> VmId {
        self.0.next()
    }

    fn create_vm(&self, _: Tech, params: &VmParams) -> Result<MetalVm> {
        Ok(MetalVm {
            vcpus: params.vcpus,
        })
    }
}

/// A VM. A real one would hold its EPT root here.
struct MetalVm {
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
        kvm_ops::not_offered!("set_memory_slot")
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        kvm_ops::not_offered!("delete_memory_slot")
    }

    fn dirty_log(&self, _: &MemSlot, _: &mut [u64]) -> Result<()> {
        kvm_ops::not_offered!("dirty_log")
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
        kvm_ops::not_offered!("deliver_interrupt")
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

/// A vCPU that prints a text and halts. A real one would execute VMLAUNCH.
struct MetalVcpu {
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

fn main() -> Result<()> {
    let host = Metal(Arc::new(VmIds::new()));
    let mut vm = kvm_ops::create(&host, &kvm_ops::VmConfig::normal())?;
    vm.finalize()?;
    let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    loop {
        match vcpu.vcpu_run()? {
            Exit::IoOut { .. } => print!("{}", String::from_utf8_lossy(vcpu.exit_data())),
            Exit::Hlt => break,
            other => println!("{other:?}"),
        }
    }
    vcpu.vcpu_free()?;
    let report = vm.destroy();
    println!(
        "{} VM {} on {}, clean: {}",
        report.tech,
        report.vm,
        host.name(),
        report.is_clean()
    );
    Ok(())
}
