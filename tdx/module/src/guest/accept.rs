//! TDG.MEM.PAGE.ACCEPT

use super::tdcall::{Done, invalid};
use super::{Guest, Next};
use crate::call::tree_gpa;
use crate::lock::Side;
use crate::sept::{Content, Walked};
use crate::status::{Code, Operand, Status};

/// Type of the extended exit qualification.
const ACCEPT: u64 = 1;
const PIECES: u64 = 512;

impl Guest<'_> {
    pub(super) fn accept(&mut self) -> Result<Done, Status> {
        let rcx = self.ctx.gprs.rcx;
        let (gpa, level) = tree_gpa(self.td, rcx, 0..=1)?;
        loop {
            let walked = self
                .td
                .walk(&self.p.tables, gpa, level)
                .ok_or(invalid(Operand::RCX))?;
            if walked.level != level {
                if walked.content.state().is_guest_readable() {
                    return Err(already_accepted(walked.level));
                }
                return Ok(self.entry_violation(gpa, level, walked.level, walked.content, ACCEPT));
            }
            let word = walked.entry.word();
            if !word.try_lock(Side::Guest) {
                let busy = Code::OPERAND_BUSY.on(Operand::RCX);
                return Ok(match word.is_free_but_marked() {
                    true => Done::HostPriority(busy),
                    false => Done::Status(busy),
                });
            }
            if !walked.is_current() {
                word.unlock();
                continue;
            }
            let done = self.accept_locked(gpa, level, &walked);
            word.unlock();
            return done;
        }
    }

    fn accept_locked(&mut self, gpa: u64, level: u8, walked: &Walked<'_>) -> Result<Done, Status> {
        let content = walked.entry.get();
        match content.state() {
            s if s.is_table() => Err(Code::PAGE_SIZE_MISMATCH.detail(u32::from(level))),
            s if s.is_guest_readable() => Err(already_accepted(level)),
            s if s.is_acceptable() => Ok(self.zero(gpa, level, walked, content)),
            _ => Ok(self.entry_violation(gpa, level, walked.level, content, ACCEPT)),
        }
    }

    /// Zeroes the page piece by piece; an event between pieces interrupts, and the count says where to go on.
    fn zero(&mut self, gpa: u64, level: u8, walked: &Walked<'_>, content: Content) -> Done {
        let key = self.td.key();
        let hpa = content.hpa();
        if level == 0 {
            self.p.mem.zero_pages(hpa, 1, key.as_deref());
        } else {
            for piece in content.accepted()..PIECES {
                self.p.mem.zero_pages(hpa + piece * 4096, 1, key.as_deref());
                if piece + 1 < PIECES && self.this.guest_event_pending() {
                    walked.entry.set(content.with_accepted(piece + 1));
                    return Done::Other(Next::Repeat);
                }
            }
        }
        // Aliases made while the page was pending come into use.
        self.aliased(gpa, level).unblock();
        walked
            .entry
            .set(content.with_state(content.state().accepted()));
        Done::Status(Status::SUCCESS)
    }
}

fn already_accepted(level: u8) -> Status {
    Code::PAGE_ALREADY_ACCEPTED.detail(u32::from(level))
}
