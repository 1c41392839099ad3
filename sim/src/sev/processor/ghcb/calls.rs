//! Hypercalls, and messages of an SNP guest to the firmware.

use kvm_ops::{Exit, Gpa, GuestResponse, PAGE_SIZE, Result};
use kvm_ops_cpu::Exit as CpuExit;

use super::page::{RAX, RBX, RCX, RDX, RSI};
use super::{Malformed, Pending};
use crate::access::{Copy, host_access};
use crate::processor::{Next, Processor};
use crate::sev::processor::exits::{MAP_GPA_RANGE, convert};

/// SW_EXITINFO2 of a guest request that did not get to the firmware: the host's error in its upper
/// half (`SNP_GUEST_VMM_ERR_GENERIC`).
const GENERIC: u64 = 0xffff_ffff << 32;
/// The memory for certificates is too small (`SNP_GUEST_VMM_ERR_INVALID_LEN`); the host is busy.
const INVALID_LENGTH: u64 = 1 << 32;
const BUSY: u64 = 2 << 32;
/// Bytes of a certificate table without certificates.
const END: usize = 24;
/// Where a message's header has its type, and that of a request for a report (SNP ABI, 8.26).
const MESSAGE_KIND: u64 = 0x34;
const REPORT_REQUEST: u8 = 5;

type Page = [u8; PAGE_SIZE as usize];

impl Processor {
    /// A hypercall, by KVM's convention.
    pub(super) fn call_request(&mut self, exit: CpuExit) -> Result<Next> {
        let ghcb = self.ghcb()?;
        let Some(nr) = ghcb.get(RAX) else {
            return self.malformed(exit, Malformed::Missing);
        };
        let [a, b, c, d] = [RBX, RCX, RDX, RSI].map(|at| ghcb.get(at).unwrap_or(0));
        let leave = match (nr, convert(a, b, c)) {
            (MAP_GPA_RANGE, Next::Leave(leave, _)) => leave,
            _ => Exit::Hypercall {
                nr,
                args: [a, b, c, d, 0, 0],
            },
        };
        self.wait_for(Pending::Call(exit), leave, Vec::new())
    }

    /// SNP Guest Request: pages with the message and for the answer.
    pub(super) fn guest_request(
        &mut self,
        exit: CpuExit,
        request: u64,
        response: u64,
    ) -> Result<Next> {
        let aligned = (request | response).is_multiple_of(PAGE_SIZE);
        if !aligned || request == response {
            return self.malformed(exit, Malformed::Input);
        }
        let status = self.ask_firmware(request, response).unwrap_or(GENERIC);
        self.took(exit, status)
    }

    /// SNP Extended Guest Request: the guest gives RBX pages of memory, from the address in RAX on, for certificates. The
    /// embedder writes those of a report if it asked for that (`ask_for_certificates`), else the host's table is copied. A
    /// guest whose pages are too few finds the number that it needs in RBX. As on KVM, an empty table needs no pages.
    pub(super) fn extended_guest_request(
        &mut self,
        exit: CpuExit,
        request: u64,
        response: u64,
    ) -> Result<Next> {
        let ghcb = self.ghcb()?;
        let (Some(at), Some(pages)) = (ghcb.get(RAX), ghcb.get(RBX)) else {
            return self.malformed(exit, Malformed::Missing);
        };
        if !at.is_multiple_of(PAGE_SIZE) {
            return self.malformed(exit, Malformed::Input);
        }
        if self.vm.sev.asks_for_certificates() {
            return self.ask_embedder(exit, (request, response), (at, pages));
        }
        let table = self.vm.machine.sev().map(|sev| sev.certificates());
        let table = table.unwrap_or_default();
        let needed = (table.len() as u64).div_ceil(PAGE_SIZE);
        if pages < needed && table.len() > END {
            self.ghcb()?.put(RBX, needed);
            return self.took(exit, INVALID_LENGTH);
        }
        if pages != 0 && host_access(&self.vm, Gpa::new(at), Copy::ToGuest(&table)).is_err() {
            return self.malformed(exit, Malformed::Input);
        }
        self.guest_request(exit, request, response)
    }

    /// Leaves for the certificates of a report. Other messages need none.
    fn ask_embedder(
        &mut self,
        exit: CpuExit,
        (request, response): (u64, u64),
        (at, pages): (u64, u64),
    ) -> Result<Next> {
        let mut kind = [0];
        let header = Gpa::new(request.saturating_add(MESSAGE_KIND));
        if pages == 0 || host_access(&self.vm, header, Copy::FromGuest(&mut kind)).is_err() {
            return self.malformed(exit, Malformed::Input);
        }
        if kind[0] != REPORT_REQUEST {
            return self.guest_request(exit, request, response);
        }
        let pending = Pending::Certificates {
            exit,
            request,
            response,
        };
        let gpa = Gpa::new(at);
        let leave = Exit::SnpCertificates { gpa, pages };
        self.wait_for(pending, leave, Vec::new())
    }

    /// The embedder wrote certificates, or could not: an errno, and the pages that they need.
    pub(super) fn certified(
        &mut self,
        exit: CpuExit,
        (request, response): (u64, u64),
        (errno, pages): (u64, u64),
    ) -> Result<Next> {
        const ENOSPC: u64 = 28;
        const EAGAIN: u64 = 11;
        let error = match errno {
            0 => return self.guest_request(exit, request, response),
            ENOSPC => {
                self.ghcb()?.put(RBX, pages);
                INVALID_LENGTH
            }
            EAGAIN => BUSY,
            _ => GENERIC,
        };
        self.took(exit, error)
    }

    /// Carries a message to the firmware. Returns SW_EXITINFO2; `None` if it did not get there.
    fn ask_firmware(&mut self, request: u64, response: u64) -> Option<u64> {
        let mut message: Page = [0; PAGE_SIZE as usize];
        let vm = &self.vm;
        host_access(vm, Gpa::new(request), Copy::FromGuest(&mut message)).ok()?;
        let answer = vm.sev.back_end()?.guest_request(&message);
        match answer.inspect_err(|error| tracing::debug!(%error, "guest request")) {
            Ok(GuestResponse::Message(page)) => {
                host_access(vm, Gpa::new(response), Copy::ToGuest(&page[..])).ok()?;
                Some(0)
            }
            Ok(GuestResponse::Refused(status)) => Some(status.into()),
            Err(_) => None,
        }
    }
}
