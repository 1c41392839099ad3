//! Common to the tests: a host or a reason to skip, guest memory, and VMs that run code.

#![allow(dead_code, unreachable_pub)] // Each test binary uses a part.

use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ops_core::{
    Exit, Gpa, Host, HostRange, Irqchip, MemSlot, Regs, Segment, SlotFlags, SlotId, Sregs, Tech,
    VcpuId, VcpuOps, VmParams, VmPort,
};
use kvm_ops_kvm::{HostMachine, KvmHost, KvmVcpu, KvmVm};

/// The host, or `None` after saying why the test is skipped.
pub fn host() -> Option<KvmHost> {
    match KvmHost::open() {
        Ok(host) => Some(host),
        Err(error) => {
            println!("skipped: {error}: {}", error.hint());
            None
        }
    }
}

/// The value of a call that the host may not offer, or `None` after saying so.
pub fn offered<T>(result: kvm_ops_core::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error @ kvm_ops_core::Error::HostLacks(_)) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// True if the vendor's module holds guests, and not one that interprets some of their
/// instructions, with gaps. Otherwise prints so.
pub fn on_vendor_module() -> bool {
    let modules = HostMachine::probe().modules;
    let own = modules.contains_key("kvm_intel") || modules.contains_key("kvm_amd");
    if !own {
        println!("skipped: guests run on {:?}", modules.keys());
    }
    own
}

/// As `on_vendor_module`, on a processor that is no emulated one; emulators have gaps too.
pub fn on_hardware() -> bool {
    let guest = HostMachine::probe().is_guest();
    if guest {
        println!("skipped: the host is a guest itself");
    }
    !guest && on_vendor_module()
}

pub fn vm(host: &KvmHost, vcpus: u32, irqchip: Irqchip) -> KvmVm {
    let params = VmParams {
        vcpus,
        irqchip,
        enc: kvm_ops_core::EncParams::Default,
    };
    host.create_vm(Tech::normal(host.vendor()), &params)
        .unwrap()
}

/// Anonymous memory that a guest may use.
pub struct Memory {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory, accessed with atomics only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(pages: usize) -> Self {
        let bytes = pages * 4096;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        Self {
            address: address.cast(),
            bytes,
        }
    }

    pub fn byte(&self, at: usize) -> &AtomicU8 {
        assert!(at < self.bytes);
        // SAFETY: inside the mapping, which `self` keeps; all access is atomic.
        unsafe { AtomicU8::from_ptr(self.address.add(at)) }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            self.byte(at + i).store(*byte, Ordering::SeqCst);
        }
    }

    pub fn read(&self, at: usize, bytes: usize) -> Vec<u8> {
        (at..at + bytes)
            .map(|at| self.byte(at).load(Ordering::SeqCst))
            .collect()
    }

    pub fn range(&self) -> HostRange {
        // SAFETY: each test declares its memory before its VMs, so that it outlives them, and no
        // reference to it exists but atomics.
        unsafe { HostRange::new(self.address as u64, self.bytes as u64) }.unwrap()
    }

    pub fn slot(&self, id: u32, gpa: u64) -> MemSlot {
        MemSlot::new(SlotId(id), Gpa::new(gpa), self.range())
    }

    pub fn slot_with(&self, id: u32, gpa: u64, flags: SlotFlags) -> MemSlot {
        MemSlot {
            flags,
            ..self.slot(id, gpa)
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its VMs are gone.
        unsafe { libc::munmap(self.address.cast(), self.bytes) };
    }
}

/// Reads the special registers, changes them and writes them back.
pub fn change_sregs(vcpu: &mut KvmVcpu, change: impl FnOnce(&mut Sregs)) {
    let mut sregs = vcpu.sregs().unwrap();
    change(&mut sregs);
    vcpu.set_sregs(&sregs).unwrap();
}

/// Runs the vCPU, which must write these bytes to the port.
#[track_caller]
pub fn expect_out(vcpu: &mut KvmVcpu, port: u16, data: &[u8]) {
    let exit = vcpu.vcpu_run().unwrap();
    assert!(
        matches!(exit, Exit::IoOut { port: p, .. } if p == port),
        "{exit:x?}"
    );
    assert_eq!(vcpu.exit_data(), data);
}

/// The address of test code in real mode.
pub const CODE: u64 = 0x1000;

/// Puts the vCPU into real mode at `CODE`, with flat segments at 0 and a stack below the code.
pub fn real_mode(vcpu: &mut KvmVcpu) {
    let data = Segment {
        limit: 0xffff,
        kind: 3,
        present: true,
        s: true,
        ..Segment::default()
    };
    change_sregs(vcpu, |sregs| {
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cs = Segment { kind: 11, ..data };
    });
    let regs = Regs {
        rip: CODE,
        rsp: 0x0ff0,
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

/// A VM with one vCPU that starts `code` in real mode, in `memory` from address 0.
pub fn real_mode_vm(
    host: &KvmHost,
    memory: &Memory,
    code: &[u8],
    irqchip: Irqchip,
) -> (KvmVm, KvmVcpu) {
    memory.write(CODE as usize, code);
    let vm = vm(host, 1, irqchip);
    vm.set_memory_slot(&memory.slot(0, 0)).unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    real_mode(&mut vcpu);
    (vm, vcpu)
}
