//! What an honest host does about a GHCB: messages to the firmware, and certificates beside them.

use super::launch::Technology;
use super::{HostError, Hypervisor, Reply};
use kvm_ops_guest::SharedBuffer;
use kvm_ops_guest::sev::{GhcbAnswer, GhcbExit, exit_code};
use soft_amd_sp::Platform;

const PAGE: u64 = 0x1000;
/// Reasons for which an exit is malformed (GHCB specification, "Error codes").
const INVALID_USAGE: u64 = 2;
const MISSING_INPUT: u64 = 4;
const INVALID_INPUT: u64 = 5;
/// SW_EXITINFO2 of a guest request whose certificates need more pages, and of one that failed for a
/// reason of the host.
const INVALID_LEN: u64 = 1 << 32;
const GENERIC: u64 = 1 << 63;

/// A page of the host. Offsets and lengths lie in it; what is not the host's reads as zeros.
struct HostPage<'a> {
    p: &'a Platform,
    spa: u64,
}

impl SharedBuffer for HostPage<'_> {
    fn read(&mut self, offset: usize, bytes: &mut [u8]) {
        if self.p.host_read(self.spa + offset as u64, bytes).is_err() {
            bytes.fill(0);
        }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        // Memory that the host may not write stays as it is.
        let _ = self.p.host_write(self.spa + offset as u64, bytes);
    }
}

impl Hypervisor<'_> {
    /// The exit that a GHCB passes. `None` if no shared page is there, or the page passes none.
    pub fn ghcb(&self, gpa: u64) -> Option<GhcbExit> {
        GhcbExit::read(&mut self.shared_page(gpa)?)
    }

    /// Writes the answer to an exit into the GHCB. Nothing is written where no shared page is.
    pub fn answer_ghcb(&self, gpa: u64, answer: GhcbAnswer) {
        if let Some(mut page) = self.shared_page(gpa) {
            answer.write(&mut page);
        }
    }

    fn shared_page(&self, gpa: u64) -> Option<HostPage<'_>> {
        let is_page = gpa.is_multiple_of(PAGE) && self.is_shared(gpa);
        let spa = self.behind(gpa).filter(|_| is_page)?;
        let p = self.platform();
        Some(HostPage { p, spa })
    }

    /// An honest host's answer to VMGEXIT with a GHCB: guest requests. A vCPU whose GHCB is no shared
    /// page is not entered again.
    pub(super) fn ghcb_exit(&self, gpa: u64) -> Reply {
        if self.shared_page(gpa).is_none() {
            return Reply::Stop;
        }
        let answer = match self.ghcb(gpa) {
            Some(exit) => self.request(&exit),
            None => GhcbAnswer::malformed(INVALID_USAGE),
        };
        self.answer_ghcb(gpa, answer);
        Reply::Enter
    }

    fn request(&self, exit: &GhcbExit) -> GhcbAnswer {
        let pages = self
            .shared_page(exit.info1)
            .zip(self.shared_page(exit.info2));
        let is_request = matches!(
            exit.code,
            exit_code::GUEST_REQUEST | exit_code::EXTENDED_GUEST_REQUEST
        );
        let is_snp = self.inner.machine.technology == Technology::Snp;
        let (mut request, mut response) = match pages {
            Some(pages) if is_request && is_snp && exit.info1 != exit.info2 => pages,
            _ => return GhcbAnswer::malformed(INVALID_INPUT),
        };
        let certificates = match exit.code {
            exit_code::EXTENDED_GUEST_REQUEST => self.certificates(exit),
            _ => Ok(Vec::new()),
        };
        let certificates = match certificates {
            Ok(pages) => pages,
            Err(answer) => return answer,
        };
        let mut message = [0; PAGE as usize];
        request.read(0, &mut message);
        let info2 = match self.guest_request(&message) {
            Ok(answer) => {
                response.write(0, &answer);
                0
            }
            Err(HostError::Command { status, .. }) => u64::from(status.0),
            Err(_) => GENERIC,
        };
        let table = self.inner.machine.certificates.chunks(PAGE as usize);
        for (mut page, piece) in certificates.into_iter().zip(table) {
            page.write(0, piece);
        }
        GhcbAnswer {
            info2,
            ..GhcbAnswer::default()
        }
    }

    /// The guest's pages for the certificates: RAX and RBX.
    fn certificates(&self, exit: &GhcbExit) -> Result<Vec<HostPage<'_>>, GhcbAnswer> {
        let (Some(rax), Some(rbx)) = (exit.rax, exit.rbx) else {
            return Err(GhcbAnswer::malformed(MISSING_INPUT));
        };
        let needed = (self.inner.machine.certificates.len() as u64).div_ceil(PAGE);
        if rbx < needed {
            return Err(GhcbAnswer {
                info2: INVALID_LEN,
                rbx: Some(needed),
                ..GhcbAnswer::default()
            });
        }
        let page = |n: u64| self.shared_page(rax.checked_add(n * PAGE)?);
        let pages: Option<Vec<_>> = (0..needed).map(page).collect();
        pages.ok_or(GhcbAnswer::malformed(INVALID_INPUT))
    }
}
