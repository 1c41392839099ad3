//! Guests that try to make their host grow: what a guest asks for outside of its memory is refused, and
//! the books of a VM are bounded by its memory.

use std::time::Duration;

use kvm_ops::guest::{Action, FnProgram, Outcome};
use kvm_ops::sim::SimHost;
use kvm_ops::{Gpa, Kind, Tech};
use kvm_ops_machine::{ConsoleSink, Machine, MachineConfig, RunLimits};

/// The resident size of this process, in MiB.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4 / 1024
}

/// A guest's request for conversion number `n`.
type Request = fn(u64) -> Action<'static>;

fn share(n: u64) -> Action<'static> {
    let gpa = Gpa::new((0x100_0000 + n * 8192) & 0x3fff_ffff_f000);
    Action::Share { gpa, pages: 1 }
}

fn alternate(n: u64) -> Action<'static> {
    let gpa = |at: u64| Gpa::new(at & 0x3fff_ffff_f000);
    if n.is_multiple_of(2) {
        Action::Unshare {
            gpa: gpa(0x100_0000 + n * 8192),
            pages: 1,
        }
    } else {
        Action::Share {
            gpa: gpa(0x100_2000 + n * 8192),
            pages: 1,
        }
    }
}

fn everything(n: u64) -> Action<'static> {
    let (gpa, pages) = (Gpa::new(0), 1 << 34);
    if n.is_multiple_of(2) {
        Action::Share { gpa, pages }
    } else {
        Action::Unshare { gpa, pages }
    }
}

fn read_far(n: u64) -> Action<'static> {
    let gpa = Gpa::new((0x100_0000 + n * 4096) & 0x3fff_ffff_f000);
    Action::Read { gpa, len: 8 }
}

#[test]
fn no_guest_of_any_technology_grows_its_host() {
    let requests: [(&str, Request); 4] = [
        ("share single pages", share),
        ("alternate", alternate),
        ("everything at once", everything),
        ("touch far away", read_far),
    ];
    for tech in Tech::ALL {
        for (name, request) in requests {
            let host = SimHost::new(tech.vendor().unwrap());
            let mut n = 0;
            let program = FnProgram(move |_: Outcome<'_>| {
                n += 1;
                request(n)
            });
            let config = MachineConfig::new()
                .kind(Kind::Of(tech))
                .memory(1 << 20)
                .program(program);
            let mut machine = Machine::build(&host, config).unwrap();
            let devices = machine.devices(ConsoleSink::discard());
            let before = resident();
            let limits = RunLimits::none().deadline(Duration::from_millis(400));
            let report = machine.run(&devices, limits).unwrap();
            let grown = resident().saturating_sub(before);
            // At the old rate of 25 to 40 MiB a second this was 10 to 16 MiB; a TD's tables and the
            // guest's memory together stay below 4 MiB.
            assert!(grown < 8, "{tech}, {name}: {grown} MiB, {report:?}");
            let freed = machine.destroy();
            assert!(freed.is_clean(), "{tech}, {name}: {freed:?}");
        }
    }
}
