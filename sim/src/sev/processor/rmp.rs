//! The RMP instructions of an SNP guest (APM vol. 3, PVALIDATE and RMPADJUST).

use std::sync::atomic::Ordering;

use kvm_ops::{Gfn, Gpa, Privacy, Result, Tech};
use kvm_ops_cpu::{Exception, Exit as CpuExit, Untranslated};
use soft_amd_sp::{AccessFault, GuestPage, GuestRmpError, PageSize, Platform, RmpAdjust, RmpError};

use super::exits::{GP, PAGE_NOT_VALIDATED, RAX, RCX, RDX};
use super::faults::memory_fault;
use crate::processor::{Next, Processor};
use crate::sev::access::{Attempt, on_page};

const UD: u8 = 6;

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

fn size(rcx: u64) -> Option<PageSize> {
    match rcx as u32 {
        0 => Some(PageSize::Size4K),
        1 => Some(PageSize::Size2M),
        _ => None,
    }
}

impl Processor {
    /// PVALIDATE: CF says that the page was in that state before.
    pub(super) fn pvalidate(&mut self, exit: CpuExit) -> Result<Next> {
        let (size, valid) = (size(self.cpu.gpr(RCX)), self.cpu.gpr(RDX) & 1 != 0);
        self.rmp(exit, size, |platform, page, size| {
            platform.pvalidate(&page, size, valid)
        })
    }

    /// RMPADJUST.
    pub(super) fn rmpadjust(&mut self, exit: CpuExit) -> Result<Next> {
        let (size, operand) = (size(self.cpu.gpr(RCX)), self.cpu.gpr(RDX));
        let adjust = RmpAdjust {
            target_vmpl: operand as u8,
            permissions: (operand >> 8) as u8,
            vmsa: operand >> 16 & 1 != 0,
        };
        self.rmp(exit, size, |platform, page, size| {
            platform.rmpadjust(&page, size, &adjust).map(|()| true)
        })
    }

    fn rmp(
        &mut self,
        exit: CpuExit,
        size: Option<PageSize>,
        instruction: impl Fn(&Platform, GuestPage, PageSize) -> Result<bool, GuestRmpError>,
    ) -> Result<Next> {
        if self.vm.tech != Tech::SevSnp {
            return Ok(self.raise(Exception::plain(UD)));
        }
        let linear = self.cpu.gpr(RAX);
        let gpa = match self.in_turn(|cpu| cpu.translate(linear)) {
            Ok(gpa) => gpa,
            Err(Untranslated::Fault(fault)) => return Ok(self.raise(fault)),
            Err(Untranslated::Exit(exit)) => return Ok(Next::Outside(exit)),
            Err(_) => return Ok(Next::Again),
        };
        let (gfn, privacy) = self.vm.sev.mask().split(Gpa::new(gpa));
        let Some(size) = size else {
            self.finish_rmp(&exit, Err(RmpError::Input));
            return Ok(Next::Again);
        };
        if privacy == Privacy::Shared {
            // A nested page fault that no change of the RMP could help.
            return Ok(memory_fault(gfn, Privacy::Shared));
        }
        // The instruction takes the page around the address.
        let frames = size.bytes() >> 12;
        let gfn = Gfn::new(gfn.get() & !(frames - 1));
        let vm = std::sync::Arc::clone(&self.vm);
        let vmpl = self.side()?.shared.vmpl.load(Ordering::Relaxed);
        match on_page(&vm, gfn, |platform, page| {
            instruction(platform, page.vmpl(vmpl), size)
        }) {
            Attempt::Done(changed) => self.finish_rmp(&exit, Ok(changed)),
            Attempt::Code(code) => self.finish_rmp(&exit, Err(code)),
            Attempt::Fault(AccessFault::NotValidated { .. }) => {
                return Ok(self.vc(&exit, PAGE_NOT_VALIDATED));
            }
            Attempt::Fault(_) => return Ok(self.raise(Exception::with_code(GP, 0))),
            Attempt::Leave => return Ok(memory_fault(gfn, Privacy::Private)),
            Attempt::Fail(error) => return Err(error),
        }
        Ok(Next::Again)
    }

    /// The code in RAX, and the flags that follow it.
    fn finish_rmp(&mut self, exit: &CpuExit, done: Result<bool, RmpError>) {
        let (code, carry) = match done {
            Ok(changed) => (0, !changed),
            Err(code) => (code.code().unwrap_or(u32::MAX), false),
        };
        let mut flags = self.cpu.rflags() & !(CF | PF | AF | ZF | SF | OF);
        for (flag, set) in [
            (CF, carry),
            (ZF, code == 0),
            (SF, code >> 31 != 0),
            (PF, (code as u8).count_ones().is_multiple_of(2)),
        ] {
            if set {
                flags |= flag;
            }
        }
        self.cpu.set_rflags(flags);
        self.cpu.set_gpr(RAX, code.into());
        self.cpu.skip(exit);
    }
}
