//! VMs with private memory, which the kernel holds: the port behind `kvm_ops_held::HeldVm`.

mod blobs;
mod capabilities;
mod files;
mod forms;
pub(crate) mod moves;
mod private;
mod refused;
mod sev;
mod tdx;

use kvm_bindings::KVM_CAP_EXIT_HYPERCALL;
use kvm_ops::{
    EncCmd, EncParams, EncRegion, Error, Gfn, HeldFailure, HeldPort, InitialPage, Measurement,
    Missing, OpName, Privacy, Result, SharedMask, Tech, VmParams,
};
use kvm_ops_uapi::vm::HC_MAP_GPA_RANGE;

use crate::vm::enable;
use crate::{KvmHost, KvmVcpu, KvmVm};
pub(crate) use files::Files;
use private::PrivateGuest;
use sev::SevGuest;
pub(crate) use sev::is_late;
use tdx::TdGuest;

/// The launch of a VM of one technology, and its commands. The methods are those of [`HeldPort`], on a VM.
trait Technology: Send + Sync {
    fn init(&self, vm: &KvmVm) -> Result<SharedMask, HeldFailure>;
    fn vcpu_created(&self, vcpu: &KvmVcpu) -> Result<()> {
        let _ = vcpu;
        Ok(())
    }
    fn add_page(&self, vm: &KvmVm, page: &InitialPage<'_>) -> Result<(), HeldFailure>;
    fn finalize(&self, vm: &KvmVm) -> Result<(), HeldFailure>;
    fn begins(&self) -> Privacy {
        Privacy::Private
    }
    fn awaits_guest(&self) -> bool {
        false
    }
    fn can_move(&self) -> bool {
        false
    }
    fn is_final(&self) -> bool;
    fn is_protected(&self) -> bool;
    fn measurement(&self) -> Result<Option<Measurement>>;
    fn command(&self, vm: &KvmVm, cmd: &mut EncCmd<'_>) -> Result<(), HeldFailure>;
    /// The guest, if it is one of SEV, SEV-ES or SNP.
    fn as_sev(&self) -> Option<&SevGuest> {
        None
    }
}

/// The state of a confidential VM in this process.
pub(crate) struct Held {
    pub(crate) tech: Tech,
    /// The guest_memfds behind slots.
    pub(crate) files: Files,
    guest: Box<dyn Technology>,
}

impl Held {
    /// The state of a VM of that technology. `None` for a normal VM without private memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] for parameters of another technology; [`Error::Unsupported`] for a technology that this
    /// port does not drive.
    pub(crate) fn new(host: &KvmHost, tech: Tech, params: &VmParams) -> Result<Option<Self>> {
        let guest: Box<dyn Technology> = match tech {
            Tech::Sev | Tech::SevEs | Tech::SevSnp => Box::new(SevGuest::new(host, tech, params)?),
            Tech::Tdx => Box::new(TdGuest::new(params)?),
            Tech::Vmx | Tech::Svm if params.enc == EncParams::Private => {
                Box::<PrivateGuest>::default()
            }
            _ if tech.is_confidential() => {
                return Err(Error::unsupported(Missing::HostTech, tech));
            }
            _ => return Ok(None),
        };
        Ok(Some(Self {
            tech,
            files: Files::default(),
            guest,
        }))
    }

    /// Takes the step that the technology has for a new vCPU.
    pub(crate) fn vcpu_created(&self, vcpu: &KvmVcpu) -> Result<()> {
        self.guest.vcpu_created(vcpu)
    }

    /// True if the memory of slots is pinned, because firmware encrypts it in place.
    pub(crate) fn pins(&self) -> bool {
        self.guest.as_sev().is_some_and(SevGuest::pins)
    }

    /// What the memory of a new slot is.
    pub(crate) fn begins(&self) -> Privacy {
        self.guest.begins()
    }

    /// True if private memory comes from guest_memfds, and the kernel keeps an attribute of each frame.
    pub(crate) fn has_private_memory(&self) -> bool {
        !matches!(self.tech, Tech::Sev | Tech::SevEs)
    }
}

/// Makes requests to convert memory leave as exits, if the kernel has that (5.14). Without, they are refused.
fn enable_map_gpa(vm: &KvmVm) -> Result<()> {
    let exit = 1 << HC_MAP_GPA_RANGE;
    if vm.host().check(KVM_CAP_EXIT_HYPERCALL) & exit != 0 {
        enable(vm.fd(), KVM_CAP_EXIT_HYPERCALL, exit.into())?;
    }
    Ok(())
}

#[cold]
fn not_passed_on() -> Error {
    static NAME: OpName = OpName("this KVM_MEMORY_ENCRYPT_OP command");
    Error::NotOffered(&NAME)
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

    fn begins(&self) -> Privacy {
        self.held_state()
            .map_or(Privacy::Private, |held| held.guest.begins())
    }

    fn awaits_guest(&self) -> bool {
        self.held_state()
            .is_ok_and(|held| held.guest.awaits_guest())
    }

    fn can_move(&self) -> bool {
        self.held_state().is_ok_and(|held| held.guest.can_move())
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
