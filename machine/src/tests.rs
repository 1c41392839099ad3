//! Building, running and giving back, on a host that does what the test says.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::testing::{Next, TestHost};
use crate::{
    ConsoleSink, End, ExitContext, Flow, Image, ImageFormat, Machine, MachineConfig, MachineError,
    RunLimits,
};
use kvm_ops::guest::Script;
use kvm_ops::{Error, ExitKind, Gfn, Gpa, Irqchip, Privacy, VcpuId};

const MIB: u64 = 1 << 20;

fn host(scripts: &[&[Next]]) -> TestHost {
    TestHost {
        scripts: scripts.iter().map(|script| script.to_vec()).collect(),
        ..TestHost::default()
    }
}

fn limits() -> RunLimits {
    RunLimits::none().deadline(Duration::from_secs(20))
}

fn nothing(_: &mut ExitContext<'_>) -> Flow {
    Flow::Continue
}

/// Runs an image on vCPUs that do what the scripts say, with a platform that could start them all.
fn ends(scripts: &[&[Next]]) -> (End, Vec<End>) {
    let host = host(scripts);
    let config = MachineConfig::new()
        .memory(MIB)
        .vcpus(scripts.len() as u32)
        .irqchip(Irqchip::Full)
        .image(Image::flat("x", [0xf4]));
    let mut machine = Machine::build(&host, config).unwrap();
    let report = machine.run(&nothing, limits()).unwrap();
    assert!(machine.destroy().is_clean());
    assert_eq!(host.account.alive(), [0; 3]);
    let ends = report.vcpus.into_iter().map(|vcpu| vcpu.end).collect();
    (report.end, ends)
}

#[test]
fn each_exit_that_ends_a_machine_ends_its_other_vcpus_too() {
    let data = vec![0x77; 2];
    let table = [
        (Next::Shutdown, End::TripleFault),
        (Next::SystemEvent(2), End::SystemEvent(2)),
        (Next::FailEntry(9), End::FailEntry(9)),
        (
            Next::InternalError(1),
            End::InternalError { suberror: 1, data },
        ),
        (Next::Unknown(99), End::Unhandled(ExitKind::Unknown)),
        (Next::Fail(Error::NoMemory), End::Failed(Error::NoMemory)),
    ];
    for (next, end) in table {
        let (machine, vcpus) = ends(&[&[], &[Next::Interrupted, next], &[]]);
        assert_eq!(machine, end);
        let peer = End::Peer(VcpuId(1));
        assert_eq!(vcpus, [peer.clone(), end, peer]);
    }
}

#[test]
fn a_halt_ends_its_vcpu_alone() {
    let (machine, vcpus) = ends(&[&[Next::Hlt], &[Next::Out(0x80, 0), Next::Hlt]]);
    assert_eq!(machine, End::Halted);
    assert_eq!(vcpus, [End::Halted, End::Halted]);
}

#[test]
fn programs_end_for_themselves_and_vcpus_without_one_do_not_start() {
    let host = TestHost {
        programs: true,
        ..host(&[&[Next::Shutdown], &[Next::Out(0x80, 0), Next::Hlt]])
    };
    let config = MachineConfig::new()
        .memory(MIB)
        .vcpus(3)
        .program(Script::new())
        .program(Script::new());
    let mut machine = Machine::build(&host, config).unwrap();
    let report = machine.run(&nothing, limits()).unwrap();
    let ends: Vec<_> = report.vcpus.iter().map(|vcpu| vcpu.end.clone()).collect();
    assert_eq!(ends, [End::Shutdown, End::Halted, End::NotStarted]);
    assert_eq!(report.vcpus[1].exits.of(ExitKind::IoOut), 1);
    assert_eq!(report.end, End::Shutdown);
    assert!(!report.is_failure());
}

#[test]
fn without_an_irqchip_only_the_first_vcpu_of_an_image_runs() {
    let host = host(&[&[Next::Hlt], &[Next::Shutdown]]);
    let config = MachineConfig::new()
        .memory(MIB)
        .vcpus(2)
        .image(Image::flat("x", [0xf4]));
    let report = Machine::build(&host, config)
        .unwrap()
        .run(&nothing, limits())
        .unwrap();
    assert_eq!(report.vcpus[1].end, End::NotStarted);
}

#[test]
fn a_stopper_ends_waiting_vcpus_before_during_and_after_a_run() {
    let host = host(&[]);
    let config = MachineConfig::new()
        .memory(MIB)
        .vcpus(2)
        .irqchip(Irqchip::Full);
    let mut machine = Machine::build(&host, config).unwrap();
    let stopper = machine.stopper();
    stopper.stop();
    let report = machine.run(&nothing, limits()).unwrap();
    assert_eq!(report.end, End::Stopped);
    for _ in 0..50 {
        let stopper = stopper.clone();
        let thread = thread::spawn(move || stopper.stop());
        let report = machine.run(&nothing, limits()).unwrap();
        thread.join().unwrap();
        assert_eq!(report.end, End::Stopped);
        assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped));
    }
    // The request was meant for the run that it ended.
    let soon = RunLimits::none().deadline(Duration::from_millis(1));
    assert_eq!(machine.run(&nothing, soon).unwrap().end, End::Deadline);
    assert!(machine.destroy().is_clean());
    stopper.stop();
}

#[test]
fn limits_of_time_and_exits_hold() {
    let forever = [Next::Out(0x80, 0); 100];
    let host = host(&[&forever]);
    let mut machine = Machine::build(&host, MachineConfig::new().memory(MIB)).unwrap();
    for made in [0, 1, 42] {
        let report = machine.run(&nothing, limits().max_exits(made)).unwrap();
        assert_eq!(report.end, End::ExitLimit);
        assert_eq!(report.exits().total(), made);
    }
    let soon = RunLimits::none().deadline(Duration::ZERO);
    assert_eq!(machine.run(&nothing, soon).unwrap().end, End::Deadline);
}

#[test]
fn a_handler_ends_the_machine_by_its_word_or_its_panic() {
    for (flow, end) in [
        (Some(Flow::Stop), End::Handler),
        (Some(Flow::End(End::DebugExit(3))), End::DebugExit(3)),
        (None, End::Panicked),
    ] {
        let host = host(&[&[Next::Out(0x80, 0)], &[]]);
        let config = MachineConfig::new()
            .memory(MIB)
            .vcpus(2)
            .irqchip(Irqchip::Full);
        let mut machine = Machine::build(&host, config).unwrap();
        let handler =
            |_: &mut ExitContext<'_>| flow.clone().unwrap_or_else(|| panic!("as the test wants"));
        let report = machine.run(&handler, limits()).unwrap();
        assert_eq!(report.end, end);
        assert_eq!(report.vcpus[1].end, End::Peer(VcpuId(0)));
        assert!(machine.destroy().is_clean());
        assert_eq!(host.account.alive(), [0; 3]);
    }
}

#[test]
fn devices_end_a_machine_at_a_memory_fault() {
    let host = host(&[&[Next::MemoryFault(Gpa::new(0x5000))]]);
    let mut machine = Machine::build(&host, MachineConfig::new().memory(MIB)).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, limits()).unwrap();
    let (gpa, access) = (Gpa::new(0x5000), Privacy::Private);
    assert_eq!(report.end, End::MemoryFault { gpa, access });
    assert!(report.is_failure());
}

#[test]
fn a_build_that_fails_at_any_operation_leaves_nothing_behind() {
    let config = || {
        let rom = Image::from_bytes("rom", [0xea; 0x1_0000]);
        assert_eq!(rom.format(), Some(ImageFormat::Firmware));
        MachineConfig::new().memory(5 << 30).vcpus(3).image(rom)
    };
    let counting = host(&[]);
    drop(Machine::build(&counting, config()).unwrap());
    let operations = counting.account.operations.load(Ordering::SeqCst);
    assert!(operations > 8, "{operations}");
    for fail_at in 1..=operations {
        let host = host(&[]);
        host.account.fail_at.store(fail_at, Ordering::SeqCst);
        let error = Machine::build(&host, config()).unwrap_err();
        assert!(
            matches!(
                error,
                MachineError::Create(_) | MachineError::Step { .. } | MachineError::Vcpu { .. }
            ),
            "operation {fail_at}: {error}"
        );
        assert_eq!(host.account.alive(), [0; 3], "operation {fail_at}");
    }
}

#[test]
fn numbers_out_of_range_are_refused_by_name() {
    let build = |config| Machine::build(&host(&[]), config).unwrap_err();
    let flat = || Image::flat("code", [0xf4]);
    let table = [
        (MachineConfig::new().vcpus(0), "create the VM"),
        (MachineConfig::new().vcpus(4097), "create the VM"),
        (MachineConfig::new().memory(0), "0x0 bytes is no memory"),
        (
            MachineConfig::new().memory(0x1001),
            "0x1001 bytes is not a multiple",
        ),
        (
            MachineConfig::new().memory(1 << 41),
            "0x20000000000 bytes is more than 1 TiB",
        ),
        (MachineConfig::new().memory(!0xfff), "more than 1 TiB"),
        (
            MachineConfig::new()
                .program(Script::new())
                .program(Script::new()),
            "2 guest programs for 1 vCPUs",
        ),
        (
            MachineConfig::new().image(Image::from_bytes("none", [])),
            "image none is empty",
        ),
        (
            MachineConfig::new().memory(0x7000).image(flat()),
            "image code needs 0x1 bytes at 0x7c00, and there are 0x0",
        ),
        (
            MachineConfig::new().image(flat().load_at(Gpa::new(u64::MAX))),
            "image code needs 0x1 bytes at 0xffffffffffffffff",
        ),
        (
            MachineConfig::new().image(flat().load_at(Gpa::new(MIB))),
            "entry 0x100000 cannot be reached from real mode",
        ),
        (
            MachineConfig::new().image(flat().entry(Gpa::new(0x7c01))),
            "entry 0x7c01 of image code is outside",
        ),
        (
            MachineConfig::new().image(flat().cmdline("x")),
            "option command line has no meaning for a flat image",
        ),
    ];
    for (config, text) in table {
        let error = build(config);
        let message = error.to_string();
        assert!(message.contains(text), "{message}");
        assert!(!message.ends_with('.'), "{message}");
        assert!(error.hint().is_some(), "{message}");
    }
}

#[test]
fn the_dirty_log_is_read_slot_by_slot() {
    let config = MachineConfig::new().memory(5 << 30).log_dirty(true);
    let machine = Machine::build(&host(&[]), config).unwrap();
    let above = (4 << 30) / 4096;
    assert_eq!(
        machine.dirty_frames().unwrap(),
        [0, 2, above, above + 2].map(Gfn::new)
    );
    let without = Machine::build(&host(&[]), MachineConfig::new()).unwrap();
    assert!(without.dirty_frames().is_err());
}

#[test]
fn each_vcpu_is_found_by_its_number() {
    let config = MachineConfig::new().memory(MIB).vcpus(2);
    let mut machine = Machine::build(&host(&[]), config).unwrap();
    assert_eq!(machine.vcpu_mut(VcpuId(1)).unwrap().id(), VcpuId(1));
    assert!(machine.vcpu_mut(VcpuId(2)).is_none());
}

#[test]
fn a_platform_that_runs_programs_refuses_images_and_the_other_way_round() {
    let platform = TestHost {
        programs: true,
        ..host(&[])
    };
    let image = MachineConfig::new().image(Image::flat("x", [0xf4]));
    let error = Machine::build(&platform, image).unwrap_err();
    assert!(
        matches!(error, MachineError::NeedsProcessor { .. }),
        "{error}"
    );
    let program = MachineConfig::new().program(Script::new());
    let error = Machine::build(&host(&[]), program).unwrap_err();
    assert!(matches!(error, MachineError::Vcpu { .. }), "{error}");
    assert_eq!(platform.account.alive(), [0; 3]);
}
