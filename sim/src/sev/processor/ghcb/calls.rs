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

    /// SNP Extended Guest Request: the answer comes with certificates. This host has none, so the list is
    /// empty: an entry of zeros.
    pub(super) fn extended_guest_request(
        &mut self,
        exit: CpuExit,
        request: u64,
        response: u64,
    ) -> Result<Next> {
        const END: [u8; 24] = [0; 24];
        let ghcb = self.ghcb()?;
        let (Some(at), Some(pages)) = (ghcb.get(RAX), ghcb.get(RBX)) else {
            return self.malformed(exit, Malformed::Missing);
        };
        let usable = at.is_multiple_of(PAGE_SIZE) && pages != 0;
        if !usable || host_access(&self.vm, Gpa::new(at), Copy::ToGuest(&END)).is_err() {
            return self.malformed(exit, Malformed::Input);
        }
        self.guest_request(exit, request, response)
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
