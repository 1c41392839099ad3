//! Machines on the software platform, which every machine has.

use std::thread;
use std::time::Duration;

use kvm_ops::guest::{Action, FnProgram, Outcome, Script};
use kvm_ops::sim::SimHost;
use kvm_ops::{ExitKind, Gfn, Gpa, Irqchip, Kind, Tech, VcpuId, Vendor};
use kvm_ops_machine::{ConsoleSink, End, Image, Machine, MachineConfig, MachineError, RunLimits};

const MIB: u64 = 1 << 20;

fn limits() -> RunLimits {
    RunLimits::none().deadline(Duration::from_secs(20))
}

/// Counts the byte at 0x1000 up to 200, by turns with another that waits for the other parity.
fn counter(parity: u8) -> impl FnMut(Outcome<'_>) -> Action<'static> + Send {
    const BYTES: [u8; 201] = {
        let mut bytes = [0; 201];
        let mut n = 0;
        while n < bytes.len() {
            bytes[n] = n as u8;
            n += 1;
        }
        bytes
    };
    const GPA: Gpa = Gpa::new(0x1000);
    move |last| match last {
        Outcome::Data([200]) => Action::Shutdown,
        Outcome::Data(&[n]) if n % 2 == parity => Action::Write {
            gpa: GPA,
            data: &BYTES[usize::from(n) + 1..usize::from(n) + 2],
        },
        _ => Action::Read { gpa: GPA, len: 1 },
    }
}

#[test]
fn a_program_prints_writes_memory_and_halts_on_either_vendors_host() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let host = SimHost::new(vendor);
        let program = Script::new()
            .print(0x3f8, "hello ")
            .print(0x402, "guest")
            .write(Gpa::new(0x2000), b"left here")
            .halt();
        let config = MachineConfig::new().memory(MIB).program(program);
        let mut machine = Machine::build(&host, config).unwrap();
        assert_eq!(machine.tech(), Tech::normal(vendor));
        let console = ConsoleSink::capture();
        let devices = machine.devices(console.clone());
        let report = machine.run(&devices, limits()).unwrap();
        assert_eq!(console.text(), "hello guest");
        assert_eq!(
            (&report.end, report.exits().of(ExitKind::IoOut)),
            (&End::Halted, 11)
        );
        let mut left = [0; 9];
        machine.memory().read(Gpa::new(0x2000), &mut left).unwrap();
        assert_eq!(&left, b"left here");
        assert!(machine.destroy().is_clean());
        assert_eq!(host.live_vms(), 0);
    }
}

#[test]
fn programs_on_two_vcpus_share_the_memory() {
    let host = SimHost::new(Vendor::Intel);
    let config = MachineConfig::new()
        .memory(MIB)
        .vcpus(2)
        .log_dirty(true)
        .program(FnProgram(counter(0)))
        .program(FnProgram(counter(1)));
    let mut machine = Machine::build(&host, config).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, limits()).unwrap();
    let ends: Vec<_> = report.vcpus.iter().map(|vcpu| &vcpu.end).collect();
    assert_eq!(ends, [&End::Shutdown; 2]);
    assert_eq!(machine.dirty_frames().unwrap(), [Gfn::new(1)]);
}

#[test]
fn programs_that_spin_or_wait_are_stopped() {
    for (irqchip, program) in [
        (
            Irqchip::None,
            FnProgram(|_: Outcome<'_>| Action::Read {
                gpa: Gpa::new(0),
                len: 1,
            }),
        ),
        (Irqchip::Full, FnProgram(|_: Outcome<'_>| Action::Halt)),
    ] as [(_, FnProgram<fn(Outcome<'_>) -> Action<'static>>); 2]
    {
        let host = SimHost::new(Vendor::Amd);
        let config = MachineConfig::new()
            .memory(MIB)
            .irqchip(irqchip)
            .program(program);
        let mut machine = Machine::build(&host, config).unwrap();
        let devices = machine.devices(ConsoleSink::discard());
        let stopper = machine.stopper();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            stopper.stop();
        });
        assert_eq!(machine.run(&devices, limits()).unwrap().end, End::Stopped);
        thread.join().unwrap();
        let soon = RunLimits::none().deadline(Duration::from_millis(5));
        assert_eq!(machine.run(&devices, soon).unwrap().end, End::Deadline);
        assert!(machine.destroy().is_clean());
        assert_eq!(host.live_vms(), 0);
    }
}

#[test]
fn a_run_goes_on_where_the_last_one_ended() {
    let host = SimHost::new(Vendor::Intel);
    let config = MachineConfig::new()
        .memory(MIB)
        .program(Script::new().print(0xe9, "abcdef"));
    let mut machine = Machine::build(&host, config).unwrap();
    let console = ConsoleSink::capture();
    let devices = machine.devices(console.clone());
    for printed in ["ab", "abcd", "abcdef"] {
        let report = machine.run(&devices, limits().max_exits(2)).unwrap();
        assert_eq!(
            (report.end, console.text().as_str()),
            (End::ExitLimit, printed)
        );
    }
    assert_eq!(machine.run(&devices, limits()).unwrap().end, End::Shutdown);
}

#[test]
fn what_the_platform_cannot_hold_is_refused_and_nothing_is_left() {
    let host = SimHost::new(Vendor::Intel);
    for (config, text) in [
        (MachineConfig::new().vcpus(0), "cannot create the VM"),
        (
            MachineConfig::new().memory(0x1234),
            "0x1234 bytes is not a multiple",
        ),
        (
            MachineConfig::new().kind(Kind::Of(Tech::Svm)),
            "cannot create the VM",
        ),
        (
            MachineConfig::new().kind(Kind::Of(Tech::SevSnp)),
            "cannot create the VM",
        ),
    ] {
        let error = Machine::build(&host, config).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.hint().is_some(), "{error}");
        assert_eq!(host.live_vms(), 0);
    }
    let missing = Image::open("/nonexistent/image").unwrap_err();
    assert!(matches!(missing, MachineError::Read { .. }));
    assert_eq!(missing.hint(), Some("check the path"));
    let directory = Image::open("/").unwrap_err();
    assert!(matches!(directory, MachineError::NotAFile { .. }));
}

#[test]
fn a_vcpu_without_a_program_does_not_start() {
    let host = SimHost::new(Vendor::Amd);
    let config = MachineConfig::new()
        .memory(MIB)
        .vcpus(2)
        .program(Script::new());
    let mut machine = Machine::build(&host, config).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, limits()).unwrap();
    assert_eq!(report.vcpus[1].id, VcpuId(1));
    assert_eq!(report.vcpus[1].end, End::NotStarted);
}
