//! The end of a VM, in the order that the technology demands.
//!
//! | step | SEV, SEV-ES | SNP |
//! |---|---|---|
//! | `mmu_release_hkid` | vCPUs out; ASID out of the VMCBs; DEACTIVATE; DECOMMISSION; WBINVD | vCPUs out; ASID out of the VMCBs |
//! | `drain_private` | pages and VMSAs freed | every page: (SNP_PAGE_RECLAIM,) RMPUPDATE to the host, freed; VMSAs likewise |
//! | `vm_free` | | SNP_DECOMMISSION; context page reclaimed, freed |
//!
//! The ASID goes to the used-up ones in each case, when firmware has let go of it.
//!
//! Why the two differ: the pages of a SEV guest belong to nobody but the host, and only cache lines
//! with its key stand between them and their next use; with the key gone and the caches written
//! back, none can appear. The pages of an SNP guest are the guest's by the RMP, which names the
//! ASID: were the ASID given to another guest first, that guest would own whatever its host cared
//! to map. So they are taken back while the ASID is still bound, and a context that firmware keeps
//! costs itself and the ASID, not the guest's memory.

use alloc::sync::Arc;

use kvm_ops::{
    Drained, Error, Field, FreeReport, Host, KeyReleased, Leak, Leaked, Level, PspPort, Result,
    Step, VmPort,
};

use crate::migrate;
use crate::shared::Shared;

impl<H: Host> Shared<H> {
    /// No vCPU runs when it returns, and none will.
    pub(crate) fn stop(&self) {
        self.gate.close();
        let cells = self.all_cells();
        // A kick is not lost, so one for each that is inside will do.
        cells.iter().for_each(|cell| cell.kick.kick());
        while self.gate.inside() != 0 {
            self.wait();
        }
    }

    /// Takes the ASID out of the VMCBs.
    pub(crate) fn unbind(&self) -> Result<()> {
        if self.asid().is_ok() {
            self.port
                .bind_asid(None, self.mask)
                .inspect_err(|_| self.poison())?;
            self.set_bound(None);
        }
        Ok(())
    }

    /// First step, after [`leave`](crate::migrate::leave).
    #[allow(unsafe_code)]
    pub(crate) fn release_key(&self) -> Result<KeyReleased> {
        self.step().require_one_of(&[
            Step::Created,
            Step::Initialized,
            Step::Runnable,
            Step::Poisoned,
        ])?;
        if !self.is_snp() {
            if let Some(context) = self.context().as_mut() {
                let sp = self.sp();
                sp.decommission(context);
                sp.psp.wbinvd_all();
            }
        }
        self.set_step(Step::KeyReleased);
        // SAFETY: no vCPU runs any more, and the gate lets none in, so no processor can fetch a
        // line with the ASID's key. For SEV and SEV-ES the lines that there are were written back
        // above, after the last exit: that is all that their pages need, even where DEACTIVATE
        // failed and the ASID is leaked. For SNP nothing more is demanded before pages go: RMPUPDATE
        // itself decides, while the ASID is bound.
        Ok(unsafe { KeyReleased::assert_released(self.id) })
    }

    /// Second step.
    #[allow(unsafe_code)]
    pub(crate) fn drain(&self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        if released.vm() != self.id {
            return Err((Error::Invalid(Field::Token, released.vm().0), released));
        }
        if let Err(error) = self.step().require(Step::KeyReleased) {
            return Err((error, released));
        }
        let sp = self.sp();
        let mut memory = self.memory();
        for (gfn, frame) in memory.clear() {
            // Nothing runs on these mappings; a port that keeps one loses it with the VM.
            let _ = self
                .port
                .map_encrypted(kvm_ops::Gfn::new(gfn), frame.level, None);
            // What is leaked stands in the books.
            let _ = sp.release(frame.page, frame.level, frame.held);
        }
        drop(memory);
        for cell in self.all_cells() {
            if let Some(vmsa) = cell.state().vmsa.take() {
                let _ = sp.release(vmsa.page, Level::Size4K, vmsa.held);
            }
        }
        self.set_step(Step::Drained);
        // SAFETY: every frame and every VMSA was just given back or entered as leaked, and both
        // lists are empty. There are no page tables of firmware's.
        Ok(unsafe { released.assert_drained() })
    }

    /// What is left of the last step but the port.
    fn finish_off(&self) {
        if let Some(mut context) = self.context().take() {
            self.sp().decommission(&mut context);
        }
        let _ = self.port.handle_nested_faults(None);
    }

    /// Gives everything up that the VM holds, for this reason: nothing is proved, so nothing is
    /// used again.
    pub(crate) fn give_up(&self, error: Error) {
        for (_, frame) in self.memory().clear() {
            self.books.leak_page(frame.page, frame.level, error);
        }
        for cell in self.all_cells() {
            if let Some(vmsa) = cell.state().vmsa.take() {
                self.books.leak_page(vmsa.page, Level::Size4K, error);
            }
        }
        if let Some(mut context) = self.context().take() {
            self.sp().give_up(&mut context, error);
        }
    }

    pub(crate) fn report(&self) -> FreeReport {
        let mut report = FreeReport::new(self.id, self.tech);
        self.books.add_to(&mut report);
        report
    }
}

/// Last step.
pub(crate) fn free<H: Host>(shared: Arc<Shared<H>>, drained: Drained) -> FreeReport {
    if drained.vm() != shared.id {
        return abandon(&shared, Error::Invalid(Field::Token, drained.vm().0));
    }
    shared.finish_off();
    let mut report = shared.report();
    let port = Arc::clone(&shared.port);
    let id = shared.id;
    drop(shared);
    // A vCPU's handle may still hold the port; it goes with the last of them then.
    if let Some(Err(error)) = Arc::into_inner(port).map(VmPort::close) {
        report.leaks.push(Leak {
            what: Leaked::Handle(id.0 as i64),
            operation: "close VM",
            error,
        });
    }
    report
}

/// Instead of the last step: firmware keeps what it has, the port with it.
pub(crate) fn abandon<H: Host>(shared: &Arc<Shared<H>>, error: Error) -> FreeReport {
    shared.gate.close();
    shared.give_up(error);
    let mut report = shared.report();
    migrate::lose(shared, error, &mut report);
    shared.set_step(Step::Drained);
    report.leaks.push(Leak {
        what: Leaked::Handle(shared.id.0 as i64),
        operation: "close VM",
        error,
    });
    core::mem::forget(Arc::clone(shared));
    report
}
