//! Building a TD: from the lease of a KeyID to TDH.MNG.INIT, and back from wherever it failed.
//!
//! [`Control`](super::Control) records the completed steps: the state of the key, and the pages that
//! the module took, in order. Undoing is the teardown's code, run on this record: the key
//! first, because the module gives no page back before (TDH.PHYMEM.PAGE.RECLAIM), then the pages
//! from the last to the first, which is the TDR.

use kvm_ops::{Error, Field, Gfn, Hkid, Host, Hpa, Level, PagePort, Pfn, Result, SeamPort, Step};

use super::{Key, Td, at};
use crate::limits::Limits;
use crate::params;
use crate::seamcall::{Calls, Failed, Outcome};
use crate::topology::one_cpu_per_package;

impl<H: Host> Td<H> {
    /// `Created -> Initialized`. After an error the TD is `Created` again, and the module knows
    /// nothing of it; or poisoned, if that could not be brought about.
    pub(crate) fn init(&self) -> Result<()> {
        self.step.get().require(Step::Created)?;
        // All memory is private at first, as the attributes are.
        self.set_shared(Gfn::new(0), self.frames(), false)?;
        let calls = self.calls()?;
        let limits = Limits::read(&calls, !self.td_params.cpuid.is_empty())
            .map_err(|failed| failed.error())?;
        let image = params::encode(&self.td_params, self.params.vcpus, &limits)?;
        match self.build(&calls, &limits, &image) {
            Ok(()) => {
                self.step.set(Step::Initialized);
                Ok(())
            }
            Err(error) => Err(self.undo(error)),
        }
    }

    fn build(
        &self,
        calls: &Calls<'_, H::Seam>,
        limits: &Limits,
        image: &[u8; params::SIZE],
    ) -> Result<()> {
        let cpus = one_cpu_per_package(self.seam()?)?;
        let hkid = self.lease_key()?;
        let scratch = self.scratch()?;
        self.pages()?.write(at(scratch), image)?;

        self.give(|page| calls.mng_create(page, hkid))?;
        self.lock(&self.control).key = Key::Assigned(hkid);
        let tdr = self.tdr()?;
        for cpu in cpus {
            calls
                .mng_key_config(cpu, tdr)
                .map_err(|failed| failed.error())?;
        }
        for _ in 0..limits.tdcs_pages {
            self.give(|page| calls.mng_addcx(page, tdr))?;
        }
        calls
            .mng_init(tdr, at(scratch))
            .map_err(|failed| failed.error())?;
        self.lock(&self.control).tdvps_pages = limits.tdvps_pages;
        Ok(())
    }

    fn lease_key(&self) -> Result<Hkid> {
        let pool = self.seam()?.key_ids();
        let key = pool.lease()?;
        let Ok(number) = u16::try_from(key) else {
            // A KeyID has 16 bits at most (TDX module ABI, TDH.MNG.CREATE).
            pool.give_back(key);
            return Err(Error::Invalid(Field::Hkid, key.into()));
        };
        let hkid = Hkid(number);
        self.lock(&self.control).key = Key::Leased(hkid);
        Ok(hkid)
    }

    /// A page of the host's for what the module reads: TD_PARAMS, contents of initial pages. It
    /// stays until the TD is finalised or torn down.
    pub(crate) fn scratch(&self) -> Result<Pfn> {
        let kept = self.lock(&self.control).scratch;
        if let Some(page) = kept {
            return Ok(page);
        }
        let page = self.take_page(Level::Size4K)?;
        self.lock(&self.control).scratch = Some(page);
        Ok(page)
    }

    /// Frees the scratch page, if there is one.
    pub(crate) fn drop_scratch(&self) {
        let page = self.lock(&self.control).scratch.take();
        if let Some(page) = page {
            self.free_page(page, Level::Size4K);
        }
    }

    /// Takes a page and gives it to the module by `call`. If the module takes it, it is a control
    /// page of the TD from then on; else it goes back.
    pub(crate) fn give(&self, call: impl FnOnce(Hpa) -> Outcome) -> Result<Hpa> {
        let page = self.take_page(Level::Size4K)?;
        match call(at(page)) {
            Ok(()) => {
                let mut control = self.lock(&self.control);
                if control.pages.is_empty() {
                    self.set_tdr(Some(at(page)));
                }
                control.pages.push(page);
                Ok(at(page))
            }
            Err(failed) => {
                self.free_page(page, Level::Size4K);
                Err(self.error_of(&failed))
            }
        }
    }

    /// The caller's error for a failed call. It poisons nothing while the TD is built, because all of
    /// that is undone.
    fn error_of(&self, failed: &Failed) -> Error {
        match self.step.get() {
            Step::Created => failed.error(),
            _ => self.failed(failed),
        }
    }

    /// Brings the TD back to its state before `vm_init`. Returns the caller's error: the failure
    /// itself, or that of the undoing, after which the TD is poisoned.
    fn undo(&self, error: Error) -> Error {
        if let Err(failed) = self.release_key() {
            self.step.set(Step::Poisoned);
            return failed.leak_error();
        }
        let leaks = self.lock(&self.account).leaks.len();
        self.free_control_pages();
        let account = self.lock(&self.account);
        match account.leaks.get(leaks) {
            Some(leak) => {
                self.step.set(Step::Poisoned);
                leak.error
            }
            None => error,
        }
    }
}
