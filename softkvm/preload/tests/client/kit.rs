//! The test kit for back ends, on VMs that the kernel holds.

use kvm_ops::held::HeldVm;
use kvm_ops::kit::{self, Outcome, Subject};
use kvm_ops::kvm::KvmHost;
use kvm_ops::{Host, HostRange, Result, Tech, VmParams};
use vm_memory::MmapRegion;

use crate::common::again;
use crate::guest::{TECHS, host};

struct Source {
    host: KvmHost,
    tech: Tech,
    memory: MmapRegion<()>,
}

impl Subject for Source {
    type Vm = HeldVm<KvmHost>;

    fn create(&mut self) -> Result<Self::Vm> {
        let id = self.host.next_vm_id();
        HeldVm::create(&self.host, id, self.tech, &VmParams::new(2))
    }

    fn memory(&mut self) -> Option<HostRange> {
        // SAFETY: the region outlives every VM that the kit creates, and there are no references to
        // its contents.
        unsafe { HostRange::new(self.memory.as_ptr() as u64, self.memory.size() as u64) }.ok()
    }

    fn live(&mut self) -> Option<u64> {
        Some(std::fs::read_dir("/proc/self/fd").unwrap().count() as u64)
    }
}

#[test]
fn every_check_passes_for_a_td() {
    if again("kit::every_check_passes_for_a_td", "intel").is_none() {
        check(&[Tech::Tdx]);
    }
}

#[test]
fn every_check_passes_for_sev_guests() {
    if again("kit::every_check_passes_for_sev_guests", "amd").is_none() {
        check(&TECHS);
    }
}

fn check(techs: &[Tech]) {
    for &tech in techs {
        let report = kit::run(&mut Source {
            host: host(),
            tech,
            memory: MmapRegion::new(2 * 4096).unwrap(),
        });
        let all = report.checks();
        let passed = all.iter().all(|(_, outcome)| *outcome == Outcome::Passed);
        assert!(passed, "{tech}: {report}");
    }
}
