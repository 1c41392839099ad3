//! The test kit for back ends, on VMs that the kernel holds.

use kvm_ops::held::HeldVm;
use kvm_ops::kit::{self, Outcome, Subject};
use kvm_ops::kvm::KvmHost;
use kvm_ops::{EncParams, Host, HostRange, Result, SevParams, Tech, VmParams};
use vm_memory::MmapRegion;

use crate::common::{again, is_inside};
use crate::guest::{TECHS, host};

struct Source {
    host: KvmHost,
    tech: Tech,
    params: SevParams,
    memory: MmapRegion<()>,
}

impl Source {
    fn with(&self, params: SevParams) -> Result<HeldVm<KvmHost>> {
        let enc = match self.tech {
            Tech::Tdx => EncParams::Default,
            Tech::Vmx | Tech::Svm => EncParams::Private,
            _ => EncParams::Sev(Box::new(params)),
        };
        let params = VmParams {
            enc,
            ..VmParams::new(2)
        };
        let id = self.host.next_vm_id();
        HeldVm::create(&self.host, id, self.tech, &params)
    }
}

impl Subject for Source {
    type Vm = HeldVm<KvmHost>;

    fn create(&mut self) -> Result<Self::Vm> {
        self.with(self.params.clone())
    }

    fn create_receiver(&mut self) -> Result<Self::Vm> {
        self.with(SevParams {
            arrives: self.params.movable,
            ..SevParams::default()
        })
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
        check(&[Tech::Tdx], &SevParams::default());
    }
}

#[test]
fn every_check_passes_for_sev_guests() {
    if again("kit::every_check_passes_for_sev_guests", "amd").is_none() {
        check(&TECHS, &SevParams::default());
    }
}

#[test]
fn every_check_passes_for_sev_guests_that_move() {
    if again("kit::every_check_passes_for_sev_guests_that_move", "amd").is_none() {
        let movable = SevParams {
            ghcb_version: 1,
            movable: true,
            ..SevParams::default()
        };
        check(&[Tech::Sev, Tech::SevEs], &movable);
    }
}

#[test]
fn every_check_passes_for_normal_vms_with_private_memory() {
    let test = "kit::every_check_passes_for_normal_vms_with_private_memory";
    if is_inside() {
        return check(&[Tech::normal(host().vendor())], &SevParams::default());
    }
    for vendor in ["amd", "intel"] {
        again(test, vendor);
    }
}

fn check(techs: &[Tech], params: &SevParams) {
    for &tech in techs {
        let report = kit::run(&mut Source {
            host: host(),
            tech,
            params: params.clone(),
            memory: MmapRegion::new(2 * 4096).unwrap(),
        });
        let all = report.checks();
        let passed = all.iter().all(|(_, outcome)| *outcome == Outcome::Passed);
        assert!(passed, "{tech}: {report}");
    }
}
