//! The end of a VM, in the order that the technology demands.
//!
//! | step | SEV, SEV-ES | SNP |
//! |---|---|---|
//! | `mmu_release_hkid` | vCPUs out; ASID out of the VMCBs; DEACTIVATE; DECOMMISSION; WBINVD | vCPUs out; ASID out of the VMCBs |
//! | `drain_private` | pages and VMSAs freed | every page: (SNP_PAGE_RECLAIM,) RMPUPDATE to the host, freed; VMSAs likewise |
//! | `vm_free` | | SNP_DECOMMISSION; context page reclaimed, freed |
//!
//! The ASID becomes a used-up one in each case, after firmware released it.
//!
//! The two differ because the pages of a SEV guest are the host's, and only cache lines with its key
//! prevent their next use; after the key is gone and the caches are written back, none can appear.
//! The pages of an SNP guest are the guest's by the RMP, which names the ASID: if another guest got
//! the ASID first, it would own them. So they are taken back while the ASID is still leased, and a
//! context that firmware keeps costs itself and the ASID, not the guest's memory.

use alloc::sync::Arc;

use kvm_ops::{Drained, Error, FreeReport, Host, KeyReleased, PspPort, Result, Step, VmPort};

use crate::migrate;
use crate::shared::Shared;
use crate::sp::Held;

impl<H: Host> Shared<H> {
    /// Gets every vCPU out of the guest and lets none in.
    pub(crate) fn stop(&self) {
        self.gate.close();
        let cells = self.all_cells();
        // A kick is not lost, so one for each vCPU inside is enough.
        cells.iter().for_each(|cell| cell.kick.kick());
        while self.gate.inside() != 0 {
            self.wait();
        }
    }

    /// Takes the ASID out of the VMCBs.
    pub(crate) fn unbind(&self) -> Result<()> {
        if self.asid().is_ok() {
            self.sev()
                .and_then(|sev| sev.bind_asid(None, self.mask))
                .inspect_err(|error| self.poison(error))?;
            self.set_bound(None);
        }
        Ok(())
    }

    /// First step, after [`leave`](crate::migrate::leave). It may be repeated for a token that was
    /// lost.
    #[allow(unsafe_code)]
    pub(crate) fn release_key(&self) -> KeyReleased {
        let done = matches!(self.life.step(), Step::KeyReleased | Step::Drained);
        if !self.is_snp()
            && !done
            && let Some(context) = self.context().as_mut()
        {
            let sp = self.sp();
            sp.decommission(context);
            sp.psp.wbinvd_all();
        }
        self.took_step("vCPUs out for good, key given up", self.asid().ok());
        // SAFETY: no vCPU runs any more, and the gate lets none in, so no processor can fetch a
        // line with the ASID's key. For SEV and SEV-ES the lines that there are were written back
        // above, after the last exit: that is all that their pages need, even where DEACTIVATE
        // failed and the ASID is leaked. For SNP nothing more is demanded before pages go: RMPUPDATE
        // itself decides, while the ASID is bound. A VM that handed its context to another, or to its
        // mirrors, has no key.
        unsafe { self.life.key_released() }
    }

    /// Second step. It may be repeated for a token that was lost.
    #[allow(unsafe_code)]
    pub(crate) fn drain(&self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        let released = self.life.check_drain(released)?;
        let sp = self.sp();
        let mut memory = self.memory();
        for (gfn, frame) in memory.frames() {
            // Nothing runs on these mappings; a port that keeps one loses it with the VM.
            let _ = self
                .sev()
                .and_then(|sev| sev.map_encrypted(gfn, frame.page.level(), None));
        }
        for frame in memory.clear() {
            // The account lists a page that leaks.
            let _ = sp.release(frame.page, frame.held);
        }
        for records in memory.swap.clear() {
            let _ = sp.release(records, Held::Immutable);
        }
        drop(memory);
        for cell in self.all_cells() {
            if let Some(vmsa) = cell.state().vmsa.take() {
                let _ = sp.release(vmsa.page, vmsa.held);
            }
        }
        self.took_step("private pages given back", None);
        // SAFETY: every frame and every VMSA was just given back or entered as leaked, and both
        // lists are empty. Firmware has no page tables of the guest.
        unsafe { self.life.drained(released) }
    }

    /// Gives everything up that the VM holds, for this reason: nothing is proved, so nothing is
    /// used again.
    pub(crate) fn give_up(&self, error: Error) {
        let sp = self.sp();
        let mut memory = self.memory();
        for frame in memory.clear() {
            sp.leak(frame.page, error);
        }
        for records in memory.swap.clear() {
            sp.leak(records, error);
        }
        drop(memory);
        for cell in self.all_cells() {
            if let Some(vmsa) = cell.state().vmsa.take() {
                sp.leak(vmsa.page, error);
            }
        }
        if let Some(mut context) = self.context().take() {
            sp.give_up(&mut context, error);
        }
    }
}

/// Last step.
pub(crate) fn free<H: Host>(shared: Arc<Shared<H>>, drained: &Drained) -> FreeReport {
    if let Err(error) = shared.life.check_drained(drained) {
        return abandon(&shared, error);
    }
    if let Some(mut context) = shared.context().take() {
        shared.sp().decommission(&mut context);
    }
    if let Ok(sev) = shared.sev() {
        let _ = sev.handle_nested_faults(None);
    }
    let mut report = shared.account.report(&shared.life);
    let port = Arc::clone(&shared.port);
    drop(shared);
    // A vCPU's handle may still hold the port; the last of them closes it then.
    report.close_vm(Arc::into_inner(port).map_or(Ok(()), VmPort::close));
    report
}

/// Instead of the last step: firmware keeps everything, and the port stays open.
pub(crate) fn abandon<H: Host>(shared: &Arc<Shared<H>>, error: Error) -> FreeReport {
    shared.gate.close();
    shared.poison(&error);
    shared.give_up(error);
    let mut report = shared.account.report(&shared.life);
    migrate::lose(shared, error, &mut report);
    report.close_vm(Err(error));
    core::mem::forget(Arc::clone(shared));
    report
}
