//! `KVM_MEMORY_ENCRYPT_OP`: the kernel's commands, structures and errnos.
//!
//! [`EncCmd::data`](kvm_ops::EncCmd) holds the kernel's structure. Where that has the address of a
//! blob in the caller's memory (session, measurement, secret packet, page contents), it has here
//! the blob's offset from the start of `data`: blobs follow the structure. Where it has the address
//! of guest memory, it is the host address that a slot lends.
//!
//! | not here | why |
//! |---|---|
//! | INIT, ES_INIT | for VMs of the default type, whose technology is not chosen at creation |
//! | SEND_UPDATE_VMSA, RECEIVE_UPDATE_VMSA | not the kernel's either: see [`crate::migrate`] |
//! | SNP_ENABLE_REQ_CERTS | guest requests are not carried to user space |

mod blob;
mod debug;
mod legacy;
mod migrate;
mod snp;

use kvm_ops::{EncCmd, Error, Field, Host, Result};

use crate::rules::{self, EBUSY, Holding, View, errno};
use crate::status::status_of;
use crate::{SevVm, launch};
use blob::read;

/// The kernel's structures.
pub use kvm_ops_uapi::sev as layout;

impl<H: Host> SevVm<H> {
    /// The input of [`rules::allowed`].
    pub(crate) fn view(&self) -> View {
        let active = self.shared.context().is_some();
        let holding = self.shared.membership().holding();
        View {
            tech: self.shared.tech(),
            active: active || (holding == Holding::Staged && self.debuggee().is_ok()),
            holding,
        }
    }
}

/// Runs one command, and writes the firmware's status in any case.
pub(crate) fn run<H: Host>(vm: &mut SevVm<H>, cmd: &mut EncCmd<'_>) -> Result<()> {
    cmd.firmware_status = 0;
    let done = dispatch(vm, cmd.id, cmd.data, &mut cmd.firmware_status);
    if let Err(error) = &done {
        let status = status_of(error);
        if status != 0 {
            cmd.firmware_status = status;
        }
    }
    done
}

fn dispatch<H: Host>(vm: &mut SevVm<H>, id: u32, data: &mut [u8], status: &mut u64) -> Result<()> {
    let view = vm.view();
    let debugged = view.holding == Holding::Staged;
    if vm.shared.step() == kvm_ops::Step::Poisoned && !debugged {
        return Err(Error::Poisoned);
    }
    rules::allowed(id, &view)?;
    match id {
        2 => legacy::launch_start(vm, data),
        3 => legacy::update_data(vm, data),
        4 => legacy::update_vmsa(vm),
        5 => legacy::secret(vm, data),
        6 => legacy::measure(vm, data),
        7 => legacy::finish(vm),
        8 => migrate::send_start(vm, data),
        9 => migrate::send_update_data(vm, data),
        11 => migrate::send_finish(vm),
        12 => migrate::receive_start(vm, data),
        13 => migrate::receive_update_data(vm, data),
        15 => migrate::receive_finish(vm),
        16 => legacy::guest_status(vm, data),
        17 => debug::decrypt(vm, data),
        18 => debug::encrypt(vm, data),
        20 => legacy::attestation(vm, data),
        21 => migrate::send_cancel(vm),
        22 => init2(vm, data, status),
        100 => snp::launch_start(vm, data),
        101 => snp::launch_update(vm, data),
        102 => snp::launch_finish(vm, data),
        _ => kvm_ops::not_offered!("this KVM_MEMORY_ENCRYPT_OP command"),
    }
}

/// `KVM_SEV_INIT2`.
fn init2<H: Host>(vm: &mut SevVm<H>, data: &mut [u8], status: &mut u64) -> Result<()> {
    let init: layout::SevInit = read(data)?;
    let (tech, ghcb) = (vm.shared.tech(), init.ghcb_version.get());
    if init.flags.get() != 0 {
        return Err(Error::Invalid(Field::Flags, init.flags.get().into()));
    }
    rules::check_features(tech, init.vmsa_features.get())?;
    if tech == kvm_ops::Tech::Sev && ghcb != 0 {
        return Err(Error::Invalid(Field::Flags, ghcb.into()));
    }
    rules::check_ghcb(tech, ghcb)?;
    vm.shared.init(init.vmsa_features.get()).map_err(|error| {
        // The kernel says "busy" for no ASID, and for a flush that failed.
        *status = status_of(&error);
        match error {
            Error::NoKeyId => errno(EBUSY),
            error if launch::is_refusal(&error) => errno(EBUSY),
            error => error,
        }
    })
}
