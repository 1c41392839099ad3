//! The back-end test kit on all three kinds of guest, with SNP initialised and without.

mod common;

use common::{Ram, TECHS, host, host_from, platform};
use kvm_ops_core::kit::{self, Outcome, Subject};
use kvm_ops_core::{Host, HostRange, PspPort, Result, Tech, VmParams};
use kvm_ops_sev::SevVm;
use kvm_ops_sim::{SevSetup, SimHost};

struct Guests {
    host: SimHost,
    tech: Tech,
    ram: Ram,
}

impl Subject for Guests {
    type Vm = SevVm<SimHost>;

    fn create(&mut self) -> Result<Self::Vm> {
        let host = &self.host;
        SevVm::create(host, host.next_vm_id(), self.tech, &VmParams::new(2))
    }

    fn memory(&mut self) -> Option<HostRange> {
        Some(self.ram.range())
    }

    /// VMs, pages and ASIDs; used-up ASIDs come back with the next flush.
    fn live(&mut self) -> Option<u64> {
        let pools = self.host.psp()?.asid_pools();
        let vms = self.host.live_vms() as u64;
        Some(vms + self.host.pages()?.frames_out() + u64::from(pools.in_use()))
    }
}

#[track_caller]
fn passes(host: SimHost, tech: Tech) {
    let ram = Ram::new(2 * 4096);
    let report = kit::run(&mut Guests { host, tech, ram });
    assert!(report.passed(), "{tech}\n{report}");
    let skipped = |o: &Outcome| matches!(o, Outcome::Skipped(_));
    assert!(!report.checks().iter().any(|(_, o)| skipped(o)), "{report}");
}

#[test]
fn the_kit_passes_on_every_kind_of_guest() {
    for tech in TECHS {
        passes(host(1), tech);
    }
}

#[test]
fn the_kit_passes_on_a_machine_without_snp() {
    for tech in [Tech::Sev, Tech::SevEs] {
        passes(host_from(SevSetup::new(platform(2)).without_snp()), tech);
    }
}
