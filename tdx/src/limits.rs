//! The limits of this machine's TDX module, read by TDH.SYS.RD.

use alloc::vec::Vec;

use kvm_ops::{Error, Host, Missing, PAGE_SIZE, Result, SeamPort, Tech};

use crate::seamcall::{Calls, Outcome};

/// Metadata field ids (TDX module ABI, "Global metadata fields").
mod field {
    pub(super) const TDCS_BASE_SIZE: u64 = 0x9800_0001_0000_0100;
    pub(super) const TDVPS_BASE_SIZE: u64 = 0x9800_0001_0000_0200;
    pub(super) const ATTRIBUTES_FIXED0: u64 = 0x1900_0003_0000_0000;
    pub(super) const ATTRIBUTES_FIXED1: u64 = 0x1900_0003_0000_0001;
    pub(super) const XFAM_FIXED0: u64 = 0x1900_0003_0000_0002;
    pub(super) const XFAM_FIXED1: u64 = 0x1900_0003_0000_0003;
    pub(super) const NUM_CPUID_CONFIG: u64 = 0x9900_0001_0000_0004;
    pub(super) const CONFIG_FLAGS_FIXED0: u64 = 0x9900_0003_0000_0006;
    pub(super) const MAX_VCPUS_PER_TD: u64 = 0x9900_0001_0000_0008;
    pub(super) const CPUID_CONFIG_LEAVES: u64 = 0x9900_0003_0000_0400;
    pub(super) const CPUID_CONFIG_VALUES: u64 = 0x9900_0003_0000_0500;
}

/// TD_PARAMS has room for so many CPUID rows.
const MAX_CPUID_ROWS: u64 = 32;

/// The limits that the module sets to a TD.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pages of a TDCS.
    pub(crate) tdcs_pages: u32,
    /// Pages of a vCPU: the TDVPR and its TDCX pages.
    pub(crate) tdvps_pages: u32,
    /// Bits of ATTRIBUTES that may be 1, and those that must be.
    pub attributes: (u64, u64),
    /// Bits of XFAM that may be 1, and those that must be.
    pub xfam: (u64, u64),
    /// Bits of CONFIG_FLAGS that may be 1.
    pub config_flags: u64,
    /// The most vCPUs of a TD.
    pub max_vcpus: u32,
    /// The CPUID values that the host may choose, in the order of TD_PARAMS.
    pub cpuid: Vec<CpuidRow>,
}

/// A CPUID leaf that the host may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidRow {
    /// The leaf.
    pub leaf: u32,
    /// `None` for a leaf without sub-leaves.
    pub subleaf: Option<u32>,
    /// The bits of EAX, EBX, ECX and EDX that the host may choose.
    pub mask: [u32; 4],
}

impl Limits {
    /// The limits of a host's module, the source of `KVM_TDX_CAPABILITIES`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the host has no TDX module; the error of TDH.SYS.RD.
    ///
    /// ```
    /// use kvm_ops_core::Vendor;
    /// use kvm_ops_sim::SimHost;
    /// use kvm_ops_tdx::Limits;
    ///
    /// let limits = Limits::of(&SimHost::new(Vendor::Intel))?;
    /// assert!(limits.cpuid.iter().any(|row| row.leaf == 1));
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    pub fn of<H: Host>(host: &H) -> Result<Self> {
        let seam = host
            .seam()
            .ok_or(Error::unsupported(Missing::HostTech, Tech::Tdx))?;
        Self::read(&Calls::new(seam), true).map_err(|failed| failed.error())
    }

    /// Reads them; the CPUID rows, three calls each, only `with_cpuid`.
    pub(crate) fn read<S: SeamPort>(calls: &Calls<'_, S>, with_cpuid: bool) -> Outcome<Self> {
        let pages = |bytes: u64| u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        let pair = |first, second| Ok((calls.sys_rd(first)?, calls.sys_rd(second)?));
        let mut cpuid = Vec::new();
        if with_cpuid {
            let rows = calls.sys_rd(field::NUM_CPUID_CONFIG)?.min(MAX_CPUID_ROWS);
            for row in 0..rows {
                cpuid.push(CpuidRow::read(calls, row)?);
            }
        }
        Ok(Self {
            tdcs_pages: pages(calls.sys_rd(field::TDCS_BASE_SIZE)?),
            tdvps_pages: pages(calls.sys_rd(field::TDVPS_BASE_SIZE)?),
            attributes: pair(field::ATTRIBUTES_FIXED0, field::ATTRIBUTES_FIXED1)?,
            xfam: pair(field::XFAM_FIXED0, field::XFAM_FIXED1)?,
            config_flags: calls.sys_rd(field::CONFIG_FLAGS_FIXED0)?,
            max_vcpus: u32::try_from(calls.sys_rd(field::MAX_VCPUS_PER_TD)?).unwrap_or(u32::MAX),
            cpuid,
        })
    }
}

impl CpuidRow {
    fn read<S: SeamPort>(calls: &Calls<'_, S>, row: u64) -> Outcome<Self> {
        let name = calls.sys_rd(field::CPUID_CONFIG_LEAVES + row)?;
        let eax_ebx = calls.sys_rd(field::CPUID_CONFIG_VALUES + row * 2)?;
        let ecx_edx = calls.sys_rd(field::CPUID_CONFIG_VALUES + row * 2 + 1)?;
        let (low, high) = (|x: u64| x as u32, |x: u64| (x >> 32) as u32);
        Ok(Self {
            leaf: low(name),
            subleaf: Some(high(name)).filter(|subleaf| *subleaf != u32::MAX),
            mask: [low(eax_ebx), high(eax_ebx), low(ecx_edx), high(ecx_edx)],
        })
    }
}
