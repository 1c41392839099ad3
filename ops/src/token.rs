//! Proofs that a step of the teardown was taken.
//!
//! `mmu_release_hkid -> KeyReleased`, `drain_private(KeyReleased) -> Drained`, `vm_free(Drained)`. A
//! token can be neither copied nor made up, and each step consumes the token before it, so a wrong
//! order does not compile:
//!
//! ```compile_fail,E0451
//! // The fields are private: a token comes only from the step that it proves.
//! let forged = kvm_ops_core::KeyReleased { vm: kvm_ops_core::VmId(1), serial: 1 };
//! ```
//!
//! ```compile_fail,E0382
//! # fn drain(_: kvm_ops_core::KeyReleased) {}
//! fn twice(token: kvm_ops_core::KeyReleased) {
//!     drain(token);
//!     drain(token); // used after it moved
//! }
//! ```
//!
//! [`Life`](crate::Life) makes the tokens, and checks that a token is of its own VM.

use crate::VmId;

/// The VM's memory key is gone: no processor holds the KeyID or ASID in its caches or key table, or
/// the VM never had one.
#[must_use = "the teardown goes on with it"]
#[derive(Debug, PartialEq, Eq)]
pub struct KeyReleased {
    vm: VmId,
    serial: u64,
}

impl KeyReleased {
    pub(crate) const fn of(vm: VmId, serial: u64) -> Self {
        Self { vm, serial }
    }

    /// The VM of this token.
    #[inline]
    pub const fn vm(&self) -> VmId {
        self.vm
    }

    pub(crate) const fn serial(&self) -> u64 {
        self.serial
    }
}

/// No private page of the VM is left: each was reclaimed, or is accounted for as leaked.
#[must_use = "the teardown goes on with it"]
#[derive(Debug, PartialEq, Eq)]
pub struct Drained {
    vm: VmId,
    serial: u64,
}

impl Drained {
    pub(crate) const fn of(released: KeyReleased) -> Self {
        let KeyReleased { vm, serial } = released;
        Self { vm, serial }
    }

    /// The VM of this token.
    #[inline]
    pub const fn vm(&self) -> VmId {
        self.vm
    }

    pub(crate) const fn serial(&self) -> u64 {
        self.serial
    }
}
