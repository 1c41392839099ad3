//! Machines on VMs that the kernel holds: as on the software platform, but for the host.

use kvm_ops::{Gpa, Kind, Privacy, Step, Tech, VmOps};
use kvm_ops_machine::{LaunchPage, Machine, MachineConfig};

use crate::common::again;
use crate::guest::{FIRST, PAGES, TECHS, contents, host};

fn build(techs: &[Tech]) {
    for &tech in techs {
        let pages = (0..PAGES).map(|page| {
            LaunchPage::measured(Gpa::new(FIRST + page * 4096), Box::new(contents(page)))
        });
        let config = MachineConfig::new()
            .kind(Kind::Of(tech))
            .vcpus(2)
            .memory(1 << 20)
            .launch(pages);
        let machine = Machine::build(&host(), config).unwrap();
        assert_eq!(
            (machine.tech(), machine.vm().step()),
            (tech, Step::Runnable)
        );
        let first = kvm_ops::Gfn::new(0);
        assert_eq!(machine.vm().back_end().privacy(first), Privacy::Private);
        assert!(machine.destroy().is_clean());
    }
}

#[test]
fn a_machine_launches_its_pages_as_an_sev_guest() {
    if again(
        "machine::a_machine_launches_its_pages_as_an_sev_guest",
        "amd",
    )
    .is_none()
    {
        build(&TECHS);
    }
}

#[test]
fn a_machine_launches_its_pages_as_a_td() {
    if again("machine::a_machine_launches_its_pages_as_a_td", "intel").is_none() {
        build(&[Tech::Tdx]);
    }
}
