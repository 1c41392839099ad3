//! Tests that the parser never panics and that a report gives the right exit code.

use std::time::Duration;

use proptest::prelude::*;

use super::report::{FleetReport, Status, VmReport};
use super::resources::Resources;
use super::source::Source;
use super::{parse, plan, spec};
use crate::args::HostChoice;
use crate::exit_code::Code;
use crate::failure::Failure;

fn read(text: &str) -> Result<Vec<spec::VmSpec>, Failure> {
    parse::parse(&Source::new("test", text, ""), HostChoice::Auto)
}

#[test]
fn the_built_in_fleet_is_well_formed() {
    let vms = parse::parse(&Source::built_in(), HostChoice::Auto).unwrap();
    assert_eq!(vms.iter().map(|vm| vm.names().count()).sum::<usize>(), 18);
}

#[test]
fn what_a_vm_states_goes_before_the_defaults_and_those_before_the_command_line() {
    let text = "[defaults]\nmemory = \"8M\"\nhost = \"sim\"\ntimeout = \"1s\"\n\
                [[vm]]\nname = \"a\"\npayload = \"pair\"\n\
                [[vm]]\nname = \"b\"\npayload = \"hello\"\nmemory = 0x200000\nhost = \"kvm\"\n";
    let vms = parse::parse(&Source::new("test", text, ""), HostChoice::Auto).unwrap();
    assert_eq!(
        (vms[0].memory, vms[0].vcpus, vms[0].host),
        (8 << 20, 2, HostChoice::Sim)
    );
    assert_eq!(
        (vms[1].memory, vms[1].vcpus, vms[1].host),
        (2 << 20, 1, HostChoice::Kvm)
    );
    assert_eq!(vms[1].timeout, Duration::from_secs(1));
}

proptest! {
    /// The parser and the problem printer do not panic on any text.
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        prop_assert!(!matches!(read(&text), Err(Failure::BrokenPipe)));
    }

    /// The same for texts that resemble a fleet file.
    #[test]
    fn any_damage_to_the_built_in_fleet_is_read_or_refused(
        at in 0..super::source::DEFAULT.len(),
        len in 0..40usize,
        put in "[\\[\\]={}\"'\n#a-z0-9é\u{1F600}-]{0,6}",
    ) {
        let text = super::source::DEFAULT;
        let end = (at + len).min(text.len());
        prop_assume!(text.is_char_boundary(at) && text.is_char_boundary(end));
        let damaged = format!("{}{put}{}", &text[..at], &text[end..]);
        prop_assert!(!matches!(read(&damaged), Err(Failure::BrokenPipe)));
    }
}

/// Reports of VMs with these results, made without a run.
fn report(statuses: &[Status], leaks: usize) -> FleetReport {
    let vms = read("[[vm]]\nname = \"a\"\npayload = \"pair\"\n").unwrap();
    let reports = statuses
        .iter()
        .map(|status| {
            let mut report = VmReport::skipped(plan::Skipped {
                name: "a".into(),
                spec: &vms[0],
                why: String::new(),
            });
            report.status = *status;
            report.leaks = vec!["page".into(); if *status == Status::Ok { leaks } else { 0 }];
            report
        })
        .collect();
    let held = Resources::now();
    FleetReport::new(
        "test".into(),
        reports,
        Vec::new(),
        held.clone(),
        held,
        Duration::ZERO,
    )
}

#[test]
fn the_worst_decides_the_exit_code() {
    use Status::{Failed, Ok, Skipped, Stopped};
    for (statuses, leaks, code) in [
        (&[Ok, Ok][..], 0, Code::Fine),
        (&[Ok, Skipped], 0, Code::Fine),
        (&[Ok, Failed], 0, Code::Guest),
        (&[Ok, Failed, Stopped], 0, Code::Interrupted),
        (&[Ok, Failed, Stopped], 1, Code::Leak),
        (&[Ok], 2, Code::Leak),
    ] {
        assert_eq!(report(statuses, leaks).code(), code, "{statuses:?} {leaks}");
    }
}

#[test]
fn what_was_left_out_counts_only_as_such() {
    let totals = report(&[Status::Ok, Status::Skipped], 3).totals;
    assert_eq!((totals.vms, totals.ok, totals.skipped), (2, 1, 1));
    assert_eq!((totals.vcpus, totals.pages, totals.leaks), (2, 32, 3));
}
