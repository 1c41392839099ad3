//! The back-end test kit, run on every back end of the library and on every available host.
#![cfg(all(feature = "intel", feature = "amd", feature = "sim", feature = "kvm"))]

use std::marker::PhantomData;

use kvm_ops::kit::{self, Report, Subject};
use kvm_ops::kvm::KvmHost;
use kvm_ops::sev::SevVm;
use kvm_ops::sim::SimHost;
use kvm_ops::svm::SvmVm;
use kvm_ops::tdx::TdxVm;
use kvm_ops::vmx::VmxVm;
use kvm_ops::{AnyVm, Backend, Host, HostRange, Result, Tech, Vendor, VmParams};
use vm_memory::MmapRegion;

/// VMs of one back end on one host.
struct Source<H, V, F> {
    host: H,
    create: F,
    memory: MmapRegion<()>,
    live: fn(&H) -> u64,
    vm: PhantomData<V>,
}

impl<H: Host, V: Backend, F: FnMut(&H) -> Result<V>> Source<H, V, F> {
    fn run(host: H, live: fn(&H) -> u64, create: F) -> Report {
        let memory = MmapRegion::new(2 * 4096).unwrap();
        kit::run(&mut Source {
            host,
            create,
            memory,
            live,
            vm: PhantomData,
        })
    }
}

impl<H: Host, V: Backend, F: FnMut(&H) -> Result<V>> Subject for Source<H, V, F> {
    type Vm = V;

    fn create(&mut self) -> Result<V> {
        (self.create)(&self.host)
    }

    fn memory(&mut self) -> Option<HostRange> {
        // SAFETY: the region outlives every VM that the kit creates, and there are no references to
        // its contents.
        unsafe { HostRange::new(self.memory.as_ptr() as u64, self.memory.size() as u64) }.ok()
    }

    fn live(&mut self) -> Option<u64> {
        Some((self.live)(&self.host))
    }
}

fn vms(host: &SimHost) -> u64 {
    host.live_vms() as u64
}

/// The file descriptors of this process. One test at a time has VMs, so changes come from them.
fn descriptors(_: &KvmHost) -> u64 {
    std::fs::read_dir("/proc/self/fd").unwrap().count() as u64
}

#[track_caller]
fn passes(report: Report) {
    assert!(report.passed(), "{report}");
    let skipped = report
        .checks()
        .iter()
        .filter(|(_, o)| matches!(o, kit::Outcome::Skipped(_)));
    assert_eq!(skipped.count(), 0, "{report}");
}

const TWO: VmParams = VmParams::new(2);

#[test]
fn vmx_on_the_software_platform() {
    let host = SimHost::new(Vendor::Intel);
    passes(Source::run(host, vms, |host| {
        VmxVm::create(host, host.next_vm_id(), &TWO)
    }));
}

#[test]
fn svm_on_the_software_platform() {
    let host = SimHost::new(Vendor::Amd);
    passes(Source::run(host, vms, |host| {
        SvmVm::create(host, host.next_vm_id(), &TWO)
    }));
}

#[test]
fn tdx_on_the_software_platform() {
    let host = SimHost::new(Vendor::Intel);
    passes(Source::run(host, vms, |host| {
        TdxVm::create(host, host.next_vm_id(), &TWO)
    }));
}

#[test]
fn the_enum_of_all_back_ends_on_the_software_platform() {
    let host = SimHost::new(Vendor::Intel);
    passes(Source::run(host, vms, |host| {
        VmxVm::create(host, host.next_vm_id(), &TWO).map(AnyVm::from)
    }));
    let host = SimHost::new(Vendor::Amd);
    passes(Source::run(host, vms, |host| {
        SvmVm::create(host, host.next_vm_id(), &TWO).map(AnyVm::from)
    }));
}

#[test]
fn the_hosts_normal_back_end_on_dev_kvm() {
    let host = match KvmHost::open() {
        Ok(host) => host,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let report = match host.vendor() {
        Vendor::Intel => Source::run(host, descriptors, |host| {
            VmxVm::create(host, host.next_vm_id(), &TWO)
        }),
        _ => Source::run(host, descriptors, |host| {
            SvmVm::create(host, host.next_vm_id(), &TWO)
        }),
    };
    passes(report);
}

#[test]
fn sev_on_the_software_platform() {
    use kvm_ops::PspPort;
    for tech in [Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        let host = SimHost::new(Vendor::Amd);
        let live = |host: &SimHost| {
            let asids = host.psp().map_or(0, |psp| psp.asid_pools().in_use());
            let frames = host.pages().map_or(0, |pages| pages.frames_out());
            vms(host) + frames + u64::from(asids)
        };
        passes(Source::run(host, live, |host| {
            SevVm::create(host, host.next_vm_id(), tech, &TWO)
        }));
    }
}
