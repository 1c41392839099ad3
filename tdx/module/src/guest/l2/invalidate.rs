//! TDG.VP.INVEPT and TDG.VP.INVVPID. There are no translations to invalidate: what is left are the checks, the
//! progress through a list, and its interruption.

use super::super::tdcall::{Done, invalid};
use super::super::{Guest, Next};
use crate::status::{Operand, Status};

const LIST: u64 = 1;
const VM_SHIFT: u32 = 52;
const RCX_RESERVED: u64 = !(3 << VM_SHIFT | LIST);
/// RDX of a list: first entry 8:0, GPA 51:12, number of entries 61:52.
const RDX_RESERVED: u64 = 7 << 9 | 3 << 62;
const NUMBER_SHIFT: u32 = 52;
const ENTRIES: u64 = 512;
const READ: u64 = 1;

impl Guest<'_> {
    /// TDG.VP.INVEPT
    pub(in super::super) fn invept(&self) -> Result<(), Status> {
        let existing = (1u64 << (self.td.num_l2_vms() + 1)) - 2;
        match self.ctx.gprs.rcx & !existing {
            0 => Ok(()),
            _ => Err(invalid(Operand::RCX)),
        }
    }

    /// TDG.VP.INVVPID
    pub(in super::super) fn invvpid(&mut self) -> Result<Done, Status> {
        let (rcx, rdx) = (self.ctx.gprs.rcx, self.ctx.gprs.rdx);
        let vm = (rcx >> VM_SHIFT & 3) as usize;
        if rcx & RCX_RESERVED != 0 || !(1..=self.td.num_l2_vms()).contains(&vm) {
            return Err(invalid(Operand::RCX));
        }
        if rcx & LIST == 0 {
            return Ok(Done::Status(Status::SUCCESS));
        }
        let (mut first, mut number) = (rdx & 0x1FF, rdx >> NUMBER_SHIFT & 0x3FF);
        if rdx & RDX_RESERVED != 0 || first + number > ENTRIES {
            return Err(invalid(Operand::RDX));
        }
        let gpa = rdx & 0x000F_FFFF_FFFF_F000;
        if !self.td.is_valid_private_gpa(gpa) {
            return Err(invalid(Operand::RDX));
        }
        if let Err(next) = self.module_access(gpa, READ) {
            return Ok(Done::Other(next));
        }
        let mut interrupted = false;
        while number > 0 && !interrupted {
            first += 1;
            number -= 1;
            interrupted = self.this.guest_event_pending();
        }
        // The first entry does not fit its field when the list is through.
        self.ctx.gprs.rdx = first & 0x1FF | gpa | number << NUMBER_SHIFT;
        Ok(match interrupted {
            true => Done::Other(Next::Repeat),
            false => Done::Status(Status::SUCCESS),
        })
    }
}
