//! Buffers of the SEV and SEV-ES platform.

use super::{Length, Reserved, U32, U64, bits, layout};

bits! {
    /// OPTIONS of INIT and INIT_EX.
    InitFlags: u32, ones 0, subfields 0 {
        /// SEV-ES guests are possible; needs a trusted memory region.
        SEV_ES = 0,
    }
}

bits! {
    /// OWNER and CONFIG of PLATFORM_STATUS.
    PlatformFlags: u32, ones 0, subfields 0 {
        /// The platform has an external owner.
        OWNER = 0,
        /// SEV-ES guests are possible.
        CONFIG_ES = 8,
    }
}

layout! {
    /// INIT.
    Init 0x14 {
        0x00 in options: InitFlags,
        0x04 _ reserved: Reserved<4>,
        /// Trusted memory region for SEV-ES, aligned to its length.
        0x08 in tmr_paddr: U64,
        /// At least 1 MiB, or 2 MiB while SNP is initialised.
        0x10 in tmr_length: U32,
    }
}

layout! {
    /// INIT_EX: INIT, with the persistent data in the host's memory.
    InitEx 0x24 {
        0x00 in length: Length<0x24>,
        0x04 in options: InitFlags,
        /// As in [`Init`].
        0x08 in tmr_paddr: U64,
        /// As in [`Init`].
        0x10 in tmr_length: U32,
        0x14 _ reserved: Reserved<4>,
        /// A page-aligned buffer of persistent data; with 0 and length 0 there is none.
        0x18 in nv_paddr: U64,
        /// 32 KiB.
        0x20 in nv_length: U32,
    }
}

layout! {
    /// PLATFORM_STATUS.
    PlatformStatus 0x0c {
        0x00 out api_major: u8,
        0x01 out api_minor: u8,
        /// Number of a [`PlatformState`](crate::PlatformState).
        0x02 out state: u8,
        0x03 out flags: PlatformFlags,
        0x07 out build: u8,
        0x08 out guest_count: U32,
    }
}

layout! {
    /// PEK_CSR.
    PekCsr 0x0c {
        0x00 in csr_paddr: U64,
        /// Length of the memory, then of the request.
        0x08 inout csr_length: U32,
    }
}

layout! {
    /// PEK_CERT_IMPORT.
    PekCertImport 0x1c {
        0x00 in pek_cert_paddr: U64,
        0x08 in pek_cert_length: U32,
        0x0c _ reserved: Reserved<4>,
        0x10 in oca_cert_paddr: U64,
        0x18 in oca_cert_length: U32,
    }
}

layout! {
    /// PDH_CERT_EXPORT.
    PdhCertExport 0x1c {
        0x00 in pdh_cert_paddr: U64,
        /// Length of the memory, then of the certificate.
        0x08 inout pdh_cert_length: U32,
        0x0c _ reserved: Reserved<4>,
        /// PEK, OCA and CEK certificate.
        0x10 in certs_paddr: U64,
        /// Length of the memory, then of the three certificates.
        0x18 inout certs_length: U32,
    }
}

layout! {
    /// DOWNLOAD_FIRMWARE.
    DownloadFirmware 0x0c {
        0x00 in fw_paddr: U64,
        0x08 in fw_length: U32,
    }
}

layout! {
    /// GET_ID.
    GetId 0x0c {
        0x00 in id_paddr: U64,
        /// Length of the memory, then of the identity.
        0x08 inout id_length: U32,
    }
}

layout! {
    /// SHUTDOWN.
    Shutdown;
    /// FACTORY_RESET.
    FactoryReset;
    /// PEK_GEN.
    PekGen;
    /// PDH_GEN.
    PdhGen;
    /// DF_FLUSH.
    DfFlush;
    /// NOP.
    Nop;
}
