//! The start of vCPUs with encrypted registers: INIT, start-up interrupts, AP reset hold, AP creation.

use kvm_ops::Result;
use kvm_ops_cpu::Exit as CpuExit;

use crate::irq::Mail;
use crate::processor::{Next, Processor};
use crate::sev::guest::Creation;

/// A vCPU that waits for a start-up interrupt because its guest asked for that.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hold {
    /// By the GHCB MSR protocol.
    Msr(CpuExit),
    /// By the GHCB page.
    Page(CpuExit),
}

impl Processor {
    /// Takes INIT and a start-up interrupt, neither of which changes encrypted registers. False for a
    /// processor whose registers are not encrypted.
    pub(crate) fn start_protected(&mut self, mail: &Mail) -> bool {
        if !self.vm.has_vmsas() {
            return false;
        }
        if mail.init && !self.boots() {
            self.uninitialized = false;
            self.change_activity(|activity| activity.waiting = true);
        }
        let starts = mail.start.is_some() && !self.uninitialized && self.cpu.activity().waiting;
        if starts {
            self.vm.sev.change_vcpu(self.id, |vcpu| {
                if let Some(Creation::Run { now, .. }) = &mut vcpu.next {
                    *now = true;
                }
            });
        }
        if starts && let Some(side) = &mut self.sev {
            // The first one starts the vCPU with its save area as it is.
            let hold = side.hold.take().filter(|_| side.started);
            side.started = true;
            self.change_activity(|activity| (activity.waiting, activity.halted) = (false, false));
            if let Some(hold) = hold {
                self.release(hold);
            }
        }
        true
    }

    /// Waits for a start-up interrupt.
    pub(super) fn hold(&mut self, hold: Hold) -> Result<Next> {
        let side = self.side()?;
        (side.hold, side.started) = (Some(hold), true);
        self.uninitialized = false;
        self.change_activity(|activity| activity.waiting = true);
        Ok(Next::Again)
    }

    /// What a vCPU does before its next instruction: another save area, or a VMGEXIT that goes on.
    pub(crate) fn take_work(&mut self) -> Result<Option<Next>> {
        if !self.vm.has_vmsas() || self.sev.is_none() {
            return Ok(None);
        }
        if let Some(exit) = self.side()?.going_on.take() {
            return Ok(Some(Next::Outside(exit)));
        }
        let next = match self.vm.sev.vcpu(self.id).next {
            Some(next @ (Creation::Destroy | Creation::Run { now: true, .. })) => next,
            _ => return Ok(None),
        };
        // What the vCPU was about to get an answer to is forgotten, and its old save area is the guest's.
        let side = self.side()?;
        (side.ghcb, side.hold, side.loaded) = (None, None, None);
        let Creation::Run { vmsa, .. } = next else {
            self.vm.sev.change_vcpu(self.id, |vcpu| vcpu.next = None);
            self.change_activity(|activity| activity.waiting = true);
            return Ok(None);
        };
        self.vm.sev.change_vcpu(self.id, |vcpu| {
            (vcpu.next, vcpu.vmsa) = (None, Some(vmsa));
        });
        let refused = self.load_vmsa()?;
        self.uninitialized = false;
        self.change_activity(|activity| {
            (activity.waiting, activity.halted) = (false, false);
        });
        Ok(refused.map(|exit| Next::Leave(exit, Vec::new())))
    }
}
