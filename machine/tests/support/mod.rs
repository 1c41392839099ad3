//! What the tests of machines share.
#![allow(dead_code)] // Each test binary uses its part.

#[path = "../../src/samples.rs"]
pub(crate) mod samples;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_ops::kvm::KvmHost;
use kvm_ops_machine::{ConsoleSink, Devices, ExitContext, ExitHandler, Flow, RunLimits};

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
