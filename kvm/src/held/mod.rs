//! Confidential VMs that the kernel holds: the port behind `kvm_ops_held::HeldVm`.

mod blobs;
mod files;
mod forms;
mod refused;
mod sev;

use kvm_ops::{
    EncCmd, EncRegion, Error, Gfn, HeldFailure, HeldPort, InitialPage, Measurement, Missing,
    Privacy, Result, SharedMask, Tech, VmParams,
};

use crate::{KvmHost, KvmVm};
pub(crate) use files::Files;
use refused::refused;
pub(crate) use sev::SevGuest;

/// The state of a confidential VM in this process.
pub(crate) struct Held {
    pub(crate) tech: Tech,
    /// The guest_memfds behind slots.
    pub(crate) files: Files,
    guest: SevGuest,
}

impl Held {
    /// The state of a VM of that technology. `None` for a normal VM.
    ///
    /// # Errors
    /// [`Error::Invalid`] for parameters of another technology; [`Error::Unsupported`] for a technology that this
    /// port does not drive.
    pub(crate) fn new(host: &KvmHost, tech: Tech, params: &VmParams) -> Result<Option<Self>> {
        match tech {
            Tech::Sev | Tech::SevEs | Tech::SevSnp => Ok(Some(Self {
                tech,
                files: Files::default(),
                guest: SevGuest::new(host, tech, params)?,
            })),
            _ if tech.is_confidential() => Err(Error::unsupported(Missing::HostTech, tech)),
            _ => Ok(None),
        }
    }

    /// True if private memory comes from guest_memfds, and the kernel keeps an attribute of each frame.
    pub(crate) fn has_private_memory(&self) -> bool {
        matches!(self.tech, Tech::SevSnp | Tech::Tdx)
    }
}

impl HeldPort for KvmVm {
    fn init(&self) -> Result<SharedMask, HeldFailure> {
        self.held_state()?.guest.init(self)
    }

    fn add_page(&self, page: &InitialPage<'_>) -> Result<(), HeldFailure> {
        self.held_state()?.guest.add_page(self, page)
    }

    fn finalize(&self) -> Result<(), HeldFailure> {
        self.held_state()?.guest.finalize(self)
    }

    fn is_final(&self) -> bool {
        self.held_state().is_ok_and(|held| held.guest.is_final())
    }

    fn is_protected(&self) -> bool {
        self.held_state()
            .is_ok_and(|held| held.guest.is_protected())
    }

    fn measurement(&self) -> Result<Option<Measurement>> {
        self.held_state()?.guest.measurement()
    }

    /// A range becomes private or shared in the kernel's books first. Then the guest_memfd loses the pages that became
    /// shared, and the slot's own memory those that became private.
    fn convert(&self, first: Gfn, pages: u64, to: Privacy) -> Result<(), HeldFailure> {
        let held = self.held_state()?;
        match held.has_private_memory() {
            true => Ok(files::convert(self, first, pages, to)?),
            false => Ok(()),
        }
    }

    /// It waits until vCPU 0, or the first that was created, is out of the guest.
    fn pre_fault(&self, first: Gfn, pages: u64) -> Result<u64, HeldFailure> {
        Ok(files::pre_fault(self, first, pages)?)
    }

    fn command(&self, cmd: &mut EncCmd<'_>) -> Result<(), HeldFailure> {
        self.held_state()?.guest.command(self, cmd)
    }

    fn register_region(&self, region: EncRegion) -> Result<(), HeldFailure> {
        sev::region(self, region, sev::Region::Register)
    }

    fn unregister_region(&self, region: EncRegion) -> Result<(), HeldFailure> {
        sev::region(self, region, sev::Region::Unregister)
    }
}
