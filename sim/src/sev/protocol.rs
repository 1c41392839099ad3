//! The GHCB's MSR protocol, as a host answers it (AMD 56421; Linux `sev_handle_vmgexit_msr_protocol`).

use kvm_ops::{Gpa, Privacy, Tech};

use crate::vm::VmInner;

/// Codes in the low 12 bits of the GHCB MSR.
mod code {
    pub(super) const SEV_INFO: u64 = 0x001;
    pub(super) const SEV_INFO_REQ: u64 = 0x002;
    pub(super) const CPUID_REQ: u64 = 0x004;
    pub(super) const HOLD_REQ: u64 = 0x006;
    pub(super) const PREFERRED_REQ: u64 = 0x010;
    pub(super) const PREFERRED: u64 = 0x011;
    pub(super) const REGISTER_REQ: u64 = 0x012;
    pub(super) const REGISTER: u64 = 0x013;
    pub(super) const PSC_REQ: u64 = 0x014;
    pub(super) const PSC: u64 = 0x015;
    pub(super) const FEATURES_REQ: u64 = 0x080;
    pub(super) const FEATURES: u64 = 0x081;
    pub(super) const TERMINATE: u64 = 0x100;
}

/// The code of an answer to a CPUID request.
pub(super) const CPUID: u64 = 0x005;
/// The code of an answer to a request to be held, with a start-up interrupt that came.
pub(super) const HELD: u64 = 0x007 | 1 << 12;
/// The GHCB protocol versions that the host speaks.
const HIGHEST_VERSION: u64 = 2;
const VERSIONS: u64 = HIGHEST_VERSION << 48 | 1 << 32;
/// Hypervisor features of an SNP guest: SNP, AP creation.
const SNP_FEATURES: u64 = 0b11;
/// "None" as a preferred GHCB frame.
const NO_FRAME: u64 = (1 << 52) - 1;
/// The error bit of a page state change.
const PSC_ERROR: u64 = 1 << 63;
/// Page state change: to private, to shared.
pub(super) const TO_PRIVATE: u64 = 1;
pub(super) const TO_SHARED: u64 = 2;

/// `KVM_SYSTEM_EVENT_SEV_TERM`.
pub(super) const SEV_TERM: u32 = 6;

/// What a host does with a request.
pub(super) enum Reply {
    /// Answers it. A code that is not known stays as it is.
    Value(u64),
    /// Notes where the GHCB is, and answers.
    Register { gpa: u64, value: u64 },
    /// Tells a register of a CPUID function.
    Cpuid { function: u32, register: u8 },
    /// Lets the vCPU wait for a start-up interrupt.
    Hold,
    /// Converts a page, and answers with [`converted`].
    Convert { gpa: Gpa, to: Privacy },
    /// Ends the guest, which asked for it or made a request that is not for its technology.
    Terminate,
}

/// The hypervisor's features.
pub(super) fn features(vm: &VmInner) -> u64 {
    match vm.tech {
        Tech::SevSnp => SNP_FEATURES,
        _ => 0,
    }
}

pub(super) fn reply(vm: &VmInner, msr: u64) -> Reply {
    let snp = vm.tech == Tech::SevSnp;
    let gfn = msr >> 12 & NO_FRAME;
    Reply::Value(match msr & 0xfff {
        code::SEV_INFO_REQ => {
            let c_bit = u64::from(vm.sev.mask().bits().trailing_zeros());
            VERSIONS | c_bit << 24 | code::SEV_INFO
        }
        code::CPUID_REQ => {
            return Reply::Cpuid {
                function: (msr >> 32) as u32,
                register: (msr >> 30 & 3) as u8,
            };
        }
        code::HOLD_REQ => return Reply::Hold,
        code::TERMINATE => return Reply::Terminate,
        code::PREFERRED_REQ | code::REGISTER_REQ | code::PSC_REQ if !snp => {
            return Reply::Terminate;
        }
        code::PREFERRED_REQ => NO_FRAME << 12 | code::PREFERRED,
        code::REGISTER_REQ => {
            return Reply::Register {
                gpa: gfn << 12,
                value: gfn << 12 | code::REGISTER,
            };
        }
        code::PSC_REQ => {
            let gpa = Gpa::new((gfn & ((1 << 40) - 1)) << 12);
            let to = match msr >> 52 & 0xf {
                TO_PRIVATE => Privacy::Private,
                TO_SHARED => Privacy::Shared,
                _ => return Reply::Value(code::PSC | PSC_ERROR),
            };
            return Reply::Convert { gpa, to };
        }
        code::FEATURES_REQ => features(vm) << 12 | code::FEATURES,
        _ => msr,
    })
}

/// The answer to a page state change, to which the embedder said `errno`.
pub(super) fn converted(errno: u64) -> u64 {
    let error = if errno == 0 { 0 } else { PSC_ERROR };
    code::PSC | error
}
