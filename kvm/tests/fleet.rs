//! Many VMs in one process leave nothing behind. The only test of its binary, because it counts
//! what the whole process holds.

mod common;

use std::fs;
use std::sync::Arc;
use std::thread;

use common::{CODE, Memory};
use kvm_ops_core::{Exit, Irqchip, Kick, VcpuId, VcpuOps, VmPort};
use kvm_ops_kvm::{EventFd, IoEvent, IoEventMatch, KvmHost, KvmVcpu, KvmVm};

const AT_ONCE: usize = 100;
const LIFE_CYCLES: usize = 300;

/// The resources of the process: descriptors by their target, threads, and mappings by name.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: Vec<String>,
    threads: usize,
    vcpu_mappings: usize,
    mappings: usize,
}

impl Held {
    fn now() -> Self {
        // Counted before directories are read, whose own descriptors come and go.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mut descriptors: Vec<String> = fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .map(|target| target.display().to_string())
            .filter(|target| !target.starts_with("/proc/"))
            .collect();
        descriptors.sort();
        Self {
            descriptors,
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            vcpu_mappings: maps.lines().filter(|l| l.contains("kvm-vcpu")).count(),
            mappings: maps.lines().count(),
        }
    }
}

/// A VM with all that a VM can hold: two vCPUs, interrupt controllers, events, a dirty log.
fn full_vm(host: &KvmHost, memory: &Memory, irqchip: Irqchip) -> (KvmVm, Vec<KvmVcpu>) {
    // out 0x10, al; hlt
    memory.write(CODE as usize, &[0xe6, 0x10, 0xf4]);
    let vm = common::vm(host, 2, irqchip);
    let mut slot = memory.slot(0, 0);
    slot.flags.log_dirty = true;
    vm.set_memory_slot(&slot).unwrap();
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vm.register_ioevent(&event, IoEvent::Port(0x80), IoEventMatch::Any)
        .unwrap();
    if irqchip == Irqchip::Full {
        vm.register_irqfd(&event, 5).unwrap();
    }
    let vcpus = (0..2)
        .map(|id| {
            let mut vcpu = vm.create_vcpu(VcpuId(id)).unwrap();
            common::real_mode(&mut vcpu);
            vcpu
        })
        .collect();
    (vm, vcpus)
}

fn runs_to_its_port(vcpu: &mut KvmVcpu) {
    match vcpu.vcpu_run().unwrap() {
        Exit::IoOut { port: 0x10, .. } => {}
        exit => panic!("{exit:?}"),
    }
}

/// One life: a VM is made, runs and ends, each time in another order of ends. Its vCPU's handle
/// remains.
fn live(host: &KvmHost, memory: &Memory, life: usize) -> Arc<dyn Kick> {
    let irqchip = [Irqchip::None, Irqchip::Full, Irqchip::Split][life % 3];
    let (vm, mut vcpus) = full_vm(host, memory, irqchip);
    runs_to_its_port(&mut vcpus[0]);
    let handle = vcpus[0].kick_handle();
    match life % 4 {
        0 => {
            vm.close().unwrap();
            drop(vcpus);
        }
        1 => {
            drop(vcpus);
            vm.close().unwrap();
        }
        2 => {
            drop(vm);
            thread::spawn(move || drop(vcpus)).join().unwrap();
        }
        _ => {
            vcpus.pop().unwrap().vcpu_free().unwrap();
            drop(vm);
            handle.kick();
        }
    }
    handle
}

#[test]
fn a_hundred_vms_at_once_and_300_lives_leave_no_descriptor_thread_or_mapping() {
    let Some(host) = common::host() else { return };
    let memory: Vec<Memory> = (0..AT_ONCE).map(|_| Memory::new(4)).collect();
    let mut handles: Vec<Arc<dyn Kick>> = Vec::new();
    // Some before the count, so that what the process acquires once is there: the signal's
    // handler, a thread's stack, the allocator's arenas.
    for (life, memory) in memory.iter().enumerate().take(8) {
        handles.push(live(&host, memory, life));
    }
    let before = Held::now();

    let mut fleet: Vec<_> = memory
        .iter()
        .map(|memory| full_vm(&host, memory, Irqchip::None))
        .collect();
    for (_, vcpus) in &mut fleet {
        vcpus.iter_mut().for_each(runs_to_its_port);
    }
    let during = Held::now();
    let added = |name: &str| {
        let count = |held: &Held| held.descriptors.iter().filter(|d| d.contains(name)).count();
        count(&during) - count(&before)
    };
    // The counts see what they are to see.
    assert_eq!(added("kvm-vm"), AT_ONCE);
    assert_eq!(added("kvm-vcpu"), 2 * AT_ONCE);
    assert!(during.vcpu_mappings >= 2 * AT_ONCE);
    drop(fleet);

    for life in 0..LIFE_CYCLES {
        handles.push(live(&host, &memory[life % AT_ONCE], life));
    }
    // Handles outlive their vCPUs, keep nothing of them, and do nothing.
    let after = Held::now();
    handles.iter().for_each(|handle| handle.kick());
    assert_eq!(after.descriptors, before.descriptors);
    assert_eq!(after.threads, before.threads);
    assert_eq!(after.vcpu_mappings, 0);
    assert_eq!(after.mappings, before.mappings);
}
