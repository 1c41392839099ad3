//! The GHCB MSR protocol: requests and responses as numbers (GHCB specification, "GHCB MSR
//! Protocol"). Bits 11 to 0 of the MSR say what the rest means.

use crate::Privacy;
use core::fmt;

/// A response that is none to the request, or says no.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseError {
    /// Bits 11 to 0 are not of the expected response, or reserved bits are set.
    NotAResponse(u64),
    /// The host refused, with this error.
    Refused(u32),
    /// The host confirmed something else than what was asked.
    Mismatch(u64),
}

impl fmt::Display for ResponseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAResponse(msr) => write!(f, "no response to the request: {msr:#018x}"),
            Self::Refused(error) => write!(f, "refused by the host with {error:#x}"),
            Self::Mismatch(msr) => write!(f, "the host confirmed something else: {msr:#018x}"),
        }
    }
}

impl core::error::Error for ResponseError {}

const CODE: u64 = 0xFFF;

/// Bits 63 to 12 of a response with this code.
const fn data(response: u64, code: u64) -> Result<u64, ResponseError> {
    if response & CODE != code {
        return Err(ResponseError::NotAResponse(response));
    }
    Ok(response >> 12)
}

/// Asks which versions of the protocol the host speaks.
pub const SEV_INFO_REQUEST: u64 = 0x002;

/// The host's answer to the SEV information request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SevInfo {
    /// The lowest version it speaks.
    pub min: u16,
    /// The highest.
    pub max: u16,
    /// The position of the C-bit as the host claims it. **Check it**: a guest that took a wrong bit for the C-bit
    /// would put its secrets in the clear. CPUID of an SNP guest has it from a page that firmware
    /// measured.
    pub c_bit: u8,
}

/// Reads the response to [`SEV_INFO_REQUEST`]. A host puts it into the MSR also before it is asked.
///
/// # Errors
/// See [`ResponseError`].
pub const fn sev_info(response: u64) -> Result<SevInfo, ResponseError> {
    if let Err(error) = data(response, 0x001) {
        return Err(error);
    }
    Ok(SevInfo {
        max: (response >> 48) as u16,
        min: (response >> 32) as u16,
        c_bit: (response >> 24) as u8,
    })
}

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// EAX.
    Eax = 0,
    /// EBX.
    Ebx = 1,
    /// ECX.
    Ecx = 2,
    /// EDX.
    Edx = 3,
}

/// Asks for a register of a CPUID function (subleaf 0).
pub const fn cpuid_request(function: u32, register: CpuidRegister) -> u64 {
    (function as u64) << 32 | (register as u64) << 30 | 0x004
}

/// Reads the response to [`cpuid_request`].
///
/// # Errors
/// See [`ResponseError`]. A response for another register is [`ResponseError::Mismatch`].
pub const fn cpuid(response: u64, register: CpuidRegister) -> Result<u32, ResponseError> {
    if let Err(error) = data(response, 0x005) {
        return Err(error);
    }
    if response >> 30 & 3 != register as u64 {
        return Err(ResponseError::Mismatch(response));
    }
    Ok((response >> 32) as u32)
}

/// Asks to be held until INIT-SIPI.
pub const AP_RESET_HOLD_REQUEST: u64 = 0x006;

/// Reads the response to [`AP_RESET_HOLD_REQUEST`]: whether a SIPI came.
///
/// # Errors
/// See [`ResponseError`].
pub const fn ap_reset_hold(response: u64) -> Result<bool, ResponseError> {
    match data(response, 0x007) {
        Ok(data) => Ok(data != 0),
        Err(error) => Err(error),
    }
}

/// Asks where the host would like the GHCB. SNP only.
pub const PREFERRED_GHCB_REQUEST: u64 = 0x010;

/// Reads the response to [`PREFERRED_GHCB_REQUEST`]: an address, or `None` for any.
///
/// # Errors
/// See [`ResponseError`].
pub const fn preferred_ghcb(response: u64) -> Result<Option<u64>, ResponseError> {
    const NONE: u64 = (1 << 52) - 1;
    match data(response, 0x011) {
        Ok(NONE) => Ok(None),
        Ok(gfn) => Ok(Some(gfn << 12)),
        Err(error) => Err(error),
    }
}

/// Tells the host where the GHCB is. SNP only, and needed there. `gpa` is a page.
pub const fn register_ghcb_request(gpa: u64) -> u64 {
    gpa & !CODE | 0x012
}

/// Reads the response to [`register_ghcb_request`].
///
/// # Errors
/// See [`ResponseError`]. Another address than `gpa` is [`ResponseError::Mismatch`].
pub const fn register_ghcb(response: u64, gpa: u64) -> Result<(), ResponseError> {
    match data(response, 0x013) {
        Ok(gfn) if gfn == gpa >> 12 => Ok(()),
        Ok(_) => Err(ResponseError::Mismatch(response)),
        Err(error) => Err(error),
    }
}

/// Asks the host to make a 4 KiB page private or shared. SNP only.
pub const fn page_state_request(gpa: u64, to: Privacy) -> u64 {
    const GFN: u64 = 0x000F_FFFF_FFFF_F000;
    let operation: u64 = match to {
        Privacy::Private => 1,
        Privacy::Shared => 2,
    };
    operation << 52 | gpa & GFN | 0x014
}

/// Reads the response to [`page_state_request`].
///
/// # Errors
/// See [`ResponseError`].
pub const fn page_state(response: u64) -> Result<(), ResponseError> {
    match data(response, 0x015) {
        Ok(0) => Ok(()),
        Ok(data) if data & 0xF_FFFF == 0 => Err(ResponseError::Refused((response >> 32) as u32)),
        Ok(_) => Err(ResponseError::NotAResponse(response)),
        Err(error) => Err(error),
    }
}

/// Asks what the host can do. Version 2.
pub const FEATURES_REQUEST: u64 = 0x080;

/// The features that the host claims. It may lie; each use shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// SNP.
    pub const SNP: u64 = 1;
    /// Creation of vCPUs by the guest.
    pub const AP_CREATION: u64 = 1 << 1;
    /// Several VMPLs.
    pub const MULTI_VMPL: u64 = 1 << 5;

    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns whether all of `bits` are set.
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

/// Reads the response to [`FEATURES_REQUEST`].
///
/// # Errors
/// See [`ResponseError`].
pub const fn features(response: u64) -> Result<Features, ResponseError> {
    match data(response, 0x081) {
        Ok(bits) => Ok(Features(bits)),
        Err(error) => Err(error),
    }
}

/// Why a guest asks to be ended. The host sees both numbers, and may enter the guest again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Termination {
    /// Whose reasons these are, 0 to 15: 0 is the specification's.
    pub set: u8,
    /// The reason.
    pub reason: u8,
}

impl Termination {
    /// Something else.
    pub const GENERAL: Self = Self { set: 0, reason: 0 };
    /// No common version of the protocol, or a response that is none.
    pub const PROTOCOL: Self = Self { set: 0, reason: 1 };
    /// The host has no SNP.
    pub const SNP_UNSUPPORTED: Self = Self { set: 0, reason: 2 };
    /// Linux: the GHCB could not be registered.
    pub const LINUX_REGISTER: Self = Self { set: 1, reason: 0 };
    /// Linux: a page state change failed.
    pub const LINUX_PAGE_STATE: Self = Self { set: 1, reason: 1 };
    /// Linux: PVALIDATE failed.
    pub const LINUX_PVALIDATE: Self = Self { set: 1, reason: 2 };

    /// The request. There is no response.
    pub const fn request(self) -> u64 {
        (self.reason as u64) << 16 | (self.set as u64 & 0xF) << 12 | 0x100
    }
}
