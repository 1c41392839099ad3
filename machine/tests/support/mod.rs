//! What the tests of machines share.
#![allow(dead_code)] // Each test binary uses its part.

#[path = "../../src/samples.rs"]
pub(crate) mod samples;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_ops::kvm::KvmHost;
use kvm_ops::sim::SimHost;
use kvm_ops::{Host, Kind, Tech, Vendor};
use kvm_ops_machine::{
    ConsoleSink, Devices, End, ExitContext, ExitHandler, Flow, Image, ImageFormat, Machine,
    MachineConfig, MachineError, RunLimits, RunReport,
};

/// More than any of these guests needs where the kernel interprets them; a test that comes to this
/// point fails.
pub(crate) fn limits() -> RunLimits {
    RunLimits::none().deadline(Duration::from_secs(60))
}

/// The real host, or `None` and the reason on the test's output.
pub(crate) fn kvm() -> Option<KvmHost> {
    KvmHost::open()
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .ok()
}

/// A file that a package brings, or `None` and the reason on the test's output.
pub(crate) fn file(path: &str) -> Option<&str> {
    if std::path::Path::new(path).exists() {
        Some(path)
    } else {
        eprintln!("skipped: no {path}");
        None
    }
}

/// The confidential VMs, each with the vendor of its hosts.
pub(crate) const CONFIDENTIAL: [(Vendor, Tech); 4] = [
    (Vendor::Intel, Tech::Tdx),
    (Vendor::Amd, Tech::Sev),
    (Vendor::Amd, Tech::SevEs),
    (Vendor::Amd, Tech::SevSnp),
];

/// Every kind of VM, each with the vendor of its hosts.
pub(crate) fn every_kind() -> impl Iterator<Item = (Vendor, Kind)> {
    let normal = [Vendor::Intel, Vendor::Amd].map(|vendor| (vendor, Kind::Normal));
    let confidential = CONFIDENTIAL.map(|(vendor, tech)| (vendor, Kind::Of(tech)));
    normal.into_iter().chain(confidential)
}

/// Firmware whose metadata lists memory at 8 MiB starts no guest with less memory, without the metadata at its end, or with
/// an option that it does not use.
pub(crate) fn refuses_wrong_firmware(
    vendor: Vendor,
    firmware: &str,
    config: impl Fn() -> MachineConfig,
) {
    let host = SimHost::new(vendor);
    let refused = |config| Machine::build(&host, config).unwrap_err();
    let error = refused(config().memory(4 << 20));
    assert!(
        matches!(error, MachineError::ImageTooLarge { .. }),
        "{error}"
    );
    let bytes = std::fs::read(firmware).unwrap();
    let cut = bytes[..bytes.len() - 0x1000].to_vec();
    let image = Image::from_bytes("cut", cut).with_format(ImageFormat::Firmware);
    let error = refused(config().image(image));
    assert!(matches!(error, MachineError::BadImage { .. }), "{error}");
    let with_text = Image::open(firmware).unwrap().cmdline("quiet");
    let error = refused(config().image(with_text));
    assert!(
        matches!(error, MachineError::OptionNotUsed { .. }),
        "{error}"
    );
    assert_eq!(host.live_vms(), 0);
}

/// Devices that stop the machine once the console shows a text.
pub(crate) struct Until<D = Devices> {
    pub(crate) devices: D,
    pub(crate) console: ConsoleSink,
    pub(crate) text: &'static str,
    pub(crate) seen: AtomicBool,
}

impl<D> Until<D> {
    pub(crate) fn new(devices: D, console: ConsoleSink, text: &'static str) -> Self {
        let seen = AtomicBool::new(false);
        Self {
            devices,
            console,
            text,
            seen,
        }
    }
}

impl<D: ExitHandler> Until<D> {
    /// Runs a machine until its console shows the text.
    #[track_caller]
    pub(crate) fn run<H: Host>(&self, machine: &mut Machine<H>, limits: RunLimits) -> RunReport {
        let report = machine.run(self, limits).unwrap();
        let seen = self.seen.load(Ordering::Relaxed);
        assert!(seen, "{}\n{report:?}", self.console.text());
        assert_eq!(report.end, End::Handler);
        report
    }

    /// The same with the only machine of a host, which ends then. Returns the instructions that this took.
    #[track_caller]
    pub(crate) fn counts(
        &self,
        mut machine: Machine<SimHost>,
        host: &SimHost,
        deadline: Duration,
    ) -> u64 {
        let report = self.run(&mut machine, RunLimits::none().deadline(deadline));
        let instructions = report.instructions().unwrap();
        assert_eq!(instructions, host.instructions());
        eprintln!("{instructions} instructions in {:?}", report.elapsed);
        let freed = machine.destroy();
        assert!(freed.is_clean(), "{freed:?}");
        instructions
    }
}

/// Runs the only machine of a host, with the devices of a Q35 and a clock that stands, until its console shows the text. Returns
/// the instructions that this took, and the console's text.
#[track_caller]
pub(crate) fn boots(
    machine: Machine<SimHost>,
    host: &SimHost,
    text: &'static str,
) -> (u64, String) {
    let console = ConsoleSink::capture();
    let q35 = machine.q35(console.clone());
    let q35 = q35.map_devices(|devices| devices.stop_clock(1_795_219_200));
    let handler = Until::new(q35, console.clone(), text);
    // Half a billion instructions, and the processor is not optimised in a test.
    let instructions = handler.counts(machine, host, Duration::from_secs(400));
    (instructions, console.text())
}

impl<D: ExitHandler> ExitHandler for Until<D> {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        let before = self.console.printed();
        let flow = self.devices.handle(exit);
        let printed = self.console.printed() != before;
        if printed && flow == Flow::Continue && self.console.text().contains(self.text) {
            self.seen.store(true, Ordering::Relaxed);
            return Flow::Stop;
        }
        flow
    }
}
