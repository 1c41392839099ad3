//! The price of a call to the preloaded library: an ioctl that does nothing, and the exit of a `KVM_RUN` beside that of
//! the same processor without the interface.
//!
//! `cargo bench -p kvm-ops-preload --bench calls` prints the figures of docs/softkvm.md.

use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Instant;

use kvm_ops::kvm::KvmHost;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    Exit, Gpa, Host, HostRange, MemSlot, Regs, Segment, SlotId, VcpuId, VcpuOps, Vendor, VmConfig,
    create,
};
use kvm_ops_uapi::{cap, ioctl};
use vm_memory::MmapRegion;

/// Set in the run under the library.
const INSIDE: &str = "KVM_OPS_INSIDE";
const CALLS: u32 = 1_000_000;
const EXITS: u32 = 200_000;
/// Each is measured so often, and the best counts.
const ROUNDS: u32 = 5;

/// Nanoseconds of one, in the best of the rounds.
fn best(count: u32, mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        (0..count).for_each(|_| work());
        best = best.min(started.elapsed().as_nanos() as f64 / f64::from(count));
    }
    best
}

fn null_ioctl() -> f64 {
    let kvm = std::fs::File::open("/dev/kvm").expect("the library's");
    let (fd, number) = (kvm.as_raw_fd(), ioctl::KVM_CHECK_EXTENSION.number());
    best(CALLS, || {
        // SAFETY: no memory is passed.
        let answer = unsafe { libc::ioctl(fd, number.into(), u64::from(cap::USER_MEMORY)) };
        assert_eq!(answer, 1);
    })
}

/// An exit of a guest that writes a port again and again.
fn port_exit<H: Host>(host: &H) -> f64 {
    // out 0x80, al; jmp back
    const CODE: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
    let memory = MmapRegion::<()>::new(0x1000).expect("memory");
    // SAFETY: the mapping has so many bytes, and nothing else refers to them.
    unsafe { memory.as_ptr().copy_from(CODE.as_ptr(), CODE.len()) };
    // SAFETY: the region stays mapped until the VM is gone, and nothing references its contents.
    let range = unsafe { HostRange::new(memory.as_ptr() as u64, memory.size() as u64) };
    let slot = MemSlot::new(SlotId(0), Gpa::new(0), range.expect("a range"));
    let mut vm = create(host, &VmConfig::normal().vcpus(1)).expect("a VM");
    vm.set_memory_slot(slot).expect("a slot");
    vm.finalize().expect("a VM that runs");
    let mut vcpu = vm.create_vcpu(VcpuId(0)).expect("a vCPU");
    let mut sregs = vcpu.sregs().expect("registers");
    sregs.cs = Segment {
        base: 0,
        selector: 0,
        ..sregs.cs
    };
    vcpu.set_sregs(&sregs).expect("real mode");
    let regs = Regs {
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_regs(&regs).expect("a start");
    let time = best(EXITS, || {
        let exit = vcpu.vcpu_run();
        assert!(
            matches!(exit, Ok(Exit::IoOut { port: 0x80, .. })),
            "{exit:?}"
        );
    });
    drop(vcpu);
    assert!(vm.destroy().is_clean());
    time
}

fn main() {
    if std::env::var_os(INSIDE).is_none() {
        let own = std::env::current_exe().expect("a path");
        // Cargo makes the library beside its benches.
        let library = own.with_file_name("libkvm_ops_preload.so");
        let ran = Command::new(&own)
            .env(INSIDE, "1")
            .env("KVM_OPS_WITH", "intel")
            .env("LD_PRELOAD", library)
            .status();
        assert!(ran.expect("this program").success());
        return;
    }
    let call = null_ioctl();
    println!("| an ioctl that does nothing | {call:.0} ns |");
    let inside = port_exit(&SimHost::new(Vendor::Intel));
    let outside = port_exit(&KvmHost::open().expect("the library's"));
    println!("| a port exit of the processor alone | {inside:.0} ns |");
    println!("| the same by KVM_RUN | {outside:.0} ns |");
    println!("| the interface's part | {:.0} ns |", outside - inside);
}
