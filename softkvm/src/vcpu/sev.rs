//! vCPUs of SEV guests: registers that are the guest's secret, and exits that only such guests have.

use kvm_ops::{AmdVcpu, AnyVcpu, Error, MpState, Privacy, Step, VcpuOps};
use kvm_ops_uapi::run::{FailEntry, SnpReqCerts, exit_reason};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::vm::HC_MAP_GPA_RANGE;
use kvm_ops_uapi::{Errno, U64};

use super::answer::Waits;
use super::exits::{self, Next};
use super::page::Page;
use crate::file::VcpuFile;
use crate::machine::Processor;
use crate::refusal::Result;
use crate::system::lists::MSRS;

/// EXITCODE of a VMRUN that refuses the guest's state (VMEXIT_INVALID).
const INVALID: u64 = u64::MAX;

/// MSRs that the processor keeps in the save area (Linux `sev_es_prevent_msr_access`).
const IN_SAVE_AREA: [u32; 13] = [
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
];

/// True if the vCPU's registers are its guest's secret.
pub(super) fn is_protected(vcpu: &Processor) -> bool {
    matches!(vcpu, AnyVcpu::Amd(AmdVcpu::Sev(vcpu)) if vcpu.is_protected())
}

fn is_sev(vcpu: &Processor) -> bool {
    matches!(vcpu, AnyVcpu::Amd(AmdVcpu::Sev(_)))
}

/// What the kernel has of registers that are a secret: nothing to read, and no effect of a write. Types whose
/// state is protected by name are refused before.
pub(super) fn or_nothing<T: Default>(answer: kvm_ops::Result<T>) -> kvm_ops::Result<T> {
    match answer {
        Err(Error::Protected(_)) => Ok(T::default()),
        answer => answer,
    }
}

/// The activity of a vCPU, which is no secret.
pub(super) fn mp_state(vcpu: &Processor) -> kvm_ops::Result<MpState> {
    match vcpu {
        AnyVcpu::Amd(AmdVcpu::Sev(vcpu)) => vcpu.port().mp_state(),
        vcpu => vcpu.mp_state(),
    }
}

/// An MSR that KVM keeps beside the save area, with its value after power-on. `None` for the others.
pub(super) fn secret_msr(index: u32) -> Option<u64> {
    let known = MSRS.iter().find(|(known, _)| *known == index);
    let kept = known.filter(|_| !IN_SAVE_AREA.contains(&index));
    kept.map(|(_, value)| *value)
}

/// A run that the back end refuses before it entered the guest: a launch that has not ended gives no state
/// that a processor could load.
pub(super) fn refused(vcpu: &Processor, page: Page<'_>, error: Error) -> Result<Next> {
    match error {
        Error::WrongState(Step::Created | Step::Initialized) if is_sev(vcpu) => {
            let fail = FailEntry {
                reason: U64::new(INVALID),
                ..FailEntry::default()
            };
            page.set_exit(exit_reason::FAIL_ENTRY, &fail);
            Ok(Next::Return(Waits::Nothing))
        }
        // A GHCB that is not registered, or no memory (Linux `sev_handle_vmgexit`).
        Error::Invalid(..) | Error::NotFound(..) if is_protected(vcpu) => Err(Errno::EINVAL.into()),
        // The context moves to another VM.
        Error::Busy if is_sev(vcpu) => {
            std::thread::yield_now();
            Ok(Next::Again)
        }
        // The VM was closed or moved away meanwhile.
        Error::WrongState(_) => Err(Errno::EIO.into()),
        error => Err(error.into()),
    }
}

/// KVM_HC_MAP_GPA_RANGE by VMMCALL, or a page state change of an SNP guest.
pub(super) fn map_gpa_range(
    file: &VcpuFile,
    page: Page<'_>,
    vcpu: &mut Processor,
    (gpa, pages, to): (u64, u64, Privacy),
) -> Result<Next> {
    if file.vm.kind() == vm_type::SNP {
        return exits::ask_to_map(file, page, vcpu, (gpa, pages, to));
    }
    // The registers of a SEV-ES guest's hypercall are in its GHCB.
    let attributes = vcpu
        .regs()
        .map_or(exits::attributes_of(to), |regs| regs.rdx);
    let args = [gpa, pages, attributes, 0, 0, 0];
    exits::hypercall(file, page, vcpu, HC_MAP_GPA_RANGE, args)
}

/// A report shall come with certificates, for which the guest has so many pages.
pub(super) fn certificates(page: Page<'_>, gpa: u64, pages: u64) -> Next {
    let call = SnpReqCerts {
        gpa: U64::new(gpa),
        npages: U64::new(pages),
        ..SnpReqCerts::default()
    };
    page.set_exit(exit_reason::SNP_REQ_CERTS, &call);
    Next::Return(Waits::Certificates)
}
