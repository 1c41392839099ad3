//! One guest program and one machine for every kind of VM, on the software platform.

use std::time::Duration;

use kvm_ops::guest::{Action, GuestProgram, Outcome};
use kvm_ops::sim::SimHost;
use kvm_ops::{Error, ExitKind, FreeReport, Gpa, Host, Kind, Privacy, SharedMask, Tech};
use kvm_ops_machine::{ConsoleSink, End, Machine, MachineConfig, RunLimits, RunReport};

const PAGES: u64 = 4;
const AT: Gpa = Gpa::new(0x20_0000);

/// Writes a range as private memory, shares it, writes it for the host, takes it back, and halts.
#[derive(Default)]
struct Converts {
    mask: Option<SharedMask>,
    done: usize,
    faults: Vec<kvm_ops::guest::GuestFault>,
}

impl Converts {
    fn at(&self, privacy: Privacy) -> Gpa {
        let mask = self.mask.expect("started");
        let gfn = kvm_ops::Gfn::containing(AT);
        // A normal VM has one kind of memory.
        mask.join(gfn, privacy).unwrap_or(AT)
    }
}

impl GuestProgram for Converts {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        match last {
            Outcome::Start { mask, .. } => self.mask = Some(mask),
            Outcome::Fault(fault) => self.faults.push(fault),
            _ => {}
        }
        self.done += 1;
        match self.done {
            1 => Action::Unshare {
                gpa: AT,
                pages: PAGES,
            },
            2 => Action::Write {
                gpa: self.at(Privacy::Private),
                data: b"secret",
            },
            3 => Action::Share {
                gpa: AT,
                pages: PAGES,
            },
            4 => Action::Write {
                gpa: self.at(Privacy::Shared),
                data: b"public",
            },
            5 => Action::Out {
                port: 0x3f8,
                data: if self.faults.is_empty() { b"." } else { b"!" },
            },
            6 => Action::Halt,
            _ => Action::Shutdown,
        }
    }
}

fn life(tech: Tech) -> (RunReport, String, [u8; 6], FreeReport) {
    let host = SimHost::new(tech.vendor().expect("a technology of this project"));
    let config = MachineConfig::new()
        .kind(Kind::Of(tech))
        .memory(16 << 20)
        .program(Converts::default());
    let mut machine =
        Machine::build(&host, config).unwrap_or_else(|error| panic!("{tech}: {error:?}"));
    assert_eq!(machine.tech(), tech);
    let console = ConsoleSink::capture();
    let devices = machine.devices(console.clone());
    let limits = RunLimits::none().deadline(Duration::from_secs(60));
    let report = machine.run(&devices, limits).unwrap();
    let mut shared = [0; 6];
    machine.memory().read(AT, &mut shared).unwrap();
    let freed = machine.destroy();
    assert_eq!(host.live_vms(), 0, "{tech}");
    if let Some(pages) = host.pages() {
        assert_eq!(pages.frames_out(), 0, "{tech}: every page is back");
    }
    (report, console.text(), shared, freed)
}

#[test]
fn one_program_converts_memory_on_every_technology_that_has_private_memory() {
    for tech in Tech::ALL {
        let (report, text, shared, freed) = life(tech);
        assert_eq!(report.end, End::Halted, "{tech}: {report:?}");
        assert_eq!(&shared, b"public", "{tech}");
        assert!(freed.is_clean(), "{tech}: {freed:?}");
        assert_eq!(
            text,
            if tech.is_confidential() { "." } else { "!" },
            "{tech}"
        );
        // No program has an instruction pointer, and a protected guest keeps that to itself, too.
        let is_secret = matches!(report.vcpus[0].position, Some(Err(Error::Protected(_))));
        let registers_are_secret = tech.is_confidential() && tech != Tech::Sev;
        assert_eq!(is_secret, registers_are_secret, "{tech}: {report:?}");
        if tech.is_confidential() {
            assert!(report.exits().of(ExitKind::MapGpaRange) >= 1, "{tech}");
            assert!(freed.pages_freed >= 1, "{tech}: {freed:?}");
            assert_eq!(freed.keys_freed, 1, "{tech}");
        }
    }
}
