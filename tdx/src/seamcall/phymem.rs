//! TDH.PHYMEM.*: pages and caches of the machine.

use kvm_ops::{CpuId, Hpa, SeamPort};

use super::{Calls, Leaf, Outcome, regs};

impl<S: SeamPort> Calls<'_, S> {
    /// Takes a page back from a TD that has no key any more.
    pub(crate) fn phymem_page_reclaim(&self, page: Hpa) -> Outcome {
        self.here(Leaf::PhymemPageReclaim, regs(page.get(), 0))
            .map(drop)
    }

    /// Writes the caches of `cpu`'s package back, for every KeyID that waits for it.
    pub(crate) fn phymem_cache_wb(&self, cpu: CpuId) -> Outcome {
        self.on(cpu, Leaf::PhymemCacheWb, regs(0, 0)).map(drop)
    }

    /// Writes the cache lines of a page back that it has under a KeyID; `page` carries the KeyID.
    pub(crate) fn phymem_page_wbinvd(&self, page: Hpa) -> Outcome {
        self.here(Leaf::PhymemPageWbinvd, regs(page.get(), 0))
            .map(drop)
    }
}
