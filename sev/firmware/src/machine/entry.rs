//! RMP entries and the states a page can be in.

use std::fmt;

/// Size of a page in the RMP or a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageSize {
    /// 4 KiB.
    #[default]
    Size4K,
    /// 2 MiB.
    Size2M,
}

impl PageSize {
    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            PageSize::Size4K => 0x1000,
            PageSize::Size2M => 0x20_0000,
        }
    }

    /// The size that a PAGE_SIZE bit of a command names.
    pub(crate) const fn of_bit(large: bool) -> Self {
        match large {
            true => PageSize::Size2M,
            false => PageSize::Size4K,
        }
    }

    /// Returns true if an address is a multiple of the size.
    pub const fn aligns(self, address: u64) -> bool {
        address & (self.bytes() - 1) == 0
    }
}

/// State of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageState {
    /// Owned by the host, like all memory at the start.
    #[default]
    Hypervisor,
    /// Given to the firmware.
    Firmware,
    /// Given back by the firmware; RMPUPDATE may free it.
    Reclaim,
    /// Holds a guest context.
    Context,
    /// Holds swap records.
    Metadata,
    /// Assigned to a guest, and the host may not change it until firmware has used it.
    PreGuest,
    /// A guest page the host has fixed so that firmware can move it.
    PreSwap,
    /// Assigned to a guest that has not accepted it yet.
    GuestInvalid,
    /// Assigned to a guest that has accepted it.
    GuestValid,
    /// Fixed to the host until reboot.
    HvFixed,
}

impl PageState {
    /// Every state.
    pub const ALL: [PageState; 10] = [
        PageState::Hypervisor,
        PageState::Firmware,
        PageState::Reclaim,
        PageState::Context,
        PageState::Metadata,
        PageState::PreGuest,
        PageState::PreSwap,
        PageState::GuestInvalid,
        PageState::GuestValid,
        PageState::HvFixed,
    ];

    /// Bit "assigned".
    pub fn is_assigned(self) -> bool {
        !matches!(self, PageState::Hypervisor | PageState::HvFixed)
    }

    /// Bit "immutable": RMPUPDATE is refused.
    pub fn is_immutable(self) -> bool {
        use PageState::*;
        matches!(self, Firmware | Context | Metadata | PreGuest | PreSwap)
    }

    /// Bit "validated".
    pub fn is_validated(self) -> bool {
        matches!(self, PageState::GuestValid | PageState::PreSwap)
    }

    /// Returns true if the page belongs to a guest.
    pub fn is_guest(self) -> bool {
        use PageState::*;
        matches!(self, PreGuest | PreSwap | GuestInvalid | GuestValid)
    }

    /// Returns true if the host may write to it.
    pub fn host_may_write(self) -> bool {
        matches!(self, PageState::Hypervisor | PageState::HvFixed)
    }
}

impl fmt::Display for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PageState::Hypervisor => "Hypervisor",
            PageState::Firmware => "Firmware",
            PageState::Reclaim => "Reclaim",
            PageState::Context => "Context",
            PageState::Metadata => "Metadata",
            PageState::PreGuest => "Pre-Guest",
            PageState::PreSwap => "Pre-Swap",
            PageState::GuestInvalid => "Guest-Invalid",
            PageState::GuestValid => "Guest-Valid",
            PageState::HvFixed => "HV-Fixed",
        })
    }
}

/// Permission bits of a VMPL: read, write, user execute, supervisor execute.
pub mod permission {
    /// The VMPL may read.
    pub const READ: u8 = 1;
    /// The VMPL may write.
    pub const WRITE: u8 = 2;
    /// The VMPL may execute at CPL 3.
    pub const USER_EXECUTE: u8 = 4;
    /// The VMPL may execute below CPL 3.
    pub const SUPERVISOR_EXECUTE: u8 = 8;
    /// Everything.
    pub const ALL: u8 = 15;
}

/// One entry of the RMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmpEntry {
    /// State of the page.
    pub state: PageState,
    /// Size of the page.
    pub size: PageSize,
    /// ASID of the guest that owns it; 0 for none.
    pub asid: u32,
    /// Guest physical address it is assigned at.
    pub gpa: u64,
    /// True if it holds the register state of a vCPU.
    pub vmsa: bool,
    /// Permissions of VMPL0 to VMPL3.
    pub permissions: [u8; 4],
}

impl Default for RmpEntry {
    fn default() -> Self {
        Self::of(PageState::Hypervisor)
    }
}

impl RmpEntry {
    /// A 4 KiB entry of no guest.
    pub(crate) const fn of(state: PageState) -> Self {
        Self {
            state,
            size: PageSize::Size4K,
            asid: 0,
            gpa: 0,
            vmsa: false,
            permissions: [permission::ALL, 0, 0, 0],
        }
    }

    /// The same entry in another state.
    pub(crate) fn with_state(self, state: PageState) -> Self {
        Self { state, ..self }
    }

    /// The 16 bytes RMPREAD gives: guest address, assigned, page size, immutable, ASID.
    pub fn to_rmpread(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.gpa.to_le_bytes());
        out[8] = self.state.is_assigned().into();
        out[9] = (self.size == PageSize::Size2M).into();
        out[10] = self.state.is_immutable().into();
        out[12..].copy_from_slice(&self.asid.to_le_bytes());
        out
    }
}

impl fmt::Display for RmpEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match self.size {
            PageSize::Size4K => "4K",
            PageSize::Size2M => "2M",
        };
        write!(f, "{:<13} {size}", self.state)?;
        if self.asid != 0 {
            write!(f, " asid {:#x} gpa {:#x}", self.asid, self.gpa)?;
        }
        if self.vmsa {
            f.write_str(" vmsa")?;
        }
        if self.permissions[1..] != [0; 3] {
            write!(f, " perms {:x?}", self.permissions)?;
        }
        Ok(())
    }
}
