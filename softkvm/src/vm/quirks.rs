//! Quirks of KVM that user space may take away from a VM (`KVM_CAP_DISABLE_QUIRKS2`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ops_uapi::checks::disable_quirks::KNOWN;
use kvm_ops_uapi::vm::quirk::{FIX_HYPERCALL_INSN, SLOT_ZAP_ALL};

use crate::refusal::{Result, ensure};

/// Those that can be taken away. Nobody sees by what steps a slot's memory leaves the second-level table, so without
/// SLOT_ZAP_ALL all is as with it.
pub(crate) const KNOWN_QUIRKS: u64 = FIX_HYPERCALL_INSN | SLOT_ZAP_ALL;

/// The quirks that a VM has.
pub(crate) struct Quirks {
    /// Shared with the vCPUs.
    hypercall_fix: Arc<AtomicBool>,
}

impl Default for Quirks {
    fn default() -> Self {
        Self {
            hypercall_fix: Arc::new(AtomicBool::new(true)),
        }
    }
}

impl Quirks {
    pub(crate) fn hypercall_fix(&self) -> &Arc<AtomicBool> {
        &self.hypercall_fix
    }

    /// `KVM_CAP_DISABLE_QUIRKS2`.
    pub(super) fn disable_known(&self, quirks: u64) -> Result<i64> {
        ensure(quirks & !KNOWN_QUIRKS == 0, KNOWN)?;
        self.disable(quirks)
    }

    /// `KVM_CAP_DISABLE_QUIRKS`, which passes over what it does not know. A quirk never comes back.
    pub(super) fn disable(&self, quirks: u64) -> Result<i64> {
        if quirks & FIX_HYPERCALL_INSN != 0 {
            self.hypercall_fix.store(false, Ordering::Relaxed);
        }
        Ok(0)
    }
}
