//! The rest of the teardown: private pages, control pages, the TDR; or the account of a TD that
//! firmware keeps.

use alloc::vec::Vec;

use kvm_ops::{
    Drained, Error, Field, FreeReport, Host, KeyReleased, Leak, Leaked, Level, Pfn, Result,
    SeamPort, Step, Tech, VmPort,
};
use kvm_ops_mmu::PageKind;

use super::{Key, Td, at};
use crate::Leaf;
use crate::seamcall::Outcome;

impl<H: Host> Td<H> {
    /// One TDH.PHYMEM.PAGE.RECLAIM for each page that the mirror lists: the guest's pages, then the
    /// pages of the Secure-EPT.
    pub(crate) fn drain(&self, released: &KeyReleased) -> Result<()> {
        self.check_token(released)?;
        self.step.get().require(Step::KeyReleased)?;
        let mut tables = Vec::new();
        self.write_private()
            .mirror
            .drain(|page, level, held| match held {
                PageKind::Page => self.reclaim_and_free(page, level),
                PageKind::Table => tables.push(page),
            });
        for table in tables {
            self.reclaim_and_free(table, Level::Size4K);
        }
        self.step.set(Step::Drained);
        Ok(())
    }

    pub(crate) fn check_token(&self, released: &KeyReleased) -> Result<()> {
        if released.vm() != self.id {
            return Err(Error::Invalid(Field::Token, released.vm().0));
        }
        Ok(())
    }

    pub(crate) fn check_drained(&self, drained: &Drained) -> Result<()> {
        if drained.vm() != self.id {
            return Err(Error::Invalid(Field::Token, drained.vm().0));
        }
        self.step.get().require(Step::Drained)
    }

    /// Reclaims a page that is not the mirror's, for an embedder that keeps separate tables. The page is
    /// the caller's again, or counted as leaked.
    pub(crate) fn reclaim_for(
        &self,
        released: &KeyReleased,
        page: Pfn,
        level: Level,
    ) -> Result<()> {
        self.check_token(released)?;
        self.step
            .get()
            .require_one_of(&[Step::KeyReleased, Step::Drained])?;
        if page.base().is_none() {
            return Err(Error::Invalid(Field::HostAddress, page.get()));
        }
        self.reclaim(page).map_err(|failed| {
            self.lock(&self.account).taken += level.frames();
            self.kept(page, level, &failed);
            failed.error()
        })
    }

    fn reclaim(&self, page: Pfn) -> Outcome {
        self.calls_for(Leaf::PhymemPageReclaim)?
            .phymem_page_reclaim(at(page))
    }

    fn reclaim_and_free(&self, page: Pfn, level: Level) {
        match self.reclaim(page) {
            Ok(()) => self.free_page(page, level),
            Err(failed) => self.kept(page, level, &failed),
        }
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
                self.reclaim_and_free(page, Level::Size4K);
            }
        }
    }

    /// The module uses the TDR while it reclaims the TD's other pages and counts them in it, so it
    /// comes last, and stays if one of them did. Its lines are the module's own: they are written
    /// back under the global KeyID.
    fn free_tdr(&self, tdr: Pfn) {
        let kept = self.lock(&self.account).kept;
        let done = match kept {
            Some(failed) => Err(failed),
            None => self.reclaim(tdr).and_then(|()| {
                let calls = self.calls_for(Leaf::PhymemPageWbinvd)?;
                calls.phymem_page_wbinvd(calls.port().with_key_id(at(tdr), None))
            }),
        };
        match done {
            Ok(()) => self.free_page(tdr, Level::Size4K),
            Err(failed) => self.kept(tdr, Level::Size4K, &failed),
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
        self.close_gate();
        self.drop_scratch();
        let (failed, key, pages) = {
            let mut control = self.lock(&self.control);
            (
                control.failed,
                control.key,
                core::mem::take(&mut control.pages),
            )
        };
        let (operation, error) = match failed {
            Some(failed) => (failed.leaf.name(), failed.leak_error()),
            None => ("mmu_release_hkid", error),
        };
        let leak = |page, level| {
            self.lock(&self.account).leak(page, level, operation, error);
        };
        self.write_private()
            .mirror
            .drain(|page, level, _| leak(page, level));
        pages.into_iter().for_each(|page| leak(page, Level::Size4K));
        if let Key::Leased(hkid) = key {
            // The module never had it.
            self.return_key(hkid);
        } else if let Some(hkid) = key.hkid() {
            let number = hkid.0.into();
            if let Some(seam) = self.host.seam() {
                seam.key_ids().leak(number);
            }
            self.lock(&self.account).leaks.push(Leak {
                what: Leaked::Key(number),
                operation,
                error,
            });
        }
        self.step.set(Step::Poisoned);
        self.report()
    }

    /// Closes the VM below and draws the account up.
    fn report(&self) -> FreeReport {
        let mut report = FreeReport::new(self.id, Tech::Tdx);
        report.keys_freed = self.lock(&self.control).keys_freed;
        let port = self.port.write().take();
        let closed = port.map_or(Ok(()), VmPort::close);
        let mut account = self.lock(&self.account);
        report.pages_freed = account.freed;
        report.leaks = core::mem::take(&mut account.leaks);
        if let Err(error) = closed {
            report.leaks.push(Leak {
                what: Leaked::Handle(self.id.0 as i64),
                operation: "close VM",
                error,
            });
        }
        report
    }
}
