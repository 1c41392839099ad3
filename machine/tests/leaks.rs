//! Many machines in one process, on the real /dev/kvm. The only test of its process, because it
//! counts what the whole process holds.
#![cfg(target_arch = "x86_64")]

mod support;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use kvm_ops::kvm::KvmHost;
use kvm_ops_machine::{ConsoleSink, End, Image, Machine, MachineConfig};
use support::{kvm, limits};

const AT_ONCE: usize = 100;
const CYCLES: usize = 300;
const DROPS: usize = 50;
/// Far more for all machines than the C library keeps for ended threads (NOISE).
const RAM: u64 = 256 << 20;
const NOISE: u64 = 4 << 30;

fn build(host: &KvmHost) -> Machine<KvmHost> {
    // mov al, 'x'; out 0xe9, al; hlt
    let image = Image::flat("x", [0xb0, b'x', 0xe6, 0xe9, 0xf4]);
    Machine::build(host, MachineConfig::new().memory(RAM).image(image)).unwrap()
}

fn run(mut machine: Machine<KvmHost>) {
    let console = ConsoleSink::capture();
    let devices = machine.devices(console.clone());
    let report = machine.run(&devices, limits()).unwrap();
    assert_eq!((report.end, console.text().as_str()), (End::Halted, "x"));
    assert!(machine.destroy().is_clean());
}

fn entries(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

/// File descriptors, threads, and mappings of KVM's.
fn held() -> (usize, usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let kvm = maps.lines().filter(|line| line.contains("kvm")).count();
    (entries("/proc/self/fd"), entries("/proc/self/task"), kvm)
}

/// Waits until the process holds no more than that: the kernel takes an ended thread off its list a
/// moment after its end can be seen.
fn settles_at(before: (usize, usize, usize), when: &str) {
    let start = Instant::now();
    while held() != before {
        let waited = start.elapsed();
        assert!(
            waited < Duration::from_secs(10),
            "{when}: {:?}, {before:?} before",
            held()
        );
        thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes of address space. It is compared roughly, since the C library keeps stacks and reserves
/// heaps for threads that have ended.
fn mapped() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn machines_leave_no_fd_thread_or_mapping() {
    let Some(host) = kvm() else { return };
    // Once before counting: the first vCPU of a process installs a signal handler, and so on.
    run(build(&host));
    let (before, size) = (held(), mapped());

    let machines: Vec<_> = (0..AT_ONCE).map(|_| build(&host)).collect();
    assert!(mapped() - size >= AT_ONCE as u64 * RAM);
    thread::scope(|scope| {
        for machine in machines {
            scope.spawn(|| run(machine));
        }
    });
    settles_at(before, "after machines at once");
    for _ in 0..CYCLES {
        run(build(&host));
    }
    (0..DROPS).for_each(|_| drop(build(&host)));
    settles_at(before, "after life cycles");
    let grown = mapped().saturating_sub(size);
    assert!(grown < NOISE, "{grown} bytes more");
}
