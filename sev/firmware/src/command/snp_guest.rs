//! Buffers of SNP guests.

use super::{Length, PageAddress, Reserved, SnpPolicy, U32, U64, VmplPerms, bits, layout};
use crate::machine::entry::PageSize;
use crate::measure::PageType;

bits! {
    /// Flags of SNP_LAUNCH_START.
    SnpLaunchStartFlags: u32, ones 0, subfields 0 {
        /// There is a migration agent.
        MA_EN = 0,
        /// The launch has an initial migration image.
        IMI_EN = 1,
    }
}

bits! {
    /// PAGE_SIZE, PAGE_TYPE and IMI_PAGE of SNP_LAUNCH_UPDATE. Page type 0, the default, does not
    /// exist: [`of`](Self::of) gives those that do.
    SnpLaunchUpdateFlags: u32, ones 0, subfields 0b1110 {
        /// The page is of 2 MiB.
        PAGE_SIZE_2M = 0,
        /// The page is part of the initial migration image.
        IMI_PAGE = 4,
    }
}

impl SnpLaunchUpdateFlags {
    /// A page of 4 KiB of this type.
    pub const fn of(page_type: PageType) -> Self {
        Self::from_raw((page_type as u32) << 1)
    }

    /// PAGE_TYPE; `None` for a number that does not exist.
    pub fn page_type(self) -> Option<PageType> {
        PageType::from_number((self.bits() >> 1 & 7) as u8)
    }

    /// PAGE_SIZE.
    pub const fn page_size(self) -> PageSize {
        PageSize::of_bit(self.contains(Self::PAGE_SIZE_2M))
    }
}

bits! {
    /// Flags of SNP_LAUNCH_FINISH.
    SnpLaunchFinishFlags: u64, ones 0, subfields 0 {
        /// There is an ID block.
        ID_BLOCK_EN = 0,
        /// The ID block is signed by an author key too.
        AUTH_KEY_EN = 1,
        /// The VCEK may not sign the guest's reports.
        VCEK_DIS = 2,
    }
}

bits! {
    /// PAGE_SIZE of SNP_PAGE_MOVE.
    SnpPageMoveFlags: u32, ones 0, subfields 0 {
        /// The page is of 2 MiB.
        PAGE_SIZE_2M = 0,
    }
}

impl SnpPageMoveFlags {
    /// PAGE_SIZE.
    pub const fn page_size(self) -> PageSize {
        PageSize::of_bit(self.contains(Self::PAGE_SIZE_2M))
    }
}

layout! {
    /// SNP_LAUNCH_START.
    SnpLaunchStart 0x30 {
        0x00 in gctx_paddr: PageAddress,
        0x08 in policy: SnpPolicy,
        /// Context page of the migration agent.
        0x10 in ma_gctx_paddr: PageAddress,
        0x18 in flags: SnpLaunchStartFlags,
        /// Frequency of the guest's TSC in kHz; 0 for the processor's.
        0x1c in desired_tsc_khz: U32,
        /// Guest OS visible workarounds, for the secrets page.
        0x20 in gosvw: [u8; 16],
    }
}

layout! {
    /// SNP_ACTIVATE.
    SnpActivate 0x0c {
        0 in gctx_paddr: PageAddress,
        8 in asid: U32,
    }
}

layout! {
    /// SNP_ACTIVATE_EX.
    SnpActivateEx 0x20 {
        0x00 in ex_len: Length<0x20>,
        0x04 _ reserved: Reserved<4>,
        0x08 in gctx_paddr: PageAddress,
        0x10 in asid: U32,
        /// Number of cores in the list.
        0x14 in numids: U32,
        /// List of 4-byte core numbers.
        0x18 in id_paddr: U64,
    }
}

layout! {
    /// SNP_LAUNCH_UPDATE.
    SnpLaunchUpdate 0x20 {
        0x00 in gctx_paddr: PageAddress,
        0x08 in flags: SnpLaunchUpdateFlags,
        0x0c _ reserved0: Reserved<4>,
        /// A page in Pre-Guest state, of the size that the flags say.
        0x10 in page_paddr: PageAddress,
        0x18 _ reserved1: Reserved<1>,
        0x19 in vmpl1_perms: VmplPerms,
        0x1a in vmpl2_perms: VmplPerms,
        0x1b in vmpl3_perms: VmplPerms,
        0x1c _ reserved2: Reserved<4>,
    }
}

layout! {
    /// SNP_LAUNCH_FINISH.
    SnpLaunchFinish 0x40 {
        0x00 in gctx_paddr: PageAddress,
        /// An [`IdBlock`](crate::measure::IdBlock).
        0x08 in id_block_paddr: U64,
        /// An [`IdAuth`](crate::measure::IdAuth).
        0x10 in id_auth_paddr: U64,
        0x18 in flags: SnpLaunchFinishFlags,
        0x20 in host_data: [u8; 32],
    }
}

layout! {
    /// SNP_GUEST_REQUEST.
    SnpGuestRequest 0x18 {
        0x00 in gctx_paddr: PageAddress,
        0x08 in request_paddr: PageAddress,
        /// A page in Firmware state.
        0x10 in response_paddr: PageAddress,
    }
}

layout! {
    /// SNP_GUEST_STATUS; see [`SnpGuestStatusPage`].
    SnpGuestStatus 0x10 {
        0 in gctx_paddr: PageAddress,
        /// Memory in a page in Firmware state.
        8 in status_paddr: U64,
    }
}

layout! {
    /// What SNP_GUEST_STATUS writes to memory.
    SnpGuestStatusPage 0x10 {
        0x0 out policy: SnpPolicy,
        /// 0 while the guest is not active.
        0x8 out asid: U32,
        /// Number of an [`SnpState`](crate::SnpState).
        0xc out state: u8,
        0xd _ reserved: Reserved<3>,
    }
}

layout! {
    /// SNP_DECOMMISSION.
    SnpDecommission 8 { 0 in gctx_paddr: PageAddress, }
}

layout! {
    /// SNP_DBG_DECRYPT.
    SnpDbgDecrypt 0x18 {
        0x00 in gctx_paddr: PageAddress,
        /// A page of the guest.
        0x08 in src_paddr: PageAddress,
        0x10 in dst_paddr: PageAddress,
    }
}

layout! {
    /// SNP_DBG_ENCRYPT.
    SnpDbgEncrypt 0x18 {
        0x00 in gctx_paddr: PageAddress,
        0x08 in src_paddr: PageAddress,
        /// A page of the guest.
        0x10 in dst_paddr: PageAddress,
    }
}

layout! {
    /// SNP_PAGE_MOVE.
    SnpPageMove 0x20 {
        0x00 in gctx_paddr: PageAddress,
        0x08 in flags: SnpPageMoveFlags,
        0x0c _ reserved: Reserved<4>,
        0x10 in src_paddr: PageAddress,
        0x18 in dst_paddr: PageAddress,
    }
}
