//! Buffers of the commands that swap pages of SNP guests, and their record. No open source has them: all layouts
//! here are recalled (`docs/inferred.md`).

use super::{PageAddress, Reserved, SizedPage, U64, VmplPerms, bits, layout};
use crate::machine::entry::PageSize;

/// The kind of a page that is swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SwapType {
    /// A page of the guest's memory.
    Data = 0,
    /// A page of records, which is swapped when all pages of its records are.
    Metadata = 1,
    /// The register state of a vCPU.
    Vmsa = 2,
}

impl SwapType {
    /// Every kind.
    pub const ALL: [SwapType; 3] = [SwapType::Data, SwapType::Metadata, SwapType::Vmsa];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }
}

bits! {
    /// PAGE_SIZE, PAGE_TYPE and ROOT_MDATA_EN of SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN.
    SnpPageSwapFlags: u32, ones 0, subfields 0b110 {
        /// The page is of 2 MiB.
        PAGE_SIZE_2M = 0,
        /// The record is in the guest's context, and not at MDATA_PADDR.
        ROOT_MDATA_EN = 3,
    }
}

impl SnpPageSwapFlags {
    /// A page of this kind and size.
    pub const fn of(kind: SwapType, size: PageSize) -> Self {
        let large = match size {
            PageSize::Size4K => 0,
            PageSize::Size2M => 1,
        };
        Self::from_raw((kind as u32) << 1 | large)
    }

    /// PAGE_TYPE; `None` for a number that does not exist.
    pub fn page_type(self) -> Option<SwapType> {
        SwapType::from_number(self.bits() >> 1 & 3)
    }

    /// PAGE_SIZE.
    pub const fn page_size(self) -> PageSize {
        PageSize::of_bit(self.contains(Self::PAGE_SIZE_2M))
    }
}

layout! {
    /// SNP_PAGE_SWAP_OUT.
    SnpPageSwapOut 0x30 {
        0x00 in gctx_paddr: PageAddress,
        /// A page of the guest in Pre-Swap or Pre-Guest state, or one in Metadata state.
        0x08 in src_paddr: PageAddress,
        /// As many bytes, in pages in Firmware state.
        0x10 in dst_paddr: PageAddress,
        /// A free [`MdataEntry`] in a page in Metadata state.
        0x18 in mdata_paddr: U64,
        /// The host's mark, kept in the record.
        0x20 in software_data: U64,
        0x28 in flags: SnpPageSwapFlags,
        0x2c _ reserved: Reserved<4>,
    }
}

layout! {
    /// SNP_PAGE_SWAP_IN.
    SnpPageSwapIn 0x28 {
        0x00 in gctx_paddr: PageAddress,
        /// What SNP_PAGE_SWAP_OUT wrote.
        0x08 in src_paddr: PageAddress,
        /// A page in Pre-Guest state at the guest address of the record; for a page of records, one in
        /// Firmware state.
        0x10 in dst_paddr: PageAddress,
        0x18 in mdata_paddr: U64,
        0x20 in flags: SnpPageSwapFlags,
        0x24 _ reserved: Reserved<4>,
    }
}

layout! {
    /// SNP_PAGE_MD_INIT.
    SnpPageMdInit 8 {
        /// A small page in Firmware state.
        0 in page_paddr: SizedPage,
    }
}

bits! {
    /// Flags of an [`MdataEntry`].
    MdataFlags: u32, ones 0, subfields 0 {
        /// The entry is the record of a page that is swapped out.
        VALID = 0,
        /// Of a page of records.
        METADATA = 1,
        /// Of a page of 2 MiB.
        PAGE_SIZE_2M = 2,
        /// Of a page that the guest had validated.
        VALIDATED = 3,
        /// Of the register state of a vCPU.
        VMSA = 4,
    }
}

layout! {
    /// The record of a page that is swapped out. A page in Metadata state has 64 of them.
    MdataEntry 0x40 {
        0x00 out software_data: U64,
        /// The number of the message under the guest's swap key.
        0x08 out iv: U64,
        0x10 out auth_tag: [u8; 16],
        /// Guest physical address.
        0x20 out gpa: U64,
        0x28 out flags: MdataFlags,
        0x2c out vmpl0_perms: VmplPerms,
        0x2d out vmpl1_perms: VmplPerms,
        0x2e out vmpl2_perms: VmplPerms,
        0x2f out vmpl3_perms: VmplPerms,
        0x30 _ reserved: Reserved<16>,
    }
}
