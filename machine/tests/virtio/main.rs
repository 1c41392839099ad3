//! One virtio device, built on virtio-queue, that moves data in a normal VM on /dev/kvm and in every kind of
//! VM on the software platform. The device has a thread, which the driver wakes by an event and
//! which interrupts by another.

mod console;
mod driver;
mod linear;
mod mmio;
mod real_mode;
#[path = "../support/mod.rs"]
mod support;

use kvm_ops::guest::GuestProgram;
use kvm_ops::sim::SimHost;
use kvm_ops::{ExitKind, Gpa, Host, Irqchip, Kind, Msi, Tech, VcpuId, Vendor};
use kvm_ops_machine::{
    ConsoleSink, End, Image, Inside, Machine, MachineConfig, MachineError, RunReport,
};

use console::Console;
use linear::{Cpu, Linear};
use support::{CONFIDENTIAL, every_kind, kvm, limits};

/// The device, its interrupt line, and the vector of that line.
const DEVICE: Gpa = Gpa::new(0xd000_0000);
const GSI: u32 = 5;
const VECTOR: u8 = 0x25;

const MESSAGE: &[u8] = b"a message for the device";
const REPLY: &str = "ecived eht rof egassem a";

/// The end of a run, the guest's output, and the messages that the device got.
struct Ran {
    report: RunReport,
    printed: String,
    messages: Vec<Vec<u8>>,
}

fn run<H: Host>(machine: &mut Machine<H>, device: Gpa) -> Result<Ran, MachineError> {
    let sink = ConsoleSink::capture();
    let others = machine.devices(sink.clone());
    let console = Console::new(&machine.parts(), device, GSI, others)?;
    let (report, worked) = machine.run_while(&console, limits(), |parts| console.work(parts))?;
    worked?;
    Ok(Ran {
        report,
        printed: sink.text(),
        messages: console.messages.into_inner().unwrap(),
    })
}

/// Runs a guest program with the device on the software platform.
fn soft(vendor: Vendor, kind: Kind, program: impl GuestProgram + 'static) -> Ran {
    let config = MachineConfig::new()
        .kind(kind)
        .memory(16 << 20)
        .irqchip(Irqchip::Split)
        .program(program);
    let mut machine = Machine::build(&SimHost::new(vendor), config).unwrap();
    let parts = machine.parts();
    parts
        .set_gsi_route(GSI, Msi::to(VcpuId(0), VECTOR))
        .unwrap();
    let ran = run(&mut machine, DEVICE).unwrap();
    assert_eq!(ran.report.end, End::Shutdown, "{kind:?}: {}", ran.printed);
    assert!(machine.destroy().is_clean());
    ran
}

#[test]
fn a_message_goes_to_the_device_and_back_in_every_kind_of_vm_on_the_software_platform() {
    for (vendor, kind) in every_kind() {
        let ran = soft(vendor, kind, Linear::new(driver::talk));
        assert_eq!(ran.messages, [MESSAGE], "{kind:?}");
        assert_eq!(ran.printed, REPLY, "{kind:?}");
    }
}

#[test]
fn a_message_goes_to_the_device_and_back_in_a_normal_vm_on_dev_kvm() {
    let Some(host) = kvm() else {
        return;
    };
    let config = MachineConfig::new()
        .memory(real_mode::RAM)
        .irqchip(Irqchip::Full)
        .image(Image::flat("driver", real_mode::code()));
    let mut machine = Machine::build(&host, config).unwrap();
    let ran = run(&mut machine, real_mode::DEVICE).unwrap();
    let done = End::DebugExit(real_mode::DONE.into());
    assert_eq!(ran.report.end, done, "{:?}: {}", ran.report, ran.printed);
    assert_eq!(ran.messages, [MESSAGE]);
    assert_eq!(ran.printed, REPLY);
    assert!(machine.destroy().is_clean());
}

#[test]
fn the_kernel_takes_notifications_without_an_exit_and_the_run_loop_does_elsewhere() {
    let Some(host) = kvm() else {
        return;
    };
    // Two writes to a port with an event, one without: mov al, 1; out 0x80, al; out 0x80, al; out 0x81, al; hlt
    let code = [0xb0, 0x01, 0xe6, 0x80, 0xe6, 0x80, 0xe6, 0x81, 0xf4];
    let config = MachineConfig::new().image(Image::flat("rings", code));
    let exits = rings(&mut Machine::build(&host, config).unwrap());
    assert_eq!(exits, 1, "the kernel signals");
    let script = kvm_ops::guest::Script::new();
    let script = script
        .output(0x80, &[1])
        .output(0x80, &[1])
        .output(0x81, &[1]);
    let config = MachineConfig::new().program(script);
    let host = SimHost::new(Vendor::Intel);
    let exits = rings(&mut Machine::build(&host, config).unwrap());
    assert_eq!(exits, 3, "the run loop signals");
}

/// Runs a guest that rings twice. Returns the number of port writes that left the guest.
fn rings<H: Host>(machine: &mut Machine<H>) -> u64 {
    use kvm_ops::{IoEvent, IoEventMatch};
    let parts = machine.parts();
    let at = IoEvent::Port(0x80);
    let bell = parts.io_event(at, IoEventMatch::U8(1)).unwrap();
    let error = parts.io_event(at, IoEventMatch::U8(1)).err().unwrap();
    assert_eq!(error.errno(), 17, "{error}");
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, limits()).unwrap();
    // One more for the end of the run, at least.
    assert!(bell.take().unwrap() >= 3);
    assert_eq!(bell.take(), Ok(0));
    drop(bell);
    machine.parts().io_event(at, IoEventMatch::U8(1)).unwrap();
    report.exits().of(ExitKind::IoOut)
}

/// True if the host knows which memory a guest keeps private. With SEV and SEV-ES the C-bit of each access decides.
fn host_knows_private(tech: Tech) -> bool {
    matches!(tech, Tech::Tdx | Tech::SevSnp)
}

/// A guest that gives the device what it keeps private: the device refuses, says so, and reads nothing.
fn refused(code: fn(&Cpu) -> Option<()>) {
    for (vendor, tech) in CONFIDENTIAL {
        if !host_knows_private(tech) {
            continue;
        }
        let ran = soft(vendor, Kind::Of(tech), Linear::new(code));
        let status = ran.printed.as_bytes();
        assert!(
            matches!(status, [status] if u32::from(*status) & mmio::NEEDS_RESET != 0),
            "{tech}: {status:?}"
        );
        assert_eq!(ran.messages, [[0; 0]; 0], "{tech}");
    }
}

#[test]
fn rings_in_private_memory_are_refused() {
    refused(driver::keep_private);
}

#[test]
fn a_buffer_in_private_memory_is_refused() {
    refused(driver::private_buffer);
}

#[test]
fn a_buffer_that_a_sev_guest_keeps_private_is_read_as_ciphertext() {
    for (vendor, tech) in CONFIDENTIAL {
        if host_knows_private(tech) {
            continue;
        }
        let ran = soft(vendor, Kind::Of(tech), Linear::new(driver::private_message));
        let [message] = &ran.messages[..] else {
            panic!("{tech}: {:?}", ran.messages)
        };
        assert_eq!(message.len(), driver::PRIVATE_BYTES as usize, "{tech}");
        assert_ne!(message[..], MESSAGE[..message.len()], "{tech}");
    }
}
