//! TDG.VM.RD/WR, TDG.VP.RD/WR, TDG.SYS.RD and TDG.SYS.RDALL

use super::tdcall::{Done, invalid};
use super::{Guest, Next};
use crate::meta::place::{Context, is_null};
use crate::meta::table::Agent;
use crate::meta::vcpu::VcpuFields;
use crate::meta::{self, Write};
use crate::status::{Code, Operand, Status};

const LIST_SIZE: usize = meta::sys::LIST_SIZE;

impl Guest<'_> {
    fn first_id(&mut self, context: Context) -> Result<(), Status> {
        self.ctx.gprs.rdx = meta::first_id(context, Agent::Guest);
        Err(Code::METADATA_FIRST_FIELD_ID_IN_CONTEXT.status())
    }

    fn fields(&mut self) -> VcpuFields<'_> {
        VcpuFields {
            p: self.p,
            td: self.td,
            vcpu: self.vcpu,
            ctx: &mut self.ctx,
            agent: Agent::Guest,
        }
    }

    /// The operands of a write; R8 is cleared, RCX must be 0.
    fn write_operands(&mut self) -> Result<Write, Status> {
        let r = &mut self.ctx.gprs;
        let write = Write {
            id: r.rdx,
            value: r.r8,
            mask: r.r9,
        };
        r.r8 = 0;
        if r.rcx != 0 {
            return Err(invalid(Operand::RCX));
        }
        Ok(write)
    }

    pub(super) fn vm_rd(&mut self, version: u8) -> Result<(), Status> {
        let r = &mut self.ctx.gprs;
        let id = r.rdx;
        if version != 0 {
            r.rdx = u64::MAX;
        }
        r.r8 = 0;
        if version > 1 {
            return Err(invalid(Operand::RAX));
        }
        if r.rcx != 0 {
            return Err(invalid(Operand::RCX));
        }
        if version == 1 && is_null(id) {
            return self.first_id(meta::td::context(self.td));
        }
        let read = meta::td::read(self.p, self.td, Agent::Guest, id)?;
        let r = &mut self.ctx.gprs;
        r.r8 = read.value;
        if version == 1 {
            r.rdx = read.next();
        }
        Ok(())
    }

    pub(super) fn vm_wr(&mut self) -> Result<(), Status> {
        let write = self.write_operands()?;
        let old = meta::td_write::write(self.p, self.td, Agent::Guest, write)?;
        self.ctx.gprs.r8 = old;
        Ok(())
    }

    pub(super) fn vp_rd(&mut self) -> Result<(), Status> {
        let r = &mut self.ctx.gprs;
        let id = r.rdx;
        (r.rdx, r.r8) = (u64::MAX, 0);
        if r.rcx != 0 {
            return Err(invalid(Operand::RCX));
        }
        if is_null(id) {
            return self.first_id(meta::vcpu::context(self.td));
        }
        let read = self.fields().read(id)?;
        (self.ctx.gprs.rdx, self.ctx.gprs.r8) = (read.next(), read.value);
        Ok(())
    }

    pub(super) fn vp_wr(&mut self) -> Result<(), Status> {
        let write = self.write_operands()?;
        let old = self.fields().write(write)?;
        self.ctx.gprs.r8 = old;
        Ok(())
    }

    pub(super) fn sys_rd(&mut self) -> Result<(), Status> {
        let r = &mut self.ctx.gprs;
        let id = r.rdx;
        (r.rdx, r.r8) = (u64::MAX, 0);
        if is_null(id) {
            return self.first_id(Context::Sys);
        }
        let read = meta::sys::read(&self.p.cfg, Agent::Guest, id)?;
        (self.ctx.gprs.rdx, self.ctx.gprs.r8) = (read.next(), read.value);
        Ok(())
    }

    /// The list is put together in the guest's page, whose other bytes stay.
    pub(super) fn sys_rdall(&mut self) -> Result<Done, Status> {
        const READ_WRITE: u64 = 3;
        let (gpa, id) = (self.ctx.gprs.rdx, self.ctx.gprs.r8);
        self.ctx.gprs.r8 = u64::MAX;
        if gpa % LIST_SIZE as u64 != 0 || !self.td.is_valid_private_gpa(gpa) {
            return Err(invalid(Operand::RDX));
        }
        let at = match self.module_access(gpa, READ_WRITE) {
            Ok(at) => at,
            Err(next) => return Ok(self.not_yet(next, id)),
        };
        let mut list = [0; LIST_SIZE];
        if let Err(next) = self.read_for_guest(gpa, at, &mut list) {
            return Ok(self.not_yet(next, id));
        }
        let dump = meta::sys::dump(&self.p.cfg, Agent::Guest, id, &mut list)?;
        if let Err(next) = self.write_for_guest(gpa, at, &list) {
            return Ok(self.not_yet(next, id));
        }
        self.ctx.gprs.r8 = dump.next;
        Ok(dump.result.into())
    }

    /// The call does not complete, and the guest's registers are as before it.
    fn not_yet(&mut self, next: Next, r8: u64) -> Done {
        self.ctx.gprs.r8 = r8;
        Done::Other(next)
    }
}
