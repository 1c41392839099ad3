//! Real operations of KVM, for comparison.

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The number of calls in one measurement.
const CALLS: u32 = 200;

/// A VM on /dev/kvm whose guest only exits.
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Kvm {
    /// Opens /dev/kvm and makes the VM.
    pub fn open() -> Result<Self, Box<dyn Error>> {
        let kvm = kvm_ioctls::Kvm::new()?;
        let vm = kvm.create_vm()?;
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)])?;
        // out 0x10, al; jmp back
        memory.write_slice(&[0xe6, 0x10, 0xeb, 0xfc], GuestAddress(0x1000))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0x1000,
            memory_size: 0x1000,
            userspace_addr: memory.get_host_address(GuestAddress(0x1000))? as u64,
        };
        // SAFETY: the memory lives as long as the VM, which is dropped with it.
        unsafe { vm.set_user_memory_region(region)? };
        let vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        regs.rip = 0x1000;
        regs.rflags = 2;
        vcpu.set_regs(&regs)?;
        Ok(Self {
            kvm,
            vcpu,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Times `KVM_CHECK_EXTENSION`.
    pub fn ioctl_ns(&self) -> f64 {
        let start = Instant::now();
        for _ in 0..CALLS {
            black_box(self.kvm.check_extension_int(Cap::UserMemory));
        }
        start.elapsed().as_nanos() as f64 / f64::from(CALLS)
    }

    /// Times `KVM_RUN` until the next OUT.
    pub fn exit_ns(&mut self) -> Result<f64, Box<dyn Error>> {
        let start = Instant::now();
        for _ in 0..CALLS {
            match self.vcpu.run()? {
                VcpuExit::IoOut(0x10, _) => {}
                other => return Err(format!("unexpected exit {other:?}").into()),
            }
        }
        Ok(start.elapsed().as_nanos() as f64 / f64::from(CALLS))
    }
}
