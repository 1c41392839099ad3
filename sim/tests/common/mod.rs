//! Common to the tests: host memory to lend, and VMs.

use kvm_ops_core::{Gpa, Host, HostRange, MemSlot, SlotId, Tech, VcpuId, Vendor, VmParams, VmPort};
use kvm_ops_core::{Irqchip, VcpuOps, guest::GuestProgram};
use kvm_ops_sim::{SimHost, SimVcpu, SimVm};
use vm_memory::MmapRegion;

/// Anonymous memory, kept until the end of the test.
pub(crate) struct Ram(MmapRegion<()>);

impl Ram {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(MmapRegion::new(bytes).unwrap())
    }

    pub(crate) fn range(&self) -> HostRange {
        // SAFETY: the tests drop their VMs before their `Ram`, and only read it through
        // `Ram::read`, which copies.
        unsafe { HostRange::new(self.0.as_ptr() as u64, self.0.size() as u64).unwrap() }
    }

    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.0.size());
        // SAFETY: the region is mapped for as long as `self`, and the range lies in it.
        (at..at + len)
            .map(|i| unsafe { self.0.as_ptr().add(i).read_volatile() })
            .collect()
    }

    pub(crate) fn slot(&self, id: u32, gpa: u64) -> MemSlot {
        MemSlot::new(SlotId(id), Gpa::new(gpa), self.range())
    }
}

pub(crate) fn load(vcpu: &mut SimVcpu, program: impl GuestProgram + 'static) {
    let programs = vcpu.programs().unwrap();
    programs.load_program(Box::new(program)).unwrap();
}

pub(crate) fn vm_with(irqchip: Irqchip, vcpus: u32) -> (SimHost, SimVm) {
    let host = SimHost::new(Vendor::Intel);
    let params = VmParams {
        vcpus,
        irqchip,
        enc: kvm_ops_core::EncParams::Default,
    };
    let vm = host.create_vm(Tech::Vmx, &params).unwrap();
    (host, vm)
}

pub(crate) fn vm() -> (SimHost, SimVm) {
    vm_with(Irqchip::None, 1)
}

pub(crate) fn vcpu(vm: &SimVm, program: impl GuestProgram + 'static) -> SimVcpu {
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    load(&mut vcpu, program);
    vcpu
}
