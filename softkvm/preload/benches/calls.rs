//! The price of calls to the preloaded library: an ioctl that does nothing, the exit of a `KVM_RUN` beside that of the same
//! processor without the interface, VMs that are made and closed, and moves of guests between VMs.
//!
//! `cargo bench -p kvm-ops-preload --bench calls` prints the figures of docs/softkvm.md. Time is the thread's on a processor, so
//! that other programs do not count.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use kvm_ops::kvm::KvmHost;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    Exit, Gpa, Host, HostRange, MemSlot, Regs, Segment, SlotId, VcpuId, VcpuOps, Vendor, VmConfig,
    create,
};
use kvm_ops_uapi::ioctl::Ioctl;
use kvm_ops_uapi::sev::{INIT, INIT2, SevCmd, SevInit};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::vm::EnableCap;
use kvm_ops_uapi::{U32, U64, cap, ioctl};
use vm_memory::MmapRegion;

/// Set in a run under the library, to the vendor of its machine.
const INSIDE: &str = "KVM_OPS_INSIDE";
const CALLS: u32 = 1_000_000;
const EXITS: u32 = 200_000;
const VMS: u32 = 300;
const MOVES: u32 = 30_000;
/// Each is measured so often, and the best counts.
const ROUNDS: u32 = 5;

/// The time that the thread was on a processor.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is ours.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(read, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The time of some work, in the best of the rounds.
fn best(count: u32, mut work: impl FnMut()) -> Duration {
    let rounds = (0..ROUNDS).map(|_| {
        let started = thread_time();
        (0..count).for_each(|_| work());
        thread_time() - started
    });
    rounds.min().expect("rounds")
}

/// Nanoseconds of one.
fn each(count: u32, work: impl FnMut()) -> f64 {
    best(count, work).as_nanos() as f64 / f64::from(count)
}

fn call(fd: &impl AsRawFd, ioctl: Ioctl, argument: u64) -> i32 {
    // SAFETY: the library behind this checks every address.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), ioctl.number().into(), argument) };
    assert!(
        answer >= 0,
        "{}: {}",
        ioctl.name(),
        std::io::Error::last_os_error()
    );
    answer
}

fn open() -> File {
    File::open("/dev/kvm").expect("the library's")
}

fn make_vm(kvm: &File, kind: u64) -> OwnedFd {
    let fd = call(kvm, ioctl::KVM_CREATE_VM, kind);
    // SAFETY: the call has just made it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn null_ioctl() -> f64 {
    let kvm = open();
    each(CALLS, || {
        assert_eq!(
            call(&kvm, ioctl::KVM_CHECK_EXTENSION, cap::USER_MEMORY.into()),
            1
        );
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
    let time = each(EXITS, || {
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

/// A SEV command without a device.
fn command(vm: &OwnedFd, id: u32, data: u64) {
    let cmd = SevCmd {
        id: U32::new(id),
        data: U64::new(data),
        ..SevCmd::default()
    };
    call(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, &raw const cmd as u64);
}

/// VMs that are made and closed, guests of SEV with INIT2.
fn lives(kind: u64) -> Duration {
    let (kvm, init) = (open(), SevInit::default());
    best(VMS, || {
        let vm = make_vm(&kvm, kind);
        if (vm_type::SEV..=vm_type::SNP).contains(&kind) {
            command(&vm, INIT2, &raw const init as u64);
        }
    })
}

/// A guest of SEV that moves from VM to VM. The VM that it left is closed, and the next one made.
fn moves() -> Duration {
    let kvm = open();
    let mut guest = make_vm(&kvm, vm_type::DEFAULT);
    command(&guest, INIT, 0);
    let started = thread_time();
    for _ in 0..MOVES {
        let next = make_vm(&kvm, vm_type::DEFAULT);
        let mut args = EnableCap {
            cap: U32::new(cap::VM_MOVE_ENC_CONTEXT_FROM),
            ..EnableCap::default()
        };
        args.args[0] = U64::new(guest.as_raw_fd() as u64);
        call(&next, ioctl::KVM_ENABLE_CAP, &raw const args as u64);
        guest = next;
    }
    thread_time() - started
}

fn row(what: &str, time: Duration) {
    println!("| {what} | {:.0} ms |", time.as_secs_f64() * 1e3);
}

/// Names of the types of VMs, by their numbers.
const TYPES: [&str; 6] = [
    "normal",
    "software-protected",
    "SEV",
    "SEV-ES",
    "SNP",
    "TDX",
];

fn measure(vendor: Vendor) {
    let name = if vendor == Vendor::Amd {
        "AMD"
    } else {
        "Intel"
    };
    let types = call(&open(), ioctl::KVM_CHECK_EXTENSION, cap::VM_TYPES.into());
    for (kind, words) in (0..).zip(TYPES).filter(|(kind, _)| types >> kind & 1 != 0) {
        row(&format!("{name}: {VMS} VMs, {words}"), lives(kind));
    }
    if vendor == Vendor::Amd {
        row(
            &format!("{MOVES} moves of a SEV guest, each to a new VM"),
            moves(),
        );
        return;
    }
    println!("| an ioctl that does nothing | {:.0} ns |", null_ioctl());
    let inside = port_exit(&SimHost::new(vendor));
    let outside = port_exit(&KvmHost::open().expect("the library's"));
    println!("| a port exit of the processor alone | {inside:.0} ns |");
    println!("| the same by KVM_RUN | {outside:.0} ns |");
    println!("| the interface's part | {:.0} ns |", outside - inside);
}

fn main() {
    let vendors = [(Vendor::Amd, "amd"), (Vendor::Intel, "intel")];
    if let Some(inside) = std::env::var_os(INSIDE) {
        let found = vendors.iter().find(|(_, name)| inside == *name);
        return measure(found.expect("a vendor").0);
    }
    let own = std::env::current_exe().expect("a path");
    // Cargo makes the library beside its benches.
    let library = own.with_file_name("libkvm_ops_preload.so");
    for (_, vendor) in vendors {
        let ran = Command::new(&own)
            .env(INSIDE, vendor)
            .env("KVM_OPS_WITH", vendor)
            .env("LD_PRELOAD", &library)
            .status();
        assert!(ran.expect("this program").success());
    }
}
