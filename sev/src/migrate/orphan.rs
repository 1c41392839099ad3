//! The context of an owner that was torn down before its mirrors, with its pages.

use alloc::vec::Vec;

use kvm_ops::{Error, FreeReport, Host, Life, NestedFaultAnswer, PageAccount, PspPort};

use crate::cell::VmsaPage;
use crate::context::Context;
use crate::memory::{Memory, Touch};
use crate::shared::Shared;
use crate::sp::Sp;

/// An encryption context without a VM.
pub(crate) struct Orphan<H: Host> {
    host: H,
    context: Context,
    pub(super) memory: Memory,
    vmsas: Vec<VmsaPage>,
    life: Life,
    account: PageAccount,
    /// A mirror was given up without its teardown and may use the context for ever.
    pub(super) lost: Option<Error>,
}

impl<H: Host> Orphan<H> {
    /// Takes context, pages and VMSAs from a VM whose vCPUs are stopped. `None` if it has no
    /// context.
    pub(super) fn of(vm: &Shared<H>) -> Option<Self> {
        let context = vm.context().take()?;
        let vmsas = vm.all_cells();
        let account = PageAccount::new();
        account.take_over(&vm.account);
        Some(Self {
            host: vm.host.clone(),
            context,
            memory: vm.memory().take_all(),
            vmsas: vmsas.iter().filter_map(|c| c.state().vmsa.take()).collect(),
            life: Life::new(vm.id(), vm.tech()),
            account,
            lost: None,
        })
    }

    /// Maps the page of what a mirror touched. Memory of the mirror's that has none gets one.
    pub(super) fn map_for_mirror(&mut self, touch: &Touch<'_>) -> NestedFaultAnswer {
        let sp = Sp::of(&self.host, &self.account);
        let added = sp.map_or(Ok(()), |sp| self.memory.add_for(&sp, touch));
        if let Err(error) = added {
            return NestedFaultAnswer::Fail(error);
        }
        let mapped = self.memory.map_into_mirror(touch);
        mapped.unwrap_or(NestedFaultAnswer::Leave)
    }

    /// Destroys the guest, in the order of a VM's teardown, and adds the outcome to a report. No
    /// vCPU uses it any more.
    pub(crate) fn destroy(mut self, report: &mut FreeReport) {
        if let Some(error) = self.lost {
            return self.lose(error, report);
        }
        if let Some(sp) = Sp::of(&self.host, &self.account) {
            sp.decommission(&mut self.context);
            sp.psp.wbinvd_all();
            for frame in self.memory.clear() {
                // The account lists a page that leaks.
                let _ = sp.release(frame.page, frame.held);
            }
            for vmsa in self.vmsas {
                let _ = sp.release(vmsa.page, vmsa.held);
            }
        }
        add(report, self.account.report(&self.life));
    }

    /// Gives everything up, and adds it to a report.
    pub(super) fn lose(mut self, error: Error, report: &mut FreeReport) {
        if let Some(sp) = Sp::of(&self.host, &self.account) {
            sp.give_up(&mut self.context, error);
            for frame in self.memory.clear() {
                sp.leak(frame.page, error);
            }
            for vmsa in self.vmsas {
                sp.leak(vmsa.page, error);
            }
        }
        add(report, self.account.report(&self.life));
    }
}

fn add(report: &mut FreeReport, more: FreeReport) {
    report.pages_freed += more.pages_freed;
    report.keys_freed += more.keys_freed;
    report.leaks.extend(more.leaks);
}
