//! Building a TD: from the lease of a KeyID to TDH.MNG.INIT, and back from wherever it failed.
//!
//! [`Control`](super::Control) records the completed steps: the state of the key, and the pages that
//! the module took, in order. Undoing is the teardown's code, run on this record: the key
//! first, because the module gives no page back before (TDH.PHYMEM.PAGE.RECLAIM), then the pages
//! from the last to the first, which is the TDR.

use kvm_ops::{Error, Field, Gfn, Hkid, Host, Hpa, Level, PagePort, Result, SeamPort, Step};

use super::{KeyState, POISONED, Td};
use crate::limits::Limits;
use crate::params;
use crate::seamcall::{Calls, Failed, Outcome};
use crate::topology::one_cpu_per_package;

impl<H: Host> Td<H> {
    /// `Created -> Initialized`. After an error the TD is `Created` again, and the module knows
    /// nothing of it; or poisoned, if that could not be brought about.
    pub(crate) fn init(&self) -> Result<()> {
        self.life.require(Step::Created)?;
        // All memory is private at first, as the attributes are.
        self.set_shared(Gfn::new(0), self.frames(), false)?;
        let calls = self.calls()?;
        let td_params = self.lock(&self.td_params).clone();
        let with_cpuid = !td_params.arrives && !td_params.cpuid.is_empty();
        let limits = Limits::read(&calls, with_cpuid).map_err(|failed| self.error_of(&failed))?;
        if td_params.arrives {
            self.journey.set_awaits();
            return self.build_or_undo(&calls, &limits, None, "TD created, waiting for a guest");
        }
        let image = params::encode(&td_params, self.params.vcpus, &limits)?;
        self.build_or_undo(&calls, &limits, Some(&image), "TD created and initialised")
    }

    fn build_or_undo(
        &self,
        calls: &Calls<'_, H::Seam>,
        limits: &Limits,
        image: Option<&[u8; params::SIZE]>,
        step: &'static str,
    ) -> Result<()> {
        match self.build(calls, limits, image) {
            Ok(()) => {
                let key = self.lock(&self.control).hkid().map(|hkid| hkid.0);
                self.took_step(step, key);
                self.life.advance(Step::Initialized)
            }
            Err(error) => Err(self.undo(error)),
        }
    }

    fn build(
        &self,
        calls: &Calls<'_, H::Seam>,
        limits: &Limits,
        image: Option<&[u8; params::SIZE]>,
    ) -> Result<()> {
        let cpus = one_cpu_per_package(self.seam()?)?;
        let hkid = self.lease_key()?;
        let params = match image {
            Some(image) => {
                let scratch = self.scratch()?;
                self.pages()?.write(scratch, image)?;
                Some(scratch)
            }
            None => None,
        };

        self.give(|page| calls.mng_create(page, hkid))?;
        self.lock(&self.control).key = KeyState::Assigned;
        let tdr = self.tdr()?;
        for cpu in cpus {
            calls
                .mng_key_config(cpu, tdr)
                .map_err(|failed| self.error_of(&failed))?;
        }
        for _ in 0..limits.tdcs_pages {
            self.give(|page| calls.mng_addcx(page, tdr))?;
        }
        if let Some(params) = params {
            calls
                .mng_init(tdr, params)
                .map_err(|failed| self.error_of(&failed))?;
        }
        self.lock(&self.control).tdvps_pages = limits.tdvps_pages;
        self.prebind(calls, tdr)
    }

    /// Says which migration TD may be bound once the TD runs.
    fn prebind(&self, calls: &Calls<'_, H::Seam>, tdr: Hpa) -> Result<()> {
        let Some(service) = self.lock(&self.td_params).migration_td else {
            return Ok(());
        };
        let scratch = self.scratch()?;
        self.pages()?.write(scratch, &service.info_hash)?;
        calls
            .servtd_prebind(tdr, scratch, service.attributes)
            .map_err(|failed| self.error_of(&failed))
    }

    fn lease_key(&self) -> Result<Hkid> {
        let leased = self.seam()?.key_ids().lease();
        let lease = leased.inspect_err(|error| {
            let (technology, vm) = ("tdx", self.life.id().0);
            let advice = error.advice(self.life.tech());
            tracing::warn!(technology, vm, %error, "{advice}");
        })?;
        let (number, hkid) = (lease.number(), lease.hkid());
        {
            let mut control = self.lock(&self.control);
            control.key = KeyState::Leased;
            control.lease = Some(lease);
        }
        // A KeyID has 16 bits at most (TDX module ABI, TDH.MNG.CREATE).
        if u32::from(hkid.0) == number {
            Ok(hkid)
        } else {
            Err(Error::Invalid(Field::Hkid, number.into()))
        }
    }

    /// The address of the host's page for data that the module reads: TD_PARAMS, contents of initial
    /// pages. The page stays until the TD is finalised or torn down.
    pub(crate) fn scratch(&self) -> Result<Hpa> {
        if let Some(page) = &self.lock(&self.control).scratch {
            return Ok(page.hpa());
        }
        let page = self.take_page(Level::Size4K)?;
        let hpa = page.hpa();
        let other = self.lock(&self.control).scratch.replace(page);
        other.into_iter().for_each(|page| self.give_page_back(page));
        Ok(hpa)
    }

    /// Frees the scratch page, if there is one.
    pub(crate) fn drop_scratch(&self) {
        let page = self.lock(&self.control).scratch.take();
        page.into_iter().for_each(|page| self.give_page_back(page));
    }

    /// Takes a page and gives it to the module by `call`. If the module takes it, it is a control
    /// page of the TD from then on; else it goes back.
    pub(crate) fn give(&self, call: impl FnOnce(Hpa) -> Outcome) -> Result<Hpa> {
        let page = self.take_page(Level::Size4K)?;
        let hpa = page.hpa();
        match call(hpa) {
            Ok(()) => {
                let mut control = self.lock(&self.control);
                if control.pages.is_empty() {
                    self.set_tdr(Some(hpa));
                }
                control.pages.push(page);
                Ok(hpa)
            }
            Err(failed) => {
                self.give_page_back(page);
                Err(self.error_of(&failed))
            }
        }
    }

    /// The caller's error for a failed call. It poisons nothing while the TD is built, because all of
    /// that is undone.
    fn error_of(&self, failed: &Failed) -> Error {
        if self.life.step() != Step::Created {
            return self.failed(failed);
        }
        failed.report(&self.life, Some("the creation is undone: initialise again"));
        failed.error()
    }

    /// Brings the TD back to its state before `vm_init`. Returns the caller's error: the failure
    /// itself, or that of the undoing, after which the TD is poisoned.
    fn undo(&self, error: Error) -> Error {
        if let Err(failed) = self.release_key() {
            let diagnosis = failed.report(&self.life, Some(POISONED));
            self.life.poison_by(diagnosis);
            return failed.leak_error();
        }
        self.free_control_pages();
        match self.account.report(&self.life).leaks.first() {
            Some(leak) => {
                self.life.poison_by(self.life.explain(leak.error));
                leak.error
            }
            None => error,
        }
    }
}
