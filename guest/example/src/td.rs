//! The kernel in a TD.

use core::fmt::{self, Write};
use core::slice;

use kvm_ops_guest::GpaRange;
use kvm_ops_guest::instructions::Tdcall;
use kvm_ops_guest::tdx::{TdGuest, TdReport, Width};

use super::{DATA, Failed, Guest, Hex, OFF, PAGE, POWER, SERIAL, memory, say};

/// The run-time measurement that is extended.
const RTMR: u64 = 2;

pub struct Td(TdGuest<Tdcall>);

impl Td {
    /// # Safety
    /// The code runs at privilege level 0 in a TD, on one vCPU.
    pub unsafe fn new() -> Result<Self, Failed> {
        // SAFETY: the caller vouches for level and TD; the ranges below are of memory that nothing else uses.
        let port = unsafe { Tdcall::new() };
        TdGuest::new(port)
            .map(Self)
            .map_err(|_| Failed("TDG.VP.INFO"))
    }
}

impl Write for Td {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let sent = self.0.io_write(SERIAL, Width::One, byte.into());
            sent.map_err(|_| fmt::Error)?;
        }
        Ok(())
    }
}

impl Guest for Td {
    const NAME: &str = "a TD";

    fn accept(&mut self, range: GpaRange) -> Result<(), Failed> {
        self.0.accept(range).map_err(|_| Failed("acceptance"))
    }

    fn share(&mut self, range: GpaRange) -> Result<(), Failed> {
        let shared = self.0.share(range, |what| memory::flush(range, what));
        shared.map_err(|_| Failed("MapGPA"))
    }

    /// Extends a run-time measurement by the first bytes of the data, and reports.
    fn tell_evidence(&mut self, scratch: GpaRange) -> Result<(), Failed> {
        let (data, report) = (scratch.start(), scratch.start() + PAGE);
        // SAFETY: the pages are the kernel's, accepted and mapped; nothing else uses them.
        unsafe { (data as *mut [u8; 64]).write(DATA) };
        let extended = self.0.rtmr_extend(data, RTMR);
        extended.map_err(|_| Failed("TDG.MR.RTMR.EXTEND"))?;
        self.0
            .report(report, data)
            .map_err(|_| Failed("TDG.MR.REPORT"))?;
        // SAFETY: as above, and the module has written the report.
        let report = unsafe { slice::from_raw_parts(report as *const u8, 1024) };
        let report = report.first_chunk().map(TdReport::new);
        let report = report.ok_or(Failed("the length of a report"))?;
        say(self, format_args!("MRTD {}", Hex(&report.mrtd())));
        let rtmr = report.rtmrs()[RTMR as usize];
        say(self, format_args!("RTMR{RTMR} {}", Hex(&rtmr)));
        say(self, format_args!("data {}", Hex(&report.report_data())));
        Ok(())
    }

    fn switch_off(&mut self) {
        // A host that does not leaves the vCPU halted.
        let _ = self.0.io_write(POWER, Width::Two, OFF.into());
    }
}
