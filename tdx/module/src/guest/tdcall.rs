//! TDCALL: dispatch and the small leaves.

use super::servtd::Access;
use super::{Guest, Next, REASON_TDCALL, TDCALL_LENGTH, TdExit};
use crate::leaf::GuestLeaf;
use crate::meta::vcpu_store::management;
use crate::regs::Regs;
use crate::status::{Code, Operand, Status};
use crate::td::FLAG_NO_RBP_MOD;
use crate::vcpu::LastExit;
use std::sync::atomic::Ordering;

const RESERVED_RAX: u64 = 0xFFFF_FFFF_FF00_0000;

/// Result of a leaf that stays in the guest.
pub(super) enum Done {
    /// With this status in RAX.
    Status(Status),
    /// OPERAND_BUSY although the lock is free: a host waits for it.
    HostPriority(Status),
    /// With something else than completion.
    Other(Next),
}

impl From<Status> for Done {
    fn from(status: Status) -> Self {
        Done::Status(status)
    }
}

impl From<Result<(), Status>> for Done {
    fn from(result: Result<(), Status>) -> Self {
        Done::Status(result.err().unwrap_or(Status::SUCCESS))
    }
}

impl From<Result<Done, Status>> for Done {
    fn from(result: Result<Done, Status>) -> Self {
        result.unwrap_or_else(Done::Status)
    }
}

pub(super) fn invalid(op: Operand) -> Status {
    Code::OPERAND_INVALID.on(op)
}

impl Guest<'_> {
    pub(super) fn tdcall(&mut self) -> Next {
        let rax = self.ctx.gprs.rax;
        let version = (rax >> 16) as u8;
        let leaf = GuestLeaf::from_number(rax as u16);
        let done = match leaf {
            Some(leaf) if rax & RESERVED_RAX == 0 && (version == 0 || leaf == GuestLeaf::VmRd) => {
                self.leaf(leaf, version)
            }
            _ => invalid(Operand::RAX).into(),
        };
        self.finish(done)
    }

    fn finish(&mut self, done: Done) -> Next {
        let since = self.ctx.host_priority_since.take();
        match done {
            Done::Status(status) => {
                self.ctx.gprs.rax = status.0;
                Next::Done {
                    length: TDCALL_LENGTH,
                }
            }
            Done::Other(next) => next,
            Done::HostPriority(status) => {
                let now = self.p.machine.tsc();
                let since = since.unwrap_or(now);
                self.ctx.gprs.rax = status.0;
                if now.wrapping_sub(since) < self.td.hp_lock_timeout.load(Ordering::Acquire) {
                    self.ctx.host_priority_since = Some(since);
                    return Next::Done {
                        length: TDCALL_LENGTH,
                    };
                }
                self.ctx.step_over(TDCALL_LENGTH);
                let exit = TdExit::new(Code::HOST_PRIORITY_BUSY_TIMEOUT, 0);
                Next::Leave(Box::new(TdExit {
                    last_exit: LastExit::HostPriorityTimeout,
                    ..exit
                }))
            }
        }
    }

    fn leaf(&mut self, leaf: GuestLeaf, version: u8) -> Done {
        match leaf {
            GuestLeaf::VpVmcall => self.vmcall(),
            GuestLeaf::VpInfo => self.vp_info(),
            GuestLeaf::MrRtmrExtend => self.rtmr_extend().into(),
            GuestLeaf::VpVeinfoGet => self.veinfo_get().into(),
            GuestLeaf::MrReport => self.report().into(),
            GuestLeaf::VpCpuidveSet => self.cpuidve_set().into(),
            GuestLeaf::MemPageAccept => self.accept().into(),
            GuestLeaf::VmRd => self.vm_rd(version).into(),
            GuestLeaf::VmWr => self.vm_wr().into(),
            GuestLeaf::VpRd => self.vp_rd().into(),
            GuestLeaf::VpWr => self.vp_wr().into(),
            GuestLeaf::SysRd => self.sys_rd().into(),
            GuestLeaf::SysRdall => self.sys_rdall().into(),
            GuestLeaf::MemPageAttrRd => self.attributes_read(),
            GuestLeaf::MemPageAttrWr => self.attributes_write(),
            GuestLeaf::VpEnter => self.enter_l2().into(),
            GuestLeaf::VpInvept => self.invept().into(),
            GuestLeaf::VpInvvpid => self.invvpid().into(),
            GuestLeaf::ServtdRd => self.servtd(Access::Read).into(),
            GuestLeaf::ServtdWr => self.servtd(Access::Write).into(),
        }
    }

    fn vmcall(&mut self) -> Done {
        let mask = self.ctx.gprs.rcx;
        let no_rbp_mod = self.td.has_flag(FLAG_NO_RBP_MOD);
        let forbidden = if no_rbp_mod { 0b11_0011 } else { 0b01_0011 };
        if mask & forbidden != 0 || mask >> 32 != 0 {
            return invalid(Operand::RCX).into();
        }
        let guest = self.ctx.gprs.to_array();
        let mut host = [0; 16];
        for (n, slot) in host.iter_mut().enumerate() {
            if mask >> n & 1 != 0 {
                *slot = guest[n];
            }
        }
        let mut host = Regs {
            rax: u64::from(REASON_TDCALL),
            rcx: mask,
            ..Regs::from_array(host)
        };
        if no_rbp_mod {
            host.rbp = self.ctx.host_rbp;
        }
        self.ctx.step_over(TDCALL_LENGTH);
        let exit = TdExit::new(Code::SUCCESS, REASON_TDCALL);
        Done::Other(Next::Leave(Box::new(TdExit {
            vmcall: Some(host),
            last_exit: LastExit::Vmcall { mask },
            ..exit
        })))
    }

    fn vp_info(&mut self) -> Done {
        let max = u64::from(self.td.config().max_vcpus);
        let num = u64::from(self.td.num_vcpus.load(Ordering::Acquire));
        let r = &mut self.ctx.gprs;
        r.rcx = u64::from(self.td.gpa_width());
        r.rdx = self.td.attributes();
        r.r8 = max << 32 | num;
        r.r9 = u64::from(self.vcpu.index.load(Ordering::Acquire));
        (r.r10, r.r11) = (1, 0);
        Status::SUCCESS.into()
    }

    fn veinfo_get(&mut self) -> Result<(), Status> {
        let info = self.ctx.ve_info.take();
        let r = &mut self.ctx.gprs;
        (r.rcx, r.rdx, r.r8, r.r9, r.r10) = (0, 0, 0, 0, 0);
        let info = info.ok_or(Code::NO_VALID_VE_INFO.status())?;
        r.rcx = u64::from(info.reason);
        r.rdx = info.qualification;
        r.r8 = info.gla;
        r.r9 = info.gpa;
        r.r10 = u64::from(info.ilen) | u64::from(info.iinfo) << 32;
        Ok(())
    }

    fn cpuidve_set(&mut self) -> Result<(), Status> {
        let rcx = self.ctx.gprs.rcx;
        if rcx & !3 != 0 {
            return Err(invalid(Operand::RCX));
        }
        let f = &mut self.ctx.store;
        f.set_management(management::CPUID_SUPERVISOR_VE, rcx & 1);
        f.set_management(management::CPUID_USER_VE, rcx >> 1);
        Ok(())
    }
}
