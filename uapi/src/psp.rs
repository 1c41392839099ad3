//! `/dev/sev`: `SEV_ISSUE_CMD` and its structures, which are packed.
//!
//! Addresses have the kernel's names without the suffix `_address`. Bit fields are the number that
//! holds them.

use crate::commands::commands;
use crate::layout::layout;
use crate::{U32, U64};

commands! { "SEV_";
    /// No structure.
    FACTORY_RESET = 0,
    /// [`Status`].
    PLATFORM_STATUS = 1,
    /// No structure.
    PEK_GEN = 2,
    /// [`Blob`].
    PEK_CSR = 3,
    /// No structure.
    PDH_GEN = 4,
    /// [`PdhCertExport`].
    PDH_CERT_EXPORT = 5,
    /// [`PekCertImport`].
    PEK_CERT_IMPORT = 6,
    /// [`Ids`]; GET_ID2 replaces it.
    GET_ID = 7,
    /// [`Blob`].
    GET_ID2 = 8,
    /// [`SnpStatus`].
    SNP_PLATFORM_STATUS = 9,
    /// No structure.
    SNP_COMMIT = 10,
    /// [`SnpConfig`].
    SNP_SET_CONFIG = 11,
    /// [`SnpVlekLoad`].
    SNP_VLEK_LOAD = 12,
}

layout! {
    /// `struct sev_issue_cmd`: the argument of every command.
    IssueCmd 16 { 0 cmd: U32, 4 data: U64, 12 error: U32, }
}

layout! {
    /// `struct sev_user_data_status`.
    Status 12 { 0 api_major: u8, 1 api_minor: u8, 2 state: u8, 3 flags: U32, 7 build: u8, 8 guest_count: U32, }
}

layout! {
    /// `struct sev_user_data_pek_csr` and `struct sev_user_data_get_id2`.
    Blob 12 { 0 address: U64, 8 length: U32, }
}

layout! {
    /// `struct sev_user_data_pek_cert_import`.
    PekCertImport 24 { 0 pek_cert: U64, 8 pek_cert_len: U32, 12 oca_cert: U64, 20 oca_cert_len: U32, }
}

layout! {
    /// `struct sev_user_data_pdh_cert_export`.
    PdhCertExport 24 { 0 pdh_cert: U64, 8 pdh_cert_len: U32, 12 cert_chain: U64, 20 cert_chain_len: U32, }
}

layout! {
    /// `struct sev_user_data_get_id`.
    Ids 128 { 0 socket1: [u8; 64], 64 socket2: [u8; 64], }
}

layout! {
    /// `struct sev_user_data_snp_status`.
    SnpStatus 32 {
        0 api_major: u8, 1 api_minor: u8, 2 state: u8, 3 is_rmp_initialized: u8, 4 build_id: U32,
        8 flags: U32, 12 guest_count: U32, 16 current_tcb_version: U64, 24 reported_tcb_version: U64,
    }
}

layout! {
    /// `struct sev_user_data_snp_config`.
    SnpConfig 64 { 0 reported_tcb: U64, 8 flags: U32, 12 rsvd1: [u8; 52], }
}

layout! {
    /// `struct sev_user_data_snp_vlek_load`.
    SnpVlekLoad 16 { 0 len: U32, 4 vlek_wrapped_version: u8, 5 rsvd: [u8; 3], 8 vlek_wrapped: U64, }
}
