//! Proofs that a step of the teardown was taken.
//!
//! `mmu_release_hkid -> KeyReleased`, `drain(KeyReleased) -> Drained`, `vm_free(Drained)`. A token
//! can be neither copied nor made up, and each step eats the one before it, so a wrong order does
//! not compile:
//!
//! ```compile_fail,E0451
//! // Field private: a token comes only from the step that it proves.
//! let forged = kvm_ops_core::KeyReleased { vm: kvm_ops_core::VmId(1) };
//! ```
//!
//! ```compile_fail,E0382
//! # fn drain(_: kvm_ops_core::KeyReleased) {}
//! fn twice(token: kvm_ops_core::KeyReleased) {
//!     drain(token);
//!     drain(token); // used after it was eaten
//! }
//! ```

use crate::VmId;

/// The VM's memory key is gone: no processor holds the KeyID or ASID in its caches or key table,
/// or the VM never had one.
#[must_use = "the teardown goes on with it"]
#[derive(Debug, PartialEq, Eq)]
pub struct KeyReleased {
    vm: VmId,
}

impl KeyReleased {
    /// Mints the proof; for back ends.
    ///
    /// # Safety
    /// The VM's key must be released as far as its technology demands it: for TDX,
    /// TDH.MNG.KEY.FREEID succeeded; for SEV, DEACTIVATE and DECOMMISSION did; a VM without a key
    /// fulfils it at once. Pages reclaimed on a false proof can be read through stale cache lines
    /// or machine-check the host.
    #[inline]
    pub const unsafe fn assert_released(vm: VmId) -> Self {
        Self { vm }
    }

    /// For a VM that never had a key.
    pub(crate) const fn without_key(vm: VmId) -> Self {
        Self { vm }
    }

    /// For a VM that never had a private page.
    pub(crate) const fn without_private_pages(self) -> Drained {
        Drained { vm: self.vm }
    }

    /// The VM it speaks of.
    #[inline]
    pub const fn vm(&self) -> VmId {
        self.vm
    }

    /// The next proof, for back ends: the VM has no private pages that were not given back: what the mirror listed is reclaimed
    /// or counted as leaked.
    ///
    /// # Safety
    /// True for the VM of this token: every page that the VM's second-level tables mapped as
    /// private, and every page of those tables, is reclaimed or leaked for good. Such a page must
    /// not be freed later.
    #[inline]
    pub const unsafe fn assert_drained(self) -> Drained {
        Drained { vm: self.vm }
    }
}

/// No private page of the VM is left: each was reclaimed or is accounted as leaked.
#[must_use = "the teardown goes on with it"]
#[derive(Debug, PartialEq, Eq)]
pub struct Drained {
    vm: VmId,
}

impl Drained {
    /// The VM it speaks of.
    #[inline]
    pub const fn vm(&self) -> VmId {
        self.vm
    }
}
