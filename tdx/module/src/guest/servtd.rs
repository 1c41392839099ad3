//! TDG.SERVTD.RD and TDG.SERVTD.WR: a service TD's access to the fields of a target.

use super::report::rtmr_lock;
use super::tdcall::{Done, invalid};
use super::{Guest, Next, TDCALL_LENGTH, TdExit};
use crate::call::{Leaf, td_in_state, tdr};
use crate::lock::{Guard, LockMode, Side};
use crate::meta;
use crate::meta::table::Agent;
use crate::op_state;
use crate::servtd::{self, SLOTS, State};
use crate::status::{Code, Operand, Status};
use crate::td::Td;
use crate::vcpu::LastExit;

/// Selects TDG.SERVTD.RD or TDG.SERVTD.WR.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

impl Guest<'_> {
    /// TDG.SERVTD.RD and TDG.SERVTD.WR
    pub(super) fn servtd(&mut self, access: Access) -> Result<Done, Status> {
        let r = self.ctx.gprs;
        let named = [r.r10, r.r11, r.r12, r.r13];
        if access == Access::Read {
            self.ctx.gprs.rdx = u64::MAX;
        }
        self.ctx.gprs.r8 = 0;
        let (slot, target_pa) = servtd::open_handle(r.rcx, &self.td.uuid());
        if slot >= SLOTS {
            return Err(invalid(Operand::RCX));
        }
        let p = self.p;
        let target = match tdr(p, target_pa, LockMode::Shared, Operand::TDR) {
            Ok(target) => target,
            Err(status) => return self.cross_td(status, target_pa),
        };
        let td = target.td;
        let _op_state = match lock_state(td, access) {
            Ok(guard) => guard,
            Err(status) if td.op_state_lock.is_free_but_marked() => {
                return Ok(Done::HostPriority(status));
            }
            Err(status) => return self.cross_td(status, target_pa),
        };
        let current = td.uuid();
        if named != current {
            if named != td.migration().pre_import_uuid {
                return Err(Code::TARGET_UUID_MISMATCH.status());
            }
            let r = &mut self.ctx.gprs;
            [r.r10, r.r11, r.r12, r.r13] = current;
            return Err(Code::TARGET_UUID_UPDATED.status());
        }
        let _bindings = match lock_bindings(td) {
            Ok(guard) => guard,
            Err(done) => return Ok(done),
        };
        let binding = td.bindings().slot;
        if binding.state != State::Bound {
            let status = Code::SERVTD_NOT_BOUND.detail(slot as u32);
            return self.cross_td(status, target_pa);
        }
        if binding.uuid != self.td.uuid() {
            return self.cross_td(Code::SERVTD_UUID_MISMATCH.status(), target_pa);
        }
        let rtmr = match rtmr_lock(self.td, LockMode::Shared) {
            Ok(guard) => guard,
            Err(done) => return Ok(done),
        };
        let hash = servtd::info_hash(self.td, binding.attributes);
        drop(rtmr);
        if hash != binding.info_hash {
            return self.cross_td(Code::SERVTD_INFO_HASH_MISMATCH.status(), target_pa);
        }
        match access {
            Access::Read => self.read_target(td, r.rdx)?,
            Access::Write => {
                let write = meta::Write {
                    id: r.rdx,
                    value: r.r8,
                    mask: r.r9,
                };
                self.ctx.gprs.r8 = meta::td_write::write(p, td, Agent::ServiceTd, write)?;
            }
        }
        Ok(Done::Status(Status::SUCCESS))
    }

    fn read_target(&mut self, td: &Td, id: u64) -> Leaf {
        if meta::place::is_null(id) {
            self.ctx.gprs.rdx = meta::first_id(meta::td::context(td), Agent::ServiceTd);
            return Err(Code::METADATA_FIRST_FIELD_ID_IN_CONTEXT.status());
        }
        self.renew_key(td, id)?;
        let read = meta::td::read(self.p, td, Agent::ServiceTd, id)?;
        (self.ctx.gprs.r8, self.ctx.gprs.rdx) = (read.value, read.next());
        Ok(())
    }

    /// Makes a new MIG_ENC_KEY before its first word is read, so that the reader gets a key that was never used.
    fn renew_key(&self, td: &Td, id: u64) -> Leaf {
        const MIG_ENC_KEY: (u8, u32) = (0x18, 0x18);
        let place = meta::locate(meta::td::context(td), id)?;
        if place.row_key() == MIG_ENC_KEY && place.element == 0 {
            let words = self.p.machine.rdseed_four(self.p.cfg.rdseed_tries);
            td.migration().enc_key = words.ok_or(Code::RND_NO_ENTROPY.status())?;
        }
        Ok(())
    }

    /// An error that concerns another TD: the host sees it as an exit, the guest as its TDCALL's status.
    fn cross_td(&mut self, status: Status, target: u64) -> Result<Done, Status> {
        if status.code() == Code::OPERAND_BUSY {
            return Err(status);
        }
        self.ctx.gprs.rax = status.0;
        self.ctx.rip = self.ctx.rip.wrapping_add(TDCALL_LENGTH);
        let exit = TdExit::new(Code::CROSS_TD_TRAP, 0);
        Ok(Done::Other(Next::Leave(Box::new(TdExit {
            rdx: status.0,
            r8: target,
            last_exit: LastExit::HostPriorityTimeout,
            ..exit
        }))))
    }
}

fn lock_state(td: &Td, access: Access) -> Leaf<Option<Guard<'_>>> {
    let lock = Some((LockMode::Shared, Side::Guest));
    td_in_state(td, lock, |state| {
        access == Access::Read || op_state::can_be_written_by_service(state)
    })
}

fn lock_bindings(td: &Td) -> Result<Guard<'_>, Done> {
    let lock = &td.servtd_lock;
    lock.guard(LockMode::Shared, Side::Guest).ok_or_else(|| {
        let busy = Code::OPERAND_BUSY.on(Operand::SERVTD_BINDINGS);
        match lock.is_free_but_marked() {
            true => Done::HostPriority(busy),
            false => Done::Status(busy),
        }
    })
}
