//! The context of an owner that was torn down before its mirrors, with everything under it.

use alloc::vec::Vec;

use kvm_ops::{Error, FreeReport, Host, Level, PspPort};

use crate::books::Books;
use crate::cell::VmsaPage;
use crate::context::Context;
use crate::memory::Memory;
use crate::shared::Shared;
use crate::sp::Sp;

/// An encryption context without a VM.
pub(crate) struct Orphan<H: Host> {
    host: H,
    context: Context,
    pub(super) memory: Memory,
    vmsas: Vec<VmsaPage>,
    books: Books,
}

impl<H: Host> Orphan<H> {
    /// Takes context, pages and VMSAs from a VM whose vCPUs are stopped. `None` if it has no
    /// context.
    pub(super) fn of(vm: &Shared<H>) -> Option<Self> {
        let context = vm.context().take()?;
        let vmsas = vm.all_cells();
        let books = Books::new();
        books.take(&vm.books);
        Some(Self {
            host: vm.host.clone(),
            context,
            memory: core::mem::take(&mut vm.memory()),
            vmsas: vmsas.iter().filter_map(|c| c.state().vmsa.take()).collect(),
            books,
        })
    }

    /// Destroys the guest, in the order of a VM's teardown, and adds the outcome to a report. No
    /// vCPU uses it any more.
    pub(crate) fn destroy(mut self, report: &mut FreeReport) {
        if let Some(sp) = Sp::of(&self.host, &self.books) {
            sp.decommission(&mut self.context);
            sp.psp.wbinvd_all();
            for (_, frame) in self.memory.clear() {
                // The account lists a page that leaks.
                let _ = sp.release(frame.page, frame.level, frame.held);
            }
            for vmsa in self.vmsas {
                let _ = sp.release(vmsa.page, Level::Size4K, vmsa.held);
            }
        }
        self.books.add_to(report);
    }

    /// Gives everything up, and adds it to a report.
    pub(super) fn lose(mut self, error: Error, report: &mut FreeReport) {
        if let Some(sp) = Sp::of(&self.host, &self.books) {
            sp.give_up(&mut self.context, error);
        }
        for (_, frame) in self.memory.clear() {
            self.books.leak_page(frame.page, frame.level, error);
        }
        for vmsa in self.vmsas {
            self.books.leak_page(vmsa.page, Level::Size4K, error);
        }
        self.books.add_to(report);
    }
}
