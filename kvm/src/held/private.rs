//! Normal VMs with private memory (`KVM_X86_SW_PROTECTED_VM`): guest_memfds and attributes as for SNP guests, and no launch.

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ops::{EncCmd, HeldFailure, InitialPage, Measurement, Privacy, Result, SharedMask};

use super::{Technology, enable_map_gpa, not_passed_on};
use crate::KvmVm;

/// A guest that firmware does not know.
#[derive(Default)]
pub(super) struct PrivateGuest {
    finalized: AtomicBool,
}

impl Technology for PrivateGuest {
    /// No bit of an address tells private from shared memory: the attribute of the frame decides.
    fn init(&self, vm: &KvmVm) -> Result<SharedMask, HeldFailure> {
        enable_map_gpa(vm)?;
        Ok(SharedMask::NONE)
    }

    fn begins(&self) -> Privacy {
        Privacy::Shared
    }

    /// A guest begins in shared memory, which the embedder writes itself.
    fn add_page(&self, _vm: &KvmVm, _page: &InitialPage<'_>) -> Result<(), HeldFailure> {
        let refused: Result<()> = kvm_ops::not_offered!("add_initial_page of a normal VM");
        Ok(refused?)
    }

    fn finalize(&self, _vm: &KvmVm) -> Result<(), HeldFailure> {
        self.finalized.store(true, Ordering::Release);
        Ok(())
    }

    fn is_final(&self) -> bool {
        self.finalized.load(Ordering::Acquire)
    }

    fn is_protected(&self) -> bool {
        false
    }

    fn measurement(&self) -> Result<Option<Measurement>> {
        kvm_ops::not_offered!("measurement of a normal VM")
    }

    fn command(&self, _vm: &KvmVm, cmd: &mut EncCmd<'_>) -> Result<(), HeldFailure> {
        cmd.firmware_status = 0;
        Err(not_passed_on().into())
    }
}
