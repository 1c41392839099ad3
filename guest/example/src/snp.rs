//! The kernel in an SNP guest.

use core::arch::asm;
use core::fmt::{self, Write};

use kvm_ops_guest::GpaRange;
use kvm_ops_guest::instructions::{Ghcb, Snp as Instructions};
use kvm_ops_guest::sev::message::{Aes256Gcm, Channel, ReportRequest, Secrets};
use kvm_ops_guest::sev::{GhcbExit, GhcbPort, SevGuest, Versions};

use super::memory::{self, Identity, Shared};
use super::{DATA, Failed, Guest, Hex, OFF, PAGE, POWER, SERIAL, say};

const GHCB_MSR: u32 = 0xc001_0130;
/// The exit of ports, and its information: the size of a write in bytes, from this bit on.
const IOIO: u64 = 0x7b;
const IOIO_SIZE: u32 = 4;
const IOIO_PORT: u32 = 16;
/// The measurement in a report (SNP firmware ABI, "ATTESTATION_REPORT").
const MEASUREMENT: usize = 0x90;
const REPORT_DATA: usize = 0x50;

/// A page of the program for the GHCB, which is shared before it is used.
#[repr(align(4096))]
struct Page(
    #[expect(dead_code, reason = "the host and the GHCB's port use it")] [u8; PAGE as usize],
);
static mut GHCB: Page = Page([0; PAGE as usize]);

/// Puts the address of the GHCB into its MSR, where requests of the MSR protocol leave something else.
fn name_ghcb(at: u64) {
    let (low, high) = (at as u32, (at >> 32) as u32);
    // SAFETY: the guest has shared and registered this page.
    unsafe { asm!("wrmsr", in("ecx") GHCB_MSR, in("eax") low, in("edx") high, options(nostack)) };
}

pub struct Snp {
    memory: SevGuest<Instructions<Identity>>,
    calls: SevGuest<Ghcb<Shared>>,
    secrets: u64,
}

impl Snp {
    /// # Safety
    /// The code runs at privilege level 0 in an SNP guest, on one vCPU, once. `secrets` is the address of its secrets page.
    pub unsafe fn new(secrets: u64) -> Result<Self, Failed> {
        // SAFETY: the caller vouches for level and guest; the ranges below are of memory that nothing else uses.
        let port = unsafe { Instructions::new(Identity) };
        // The software platform's caches are coherent; a kernel for hardware asks CPUID (SME_COHERENT).
        let mut memory = SevGuest::new(port, true);
        memory
            .negotiate(Versions::SNP)
            .map_err(|_| Failed("GHCB protocol"))?;
        let at = &raw mut GHCB as u64;
        let page = GpaRange::new(at, PAGE).map_err(|_| Failed("GHCB"))?;
        let shared = memory.share(page, |what| memory::flush(page, what));
        shared.map_err(|_| Failed("the GHCB's page"))?;
        memory
            .register_ghcb(at)
            .map_err(|_| Failed("registration of the GHCB"))?;
        name_ghcb(at);
        // SAFETY: the page is shared and the MSR has its address, now and behind each conversion.
        let ghcb = unsafe { Ghcb::new(Shared::new(page)) };
        Ok(Self {
            memory,
            calls: SevGuest::new(ghcb, true),
            secrets,
        })
    }

    /// Writes a value of 1 or 2 bytes to a port.
    fn out(&mut self, port: u16, bytes: u64, value: u64) {
        self.calls.port().ghcb_exit(GhcbExit {
            code: IOIO,
            info1: u64::from(port) << IOIO_PORT | bytes << IOIO_SIZE,
            rax: Some(value),
            ..GhcbExit::default()
        });
    }
}

impl Write for Snp {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes()
            .for_each(|byte| self.out(SERIAL, 1, byte.into()));
        Ok(())
    }
}

impl Guest for Snp {
    const NAME: &str = "an SNP guest";

    fn accept(&mut self, range: GpaRange) -> Result<(), Failed> {
        self.memory.validate(range).map_err(|_| Failed("PVALIDATE"))
    }

    fn share(&mut self, range: GpaRange) -> Result<(), Failed> {
        let shared = self.memory.share(range, |what| memory::flush(range, what));
        name_ghcb(&raw mut GHCB as u64);
        shared.map_err(|_| Failed("page state change"))
    }

    /// Asks the firmware for a report, through two pages that the host sees.
    fn tell_evidence(&mut self, scratch: GpaRange) -> Result<(), Failed> {
        let buffer = GpaRange::new(scratch.start(), 2 * PAGE).map_err(|_| Failed("a range"))?;
        self.share(buffer)?;
        // SAFETY: the pages are shared since now, and nothing else uses them.
        let mut messages = unsafe { Shared::new(buffer) };
        // SAFETY: the firmware has written the page before the guest started, and nothing writes it now.
        let secrets = Secrets::new(unsafe { &*(self.secrets as *const [u8; PAGE as usize]) });
        let key = secrets.vmpck(0).ok_or(Failed("the key of messages"))?;
        let mut channel = Channel::new(Aes256Gcm::new(key), 0, secrets.sequence(0));
        let request = ReportRequest::new(DATA);
        let report =
            self.calls
                .guest_request(&mut channel, buffer, &mut messages, &request, || true);
        let report = report.map_err(|_| Failed("the guest request"))?;
        say(
            self,
            format_args!("measurement {}", Hex(&report[MEASUREMENT..][..48])),
        );
        say(
            self,
            format_args!("data {}", Hex(&report[REPORT_DATA..][..DATA.len()])),
        );
        Ok(())
    }

    fn switch_off(&mut self) {
        self.out(POWER, 2, OFF.into());
    }
}
