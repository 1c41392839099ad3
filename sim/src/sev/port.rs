//! The operations of a VM for SEV guests.

use std::sync::Arc;

use kvm_ops::{Asid, Gfn, Level, NestedFaults, Page, Result, SevPort, SharedMask};

use crate::SimVm;

/// The port of a VM, if it is a SEV guest.
pub(crate) fn port(vm: &SimVm) -> Option<&dyn SevPort> {
    vm.inner.is_sev().then_some(vm as &dyn SevPort)
}

impl SimVm {
    /// Lets an SNP guest's request for a report with certificates leave as
    /// [`Exit::SnpCertificates`](kvm_ops::Exit::SnpCertificates). Otherwise it is answered with the machine's table
    /// ([`SimHost::set_snp_certificates`](crate::SimHost::set_snp_certificates)).
    pub fn ask_for_certificates(&self, on: bool) {
        self.inner.sev.ask_for_certificates(on);
    }

    /// Lets a SEV or SEV-ES guest reach its slots without the C-bit also where it has a private page: a frame has two
    /// contents then, the guest's own and those that its devices see. Otherwise it finds that page's ciphertext there.
    /// Call it before the VM has slots.
    ///
    /// It is for embedders that use the slots' memory and tell the VM nothing of it
    /// ([`VmOps::show_to_host`](kvm_ops::VmOps::show_to_host)).
    pub fn show_slots_without_c_bit(&self) {
        self.inner.sev.show_slots();
    }
}

impl SevPort for SimVm {
    fn bind_asid(&self, asid: Option<Asid>, mask: SharedMask) -> Result<()> {
        let inner = &self.inner;
        inner.change_pages(|| inner.sev.bind(asid, mask));
        Ok(())
    }

    fn map_encrypted(&self, gfn: Gfn, level: Level, page: Option<&Page>) -> Result<()> {
        let inner = &self.inner;
        match page {
            // No processor knows a page that is not there yet.
            Some(_) => inner.sev.map(gfn, level, page),
            None => inner.change_pages(|| inner.sev.map(gfn, level, page)),
        }
    }

    fn handle_nested_faults(&self, handler: Option<Arc<dyn NestedFaults>>) -> Result<()> {
        self.inner.sev.handle_faults(handler);
        Ok(())
    }
}
