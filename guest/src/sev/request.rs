//! A request of the GHCB MSR protocol as its host reads it, for hosts and for tests of guests.

use super::msr::{CpuidRegister, Termination};
use crate::Privacy;

const CODE: u64 = 0xFFF;
const GFN: u64 = 0x000F_FFFF_FFFF_F000;

/// A request of the GHCB MSR protocol.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRequest {
    /// The versions of the protocol and the C-bit.
    SevInfo,
    /// A register of a CPUID function.
    Cpuid {
        /// EAX.
        function: u32,
        /// The register that is asked for.
        register: CpuidRegister,
    },
    /// To be held until INIT-SIPI.
    ApResetHold,
    /// Where the host would like the GHCB.
    PreferredGhcb,
    /// The GHCB is here.
    RegisterGhcb {
        /// The page.
        gpa: u64,
    },
    /// A page becomes private or shared.
    PageState {
        /// The page.
        gpa: u64,
        /// What it becomes.
        to: Privacy,
    },
    /// The features of the host.
    Features,
    /// To be ended.
    Terminate(Termination),
}

impl MsrRequest {
    /// The request in the MSR: the reverse of the functions of [`msr`](super::msr). `None` if it is none
    /// of them, or has an operand that they do not make.
    pub const fn from_msr(msr: u64) -> Option<Self> {
        Some(match msr & CODE {
            0x002 => Self::SevInfo,
            0x004 => Self::Cpuid {
                function: (msr >> 32) as u32,
                register: match msr >> 30 & 3 {
                    0 => CpuidRegister::Eax,
                    1 => CpuidRegister::Ebx,
                    2 => CpuidRegister::Ecx,
                    _ => CpuidRegister::Edx,
                },
            },
            0x006 => Self::ApResetHold,
            0x010 => Self::PreferredGhcb,
            0x012 => Self::RegisterGhcb { gpa: msr & !CODE },
            0x014 => Self::PageState {
                gpa: msr & GFN,
                to: match msr >> 52 {
                    1 => Privacy::Private,
                    2 => Privacy::Shared,
                    _ => return None,
                },
            },
            0x080 => Self::Features,
            0x100 => Self::Terminate(Termination {
                set: (msr >> 12 & 0xF) as u8,
                reason: (msr >> 16) as u8,
            }),
            _ => return None,
        })
    }
}
