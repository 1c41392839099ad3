//! The end of a VM that shares a context, or gave it away.

use alloc::sync::Arc;

use kvm_ops::{Drained, Error, FreeReport, Host, KeyReleased, PspPort, Result, Step, VmPort};

use super::bond::Tenure;
use super::staged::unstage;
use crate::shared::Shared;
use crate::teardown;

/// What a VM's teardown finds of its context.
pub(crate) enum Parting<H: Host> {
    /// It is the VM's own, or it has none: the teardown takes its usual way.
    Own,
    /// Mirrors use it still: it stays, with all pages, and the last of them takes it down. The VM
    /// itself has nothing any more; the step is that of its teardown.
    Stays(Step),
    /// The VM was a mirror; the estate that it was the last to use is to be taken down.
    Mirrored(Option<Arc<Shared<H>>>),
}

impl<H: Host> Parting<H> {
    /// First step of the teardown, before the key. Waits for a move that is under way.
    ///
    /// # Errors
    /// Where the port keeps the ASID bound.
    pub(crate) fn of(vm: &Arc<Shared<H>>) -> Result<Self> {
        let _claimed = vm.claim_waiting();
        unstage(vm);
        // vCPUs first: from here on nothing of this VM uses the context.
        vm.stop();
        let mirror_of = match &vm.bond().tenure {
            Tenure::Mirror(home) => Some(Arc::clone(home)),
            Tenure::Released { mirror_of, .. } => mirror_of.clone(),
            _ => None,
        };
        vm.bond().tenure = Tenure::Moved;
        if let Some(home) = mirror_of {
            // A copy that names the owner's guest: forgotten, not decommissioned.
            drop(vm.context().take());
            unbind(vm)?;
            // Its VMSAs are its own pages: no line with the key may be left when they go.
            vm.sp().psp.wbinvd_all();
            return Ok(Self::Mirrored(home.mirror_leaves(vm)));
        }
        let home = vm.bond().home.clone();
        if home.is_some_and(|home| home.owner_leaves(vm)) {
            let step = vm.step();
            unbind(vm)?;
            return Ok(Self::Stays(step));
        }
        Ok(Self::Own)
    }

    /// The step of a VM that left its context to others.
    pub(crate) fn step(&self) -> Option<Step> {
        match self {
            Self::Stays(step) => Some(*step),
            _ => None,
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn release_key(&mut self, vm: &Shared<H>) -> Result<KeyReleased> {
        let Self::Stays(step) = self else {
            return vm.release_key();
        };
        *step = Step::KeyReleased;
        // SAFETY: the key is not this VM's any more. It is in use by the mirrors' household, which
        // also has all the pages under it, and gives back both in the order that is demanded.
        Ok(unsafe { KeyReleased::assert_released(vm.id) })
    }

    #[allow(unsafe_code)]
    pub(crate) fn drain(
        &mut self,
        vm: &Shared<H>,
        released: KeyReleased,
    ) -> Result<Drained, (Error, KeyReleased)> {
        let Self::Stays(step) = self else {
            return vm.drain(released);
        };
        if released.vm() != vm.id {
            let foreign = Error::Invalid(kvm_ops::Field::Token, released.vm().0);
            return Err((foreign, released));
        }
        *step = Step::Drained;
        // SAFETY: no page is this VM's any more: they went with the key.
        Ok(unsafe { released.assert_drained() })
    }

    pub(crate) fn free(self, vm: Arc<Shared<H>>, drained: Drained) -> FreeReport {
        match self {
            Self::Own => teardown::free(vm, drained),
            Self::Stays(_) => vm.report(),
            Self::Mirrored(estate) => settle(estate, teardown::free(vm, drained)),
        }
    }

    pub(crate) fn abandon(self, vm: Arc<Shared<H>>, error: Error) -> FreeReport {
        let report = teardown::abandon(vm, error);
        match self {
            Self::Mirrored(estate) => settle(estate, report),
            _ => report,
        }
    }
}

fn unbind<H: Host>(vm: &Shared<H>) -> Result<()> {
    if vm.asid().is_ok() {
        vm.port.bind_asid(None, vm.mask)?;
        vm.set_bound(None);
    }
    Ok(())
}

/// Takes down what the last mirror left of its owner, and adds it to the mirror's report.
fn settle<H: Host>(estate: Option<Arc<Shared<H>>>, mut report: FreeReport) -> FreeReport {
    let Some(estate) = estate else {
        return report;
    };
    let drained = estate
        .release_key()
        .and_then(|key| estate.drain(key).map_err(|(error, _)| error));
    let rest = match drained {
        Ok(drained) => teardown::free(estate, drained),
        Err(error) => teardown::abandon(estate, error),
    };
    report.pages_freed += rest.pages_freed;
    report.keys_freed += rest.keys_freed;
    report.leaks.extend(rest.leaks);
    report
}
