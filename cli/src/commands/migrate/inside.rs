//! Moves between two VMs of one host, for guests of every technology.

use std::sync::atomic::Ordering;
use std::time::Instant;

use kvm_ops::Vendor;
use kvm_ops::sev::migrate::Phase;
use kvm_ops::sim::SimHost;
use kvm_ops_machine::Machine;

use super::guest::Told;
use super::report::Report;
use super::{Guest, Kinds, Session, WARM_UP, leaks};
use crate::failure::{Failure, Outcome};
use crate::platform;

const GIB: u64 = 1 << 30;

impl Guest {
    /// A host with room for two VMs of the guest.
    pub(super) fn home(&self) -> Outcome<SimHost> {
        let Kinds::Tdx = self.tech else {
            return self.sev_host();
        };
        // The guest's pages, and 1 GiB for tables and control pages.
        let module = platform::tdx(self.memory.next_multiple_of(GIB) + GIB);
        SimHost::builder(Vendor::Intel)
            .tdx(module)
            .build()
            .map_err(|error| Failure::because("cannot build a software host", error))
    }
}

/// The calls of firmware, and RMP instructions, that the machine saw so far.
fn operations(host: &SimHost) -> u64 {
    let sev = host.sev_platform().map(|platform| platform.counters());
    let sev = sev.map_or(0, |counters| counters.iter().map(|(_, _, n)| n).sum());
    let tdx = host
        .tdx_platform()
        .map(|platform| platform.counts().total());
    sev + tdx.unwrap_or(0)
}

impl Session<'_> {
    pub(super) fn inside(&self) -> Outcome<Report> {
        let host = self.guest.home()?;
        let (mut from, mut to) = (self.guest.source(&host)?, self.guest.target(&host)?);
        let mut told = self.load_writer(&mut from)?;
        self.run_during(&mut from, |_| self.wait_for(&told, WARM_UP))?;
        let (before, start) = (operations(&host), Instant::now());
        from.move_to(&mut to)
            .map_err(|error| Failure::because("the guest does not move", error))?;
        let took = start.elapsed();
        let calls = operations(&host) - before;
        let last = told.count.load(Ordering::Acquire);
        let (first, end) = match self.guest.tech {
            // The host sees the registers: the guest begins anew, from its memory.
            Kinds::Sev => {
                let (first, end, arrived) = self.run_on(&mut to)?;
                told = arrived;
                (first, end)
            }
            Kinds::SevEs | Kinds::SevSnp | Kinds::Tdx => self.go_on(&mut to, &told, last)?,
        };
        let mut report = Report::new("move", self.guest.memory, self.guest.kind());
        report.step(Phase::New);
        report.step(Phase::Committed);
        report.finish(took, took, 0, 0, 0);
        report.commands = Some(calls);
        report.counts(last, first, end);
        report.pages_told(&told);
        report.leaks = leaks(from) + leaks(to);
        Ok(report)
    }

    /// Runs a guest whose registers came with it, and returns its first and last count there.
    fn go_on(&self, machine: &mut Machine<SimHost>, told: &Told, last: u64) -> Outcome<(u64, u64)> {
        let first = self.run_during(machine, |_| {
            self.wait_for(told, last + 1);
            let first = told.count.load(Ordering::Acquire);
            self.wait_for(told, first + WARM_UP);
            first
        })?;
        Ok((first, told.count.load(Ordering::Acquire)))
    }
}
