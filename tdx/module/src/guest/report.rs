//! TDG.MR.REPORT and TDG.MR.RTMR.EXTEND

use super::exits::{EXTENDED_PENDING, REASON_EPT_VIOLATION};
use super::tdcall::{Done, invalid};
use super::{Guest, Next, TDCALL_LENGTH, TdExit};
use crate::lock::{Guard, LockMode, Side};
use crate::measure::Digest384;
use crate::report::REPORT_LEN;
use crate::sept::SeptState;
use crate::status::{Code, Operand, Status};
use crate::td::Td;
use crate::tdinfo::td_info;
use crate::vcpu::VeInfo;
use sha2::{Digest, Sha384};

const TDINFO: core::ops::Range<usize> = 512..1024;
const READ: u64 = 1;
const WRITE: u64 = 2;
/// Qualification bits: accesses that a page blocked for writing still allows.
const READABLE_AND_EXECUTABLE: u64 = 0x28;
const READ_WRITE: u64 = 3;

impl Guest<'_> {
    /// The host address of memory the module itself accesses for the guest. On failure the fault to take.
    pub(super) fn module_access(&mut self, gpa: u64, qualification: u64) -> Result<u64, Next> {
        if gpa & self.td.shared_bit() != 0 {
            let at = gpa & !self.td.shared_bit();
            return match self.p.mem.contains(at & !0xFFF, 4096) {
                true => Ok(at),
                false => Err(self.module_violation(gpa, qualification, 0)),
            };
        }
        let walked = self.td.walk(&self.p.tables, gpa, 0);
        let state = walked.as_ref().map(|w| w.content.state());
        let writes = qualification & WRITE != 0;
        if let Some(w) = walked.as_ref().filter(|w| w.content.is_accessible(writes)) {
            let offset = gpa & ((1 << (12 + 9 * u32::from(w.level))) - 1);
            return Ok(w.content.hpa() + offset);
        }
        let pending = state.is_some_and(SeptState::is_acceptable);
        if pending && !self.pending_exits_to_host() {
            return Err(self.inject_ve(VeInfo {
                reason: u32::from(REASON_EPT_VIOLATION),
                qualification,
                gpa,
                ilen: TDCALL_LENGTH as u32,
                ..VeInfo::default()
            }));
        }
        let extended = if pending { EXTENDED_PENDING } else { 0 };
        let qualification = match state {
            Some(state) if state.is_guest_readable() => WRITE | READABLE_AND_EXECUTABLE,
            _ => qualification,
        };
        Err(self.module_violation(gpa, qualification, extended))
    }

    /// The exit of an access by the module that the Secure EPT, or the host's own, does not map.
    fn module_violation(&self, gpa: u64, qualification: u64, extended: u64) -> Next {
        let exit = TdExit::new(Code::SUCCESS, REASON_EPT_VIOLATION);
        Next::Leave(Box::new(TdExit {
            rcx: qualification,
            rdx: extended,
            r8: gpa & !0xFFF,
            ..exit
        }))
    }

    fn is_within_width(&self, gpa: u64) -> bool {
        gpa >> self.td.gpa_width() == 0
    }

    pub(super) fn read_for_guest(&mut self, gpa: u64, at: u64, buf: &mut [u8]) -> Result<(), Next> {
        let read = match gpa & self.td.shared_bit() {
            0 => self.p.mem.private_read(at, buf, self.td.key().as_deref()),
            _ => {
                self.p.mem.host_read(at, buf);
                Ok(())
            }
        };
        read.map_err(|_| self.poisoned())
    }

    pub(super) fn write_for_guest(&mut self, gpa: u64, at: u64, data: &[u8]) -> Result<(), Next> {
        let written = match gpa & self.td.shared_bit() {
            0 => self.p.mem.private_write(at, data, self.td.key().as_deref()),
            _ => {
                self.p.mem.host_write(at, data);
                Ok(())
            }
        };
        written.map_err(|_| self.poisoned())
    }

    /// TDG.MR.RTMR.EXTEND
    pub(super) fn rtmr_extend(&mut self) -> Result<Done, Status> {
        let (gpa, index) = (self.ctx.gprs.rcx, self.ctx.gprs.rdx);
        if gpa & 63 != 0 || !self.td.is_valid_private_gpa(gpa) {
            return Err(invalid(Operand::RCX));
        }
        let at = match self.module_access(gpa, READ) {
            Ok(at) => at,
            Err(next) => return Ok(Done::Other(next)),
        };
        if index > 3 {
            return Err(invalid(Operand::RDX));
        }
        let mut data = [0; 48];
        if let Err(next) = self.read_for_guest(gpa, at, &mut data) {
            return Ok(Done::Other(next));
        }
        let _lock = match rtmr_lock(self.td, LockMode::Exclusive) {
            Ok(lock) => lock,
            Err(done) => return Ok(done),
        };
        self.td.measurement().extend_rtmr(index as usize, &data);
        Ok(Done::Status(Status::SUCCESS))
    }

    /// TDG.MR.REPORT
    pub(super) fn report(&mut self) -> Result<Done, Status> {
        let (out, data, kind) = (self.ctx.gprs.rcx, self.ctx.gprs.rdx, self.ctx.gprs.r8);
        if out & 1023 != 0 {
            return Err(invalid(Operand::RCX));
        }
        if data & 63 != 0 || !self.is_within_width(data) {
            return Err(invalid(Operand::RDX));
        }
        let data_at = match self.module_access(data, READ) {
            Ok(at) => at,
            Err(next) => return Ok(Done::Other(next)),
        };
        if kind != 0 {
            return Err(invalid(Operand::R8));
        }
        let td = self.td;
        let lock = match rtmr_lock(td, LockMode::Shared) {
            Ok(lock) => lock,
            Err(done) => return Ok(done),
        };
        let tdinfo = td_info(td);
        let (hash, cached) = {
            let mut m = td.measurement();
            match m.tee_info_hash {
                Some(hash) => (hash, true),
                None => {
                    let hash: Digest384 = Sha384::digest(tdinfo).into();
                    m.tee_info_hash = Some(hash);
                    (hash, false)
                }
            }
        };
        drop(lock);
        if !cached && self.this.guest_event_pending() {
            return Ok(Done::Other(Next::Repeat));
        }
        if !self.is_within_width(out) {
            return Err(invalid(Operand::RCX));
        }
        let out_at = match self.module_access(out, READ_WRITE) {
            Ok(at) => at,
            Err(next) => return Ok(Done::Other(next)),
        };
        let mut report_data = [0; 64];
        if let Err(next) = self.read_for_guest(data, data_at, &mut report_data) {
            return Ok(Done::Other(next));
        }
        let mut report = [0; REPORT_LEN];
        report[0] = 0x81;
        report[80..128].copy_from_slice(&hash);
        report[128..192].copy_from_slice(&report_data);
        report[TDINFO].copy_from_slice(&tdinfo);
        if self.p.cfg.seal_reports {
            self.p.report_key.seal(&mut report);
        }
        match self.write_for_guest(out, out_at, &report) {
            Ok(()) => Ok(Done::Status(Status::SUCCESS)),
            Err(next) => Ok(Done::Other(next)),
        }
    }
}

pub(super) fn rtmr_lock(td: &Td, mode: LockMode) -> Result<Guard<'_>, Done> {
    let lock = &td.rtmr_lock;
    lock.guard(mode, Side::Guest).ok_or_else(|| {
        let busy = Code::OPERAND_BUSY.on(Operand::RTMR);
        match lock.is_free_but_marked() {
            true => Done::HostPriority(busy),
            false => Done::Status(busy),
        }
    })
}
