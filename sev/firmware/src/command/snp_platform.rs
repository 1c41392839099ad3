//! Buffers of the SNP platform, and what it writes to memory.

use super::{Length, PageAddress, Reserved, SizedPage, U16, U32, U64, bits, layout};

bits! {
    /// Flags of SNP_INIT_EX.
    SnpInitFlags: u32, ones 0, subfields 0 {
        /// The RMP is initialised.
        INIT_RMP = 0,
        /// There is a list of ranges that stay the host's.
        LIST_PADDR_EN = 1,
        /// RAPL is disabled.
        RAPL_DIS = 2,
        /// Ciphertext hiding is on, and `max_snp_asid` counts.
        CIPHERTEXT_HIDING_EN = 3,
        /// Trusted I/O is on.
        TIO_EN = 4,
    }
}

bits! {
    /// Flags of SNP_SHUTDOWN_EX.
    SnpShutdownFlags: u32, ones 0, subfields 0 {
        /// The IOMMU leaves SNP too.
        IOMMU_SNP_SHUTDOWN = 0,
        /// The processors leave SNP too.
        X86_SNP_SHUTDOWN = 1,
    }
}

bits! {
    /// Flags of SNP_CONFIG.
    SnpConfigFlags: u32, ones 0, subfields 0 {
        /// Reports do not name the chip.
        MASK_CHIP_ID = 0,
        /// Reports are not signed.
        MASK_CHIP_KEY = 1,
    }
}

bits! {
    /// Flags that SNP_PLATFORM_STATUS reports.
    SnpStatusFlags: u32, ones 0, subfields 0 {
        /// Reports do not name the chip.
        MASK_CHIP_ID = 0,
        /// Reports are not signed.
        MASK_CHIP_KEY = 1,
        /// A VLEK is loaded.
        VLEK_EN = 2,
        /// SNP_FEATURE_INFO is there.
        FEATURE_INFO = 3,
        /// RAPL is disabled.
        RAPL_DIS = 4,
        /// Ciphertext hiding is possible.
        CIPHERTEXT_HIDING_CAP = 5,
        /// Ciphertext hiding is on.
        CIPHERTEXT_HIDING_EN = 6,
    }
}

layout! {
    /// SNP_INIT_EX.
    SnpInitEx 0x40 {
        0x00 in flags: SnpInitFlags,
        0x04 _ reserved0: Reserved<4>,
        /// List of ranges: a count, 4 bytes of 0, then 16 bytes each.
        0x08 in list_paddr: U64,
        /// With ciphertext hiding: SNP guests have ASIDs from 1 to this one.
        0x10 in max_snp_asid: U16,
        0x12 _ reserved1: Reserved<46>,
    }
}

layout! {
    /// SNP_SHUTDOWN_EX.
    SnpShutdownEx 8 {
        0 in length: Length<8>,
        4 in flags: SnpShutdownFlags,
    }
}

layout! {
    /// SNP_PLATFORM_STATUS; see [`SnpPlatformStatusPage`].
    SnpPlatformStatus 8 { 0 in status_paddr: U64, }
}

layout! {
    /// What SNP_PLATFORM_STATUS writes to memory.
    SnpPlatformStatusPage 0x20 {
        0x00 out api_major: u8,
        0x01 out api_minor: u8,
        /// 0 before SNP_INIT, 1 after.
        0x02 out state: u8,
        /// Bit 0: the RMP is initialised.
        0x03 out is_rmp_init: u8,
        0x04 out build: U32,
        0x08 out flags: SnpStatusFlags,
        0x0c out guest_count: U32,
        0x10 out current_tcb: U64,
        0x18 out reported_tcb: U64,
    }
}

layout! {
    /// SNP_GCTX_CREATE.
    SnpGctxCreate 8 {
        /// A page in Firmware state.
        0 in gctx_paddr: PageAddress,
    }
}

layout! {
    /// SNP_PAGE_SET_STATE.
    SnpPageSetState 0x10 {
        0x00 in length: Length<0x10>,
        0x04 _ reserved: Reserved<4>,
        /// A list as of SNP_INIT_EX.
        0x08 in list_paddr: U64,
    }
}

layout! {
    /// SNP_PAGE_RECLAIM.
    SnpPageReclaim 8 { 0 in page_paddr: SizedPage, }
}

layout! {
    /// SNP_PAGE_UNSMASH.
    SnpPageUnsmash 8 { 0 in page_paddr: SizedPage, }
}

layout! {
    /// SNP_CONFIG.
    SnpConfig 0x40 {
        /// Bytes of a [`TcbVersion`](crate::TcbVersion); 0 for the version that runs.
        0x00 in reported_tcb: U64,
        0x08 in flags: SnpConfigFlags,
        0x0c _ reserved: Reserved<52>,
    }
}

layout! {
    /// SNP_COMMIT.
    SnpCommit 4 { 0 in length: Length<4>, }
}

layout! {
    /// SNP_VLEK_LOAD.
    SnpVlekLoad 0x10 {
        0x00 in length: Length<0x10>,
        0x04 in vlek_wrapped_version: u8,
        0x05 _ reserved: Reserved<3>,
        0x08 in vlek_wrapped_address: U64,
    }
}

layout! {
    /// SNP_FEATURE_INFO; see [`SnpFeatureInfoPage`].
    SnpFeatureInfo 0x10 {
        0x00 in length: Length<0x10>,
        /// Leaf.
        0x04 in ecx_in: U32,
        0x08 in feature_info_paddr: U64,
    }
}

bits! {
    /// ECX of leaf 0 of SNP_FEATURE_INFO (Linux `drivers/crypto/ccp`).
    SnpFeatures: u32, ones 0, subfields 0 {
        /// RAPL can be disabled.
        RAPL_DIS = 2,
        /// Ciphertext hiding is possible.
        CIPHERTEXT_HIDING = 3,
    }
}

layout! {
    /// What SNP_FEATURE_INFO writes to memory: registers as of CPUID.
    SnpFeatureInfoPage 0x10 {
        0x0 out eax: U32,
        0x4 out ebx: U32,
        0x8 out ecx: SnpFeatures,
        0xc out edx: U32,
    }
}

layout! {
    /// SNP_INIT.
    SnpInit;
    /// SNP_SHUTDOWN.
    SnpShutdown;
    /// SNP_DF_FLUSH.
    SnpDfFlush;
    /// SNP_DOWNLOAD_FIRMWARE_EX, whose buffer is not modelled.
    SnpDownloadFirmwareEx;
}
