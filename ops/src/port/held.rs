//! Confidential VMs that the system below holds itself: it has the keys, the private pages and firmware, and takes
//! commands.

use crate::{
    EncCmd, EncRegion, Error, FirmwareCall, Gfn, InitialPage, Measurement, Privacy, Result,
    SharedMask,
};

/// The operations of a confidential VM that the system below holds, as Linux does: the launch, conversions, and the
/// technology's own commands.
///
/// The caller keeps the order of a VM's life: [`init`](Self::init), pages, [`finalize`](Self::finalize). It checks
/// frames against its slots. A step that was taken by a [`command`](Self::command) is not taken again.
pub trait HeldPort: Send + Sync {
    /// Sets the VM's parameters (`KVM_SEV_INIT2`, `KVM_TDX_INIT_VM`), before the first vCPU. Returns the bit that tells
    /// private from shared addresses.
    ///
    /// # Errors
    /// The answer of the system; [`Error::NoKeyId`] where no key is free.
    fn init(&self) -> Result<SharedMask, HeldFailure>;

    /// Adds a page to the measured start (`KVM_SEV_LAUNCH_UPDATE_DATA`, `KVM_SEV_SNP_LAUNCH_UPDATE`,
    /// `KVM_TDX_INIT_MEM_REGION`). A slot covers it.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for a kind of page that the technology does not know; the answer of the system.
    fn add_page(&self, page: &InitialPage<'_>) -> Result<(), HeldFailure>;

    /// Ends the launch, as far as commands did not.
    ///
    /// # Errors
    /// The answer of the system.
    fn finalize(&self) -> Result<(), HeldFailure>;

    /// What the memory of a new slot is.
    fn begins(&self) -> Privacy {
        Privacy::Private
    }

    /// True while the VM has no guest, because one shall arrive from another VM ([`VmPort::take_guest`],
    /// [`VmPort::share_guest`]).
    ///
    /// [`VmPort::take_guest`]: super::VmPort::take_guest
    /// [`VmPort::share_guest`]: super::VmPort::share_guest
    fn awaits_guest(&self) -> bool {
        false
    }

    /// True if the system can move the guest to another VM.
    fn can_move(&self) -> bool {
        false
    }

    /// True once the launch has ended.
    fn is_final(&self) -> bool;

    /// True once the registers of the vCPUs are the guest's secret.
    fn is_protected(&self) -> bool;

    /// The launch measurement, if the system tells it and it was taken.
    ///
    /// # Errors
    /// [`Error::NotOffered`] where only the guest can ask for it.
    fn measurement(&self) -> Result<Option<Measurement>>;

    /// Makes frames private or shared (`KVM_SET_MEMORY_ATTRIBUTES`), and gives up the memory of the other kind behind
    /// them. A slot covers each.
    ///
    /// # Errors
    /// The answer of the system; nothing changed then.
    fn convert(&self, first: Gfn, pages: u64, to: Privacy) -> Result<(), HeldFailure>;

    /// Maps memory before the guest touches it (`KVM_PRE_FAULT_MEMORY`). Returns the number of pages mapped.
    ///
    /// # Errors
    /// The answer of the system, if no page was mapped.
    fn pre_fault(&self, first: Gfn, pages: u64) -> Result<u64, HeldFailure>;

    /// Runs a command of the technology (`KVM_MEMORY_ENCRYPT_OP`). `firmware_status` is written in any case.
    ///
    /// # Errors
    /// The answer of the system.
    fn command(&self, cmd: &mut EncCmd<'_>) -> Result<(), HeldFailure>;

    /// Declares memory that will hold encrypted data (`KVM_MEMORY_ENCRYPT_REG_REGION`).
    ///
    /// # Errors
    /// The answer of the system.
    fn register_region(&self, region: EncRegion) -> Result<(), HeldFailure>;

    /// Takes a declaration back (`KVM_MEMORY_ENCRYPT_UNREG_REGION`).
    ///
    /// # Errors
    /// The answer of the system.
    fn unregister_region(&self, region: EncRegion) -> Result<(), HeldFailure>;
}

/// A failure of a system that holds VMs, with what it tells of firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldFailure {
    /// The error.
    pub error: Error,
    /// The command and firmware's status, if firmware refused.
    pub call: Option<FirmwareCall>,
    /// The cause in words; empty where the others say it all.
    pub cause: &'static str,
}

impl From<Error> for HeldFailure {
    fn from(error: Error) -> Self {
        Self {
            error,
            call: None,
            cause: "",
        }
    }
}
