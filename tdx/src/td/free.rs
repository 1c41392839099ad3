//! The rest of the teardown: private pages, control pages, the TDR; or the account of a TD that
//! firmware keeps.

use alloc::vec::Vec;

use kvm_ops::{Error, FreeReport, Host, KeyReleased, Leaked, Page, Result, SeamPort, Step, VmPort};
use kvm_ops_mmu::PageKind;

use super::{KeyState, LEAKED, Td};
use crate::Leaf;
use crate::seamcall::{Failed, Outcome};

impl<H: Host> Td<H> {
    /// One TDH.PHYMEM.PAGE.RECLAIM for each page of the mirror: the guest's pages, then the pages of
    /// the Secure-EPT.
    pub(crate) fn drain(&self) {
        let mut tables = Vec::new();
        let mut private = self.write_private();
        private.mirror.drain(|page, kind| match kind {
            PageKind::Page => self.reclaim_and_free(page),
            PageKind::Table => tables.push(page),
        });
        tables
            .into_iter()
            .for_each(|table| self.reclaim_and_free(table));
        self.took_step("private pages given back", None);
    }

    /// Reclaims a page that is not the mirror's, for an embedder that keeps separate tables. After an
    /// error the page is in the report as leaked.
    pub(crate) fn reclaim_for(&self, released: &KeyReleased, page: Page) -> Result<Page> {
        let torn_down = [Step::KeyReleased, Step::Drained];
        let allowed = self
            .life
            .check_released(released)
            .and_then(|()| self.life.step().require_one_of(&torn_down));
        let error = match allowed.map(|()| self.reclaim(&page)) {
            Ok(Ok(())) => return Ok(page),
            Ok(Err(failed)) => {
                self.lock(&self.control).kept.get_or_insert(failed);
                self.failed(&failed)
            }
            Err(error) => error,
        };
        // The embedder took the page, so it is not in the account.
        for n in 0..page.level().frames() {
            if let Some(hpa) = page.pfn().checked_add(n).and_then(kvm_ops::Pfn::base) {
                let operation = Leaf::PhymemPageReclaim.name();
                self.account.leak_other(Leaked::Page(hpa), operation, error);
            }
        }
        Err(error)
    }

    fn reclaim(&self, page: &Page) -> Outcome {
        self.calls_for(Leaf::PhymemPageReclaim)?
            .phymem_page_reclaim(page.hpa())
    }

    fn reclaim_and_free(&self, page: Page) {
        match self.reclaim(&page) {
            Ok(()) => self.give_page_back(page),
            Err(failed) => self.leak_kept(page, failed),
        }
    }

    /// Counts a page as leaked because of a failed call.
    fn leak_kept(&self, page: Page, failed: Failed) {
        failed.report(&self.life, Some(LEAKED));
        if failed.leaf != Leaf::PhymemPageWbinvd {
            self.lock(&self.control).kept.get_or_insert(failed);
        }
        self.account
            .leak(page, failed.leaf.name(), failed.leak_error());
    }

    /// Gives every control page back, from the last to the first: the TDCX and TDVPR of vCPUs, the
    /// TDCS, and the TDR if nothing of the TD stayed with the module.
    pub(crate) fn free_control_pages(&self) {
        self.drop_scratch();
        loop {
            let (page, is_tdr) = {
                let mut control = self.lock(&self.control);
                match control.pages.pop() {
                    Some(page) => (page, control.pages.is_empty()),
                    None => return,
                }
            };
            if is_tdr {
                self.free_tdr(page);
                self.set_tdr(None);
            } else {
                self.reclaim_and_free(page);
            }
        }
    }

    /// The module uses the TDR while it reclaims the TD's other pages and counts them in it, so it
    /// comes last, and stays if one of them did. Its lines are the module's: they are written back
    /// under the global KeyID.
    fn free_tdr(&self, tdr: Page) {
        let kept = self.lock(&self.control).kept;
        let done = match kept {
            Some(failed) => Err(failed),
            None => self.reclaim(&tdr).and_then(|()| {
                let calls = self.calls_for(Leaf::PhymemPageWbinvd)?;
                calls.phymem_page_wbinvd(calls.port().with_key_id(tdr.hpa(), None))
            }),
        };
        match done {
            Ok(()) => self.give_page_back(tdr),
            Err(failed) => self.leak_kept(tdr, failed),
        }
    }

    /// The end of a TD whose key is gone and whose private pages are given back.
    pub(crate) fn free(&self) -> FreeReport {
        self.free_control_pages();
        self.report()
    }

    /// The end of a TD that the module keeps: nothing of it is freed, and all of it is listed with
    /// the call that failed.
    pub(crate) fn abandon(&self, error: Error) -> FreeReport {
        self.leave_moves();
        self.close_gate();
        self.drop_scratch();
        if self.lock(&self.control).key == KeyState::Leased {
            // The module never had it.
            self.return_key();
        }
        let (failed, lease, pages) = {
            let mut control = self.lock(&self.control);
            let pages = core::mem::take(&mut control.pages);
            (control.failed, control.lease.take(), pages)
        };
        let (operation, error) = match failed {
            Some(failed) => (failed.leaf.name(), failed.leak_error()),
            None => ("mmu_release_hkid", error),
        };
        let leak = |page| self.account.leak(page, operation, error);
        self.write_private().mirror.drain(|page, _| leak(page));
        pages.into_iter().for_each(leak);
        if let Some(lease) = lease {
            let number = Leaked::Key(lease.number());
            self.account.leak_other(number, operation, error);
            // A pool that refuses it does not know it, and never leases it.
            if let Some(seam) = self.host.seam() {
                let _ = seam.key_ids().leak(lease);
            }
        }
        self.life.poison();
        self.report()
    }

    /// Closes the VM below and draws the account up.
    fn report(&self) -> FreeReport {
        let port = self.port.write().take();
        let closed = port.map_or(Ok(()), VmPort::close);
        let mut report = self.account.report(&self.life);
        report.close_vm(closed);
        report
    }
}
