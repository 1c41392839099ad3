//! SEV, SEV-ES and SNP: `KVM_MEMORY_ENCRYPT_OP` on AMD hosts, and memory regions.
//!
//! Addresses have the kernel's names without the suffix `_uaddr`.

use crate::commands::commands;
use crate::layout::layout;
use crate::{U16, U32, U64};

commands! { "KVM_SEV_";
    /// Makes a VM of the default type a SEV guest.
    INIT = 0,
    /// Makes a VM of the default type a SEV-ES guest.
    ES_INIT = 1,
    /// [`SevLaunchStart`].
    LAUNCH_START = 2,
    /// [`SevRange`].
    LAUNCH_UPDATE_DATA = 3,
    /// No structure.
    LAUNCH_UPDATE_VMSA = 4,
    /// [`SevLaunchSecret`].
    LAUNCH_SECRET = 5,
    /// [`SevRange`].
    LAUNCH_MEASURE = 6,
    /// No structure.
    LAUNCH_FINISH = 7,
    /// [`SevSendStart`].
    SEND_START = 8,
    /// [`SevUpdateData`].
    SEND_UPDATE_DATA = 9,
    /// Not implemented by the kernel.
    SEND_UPDATE_VMSA = 10,
    /// No structure.
    SEND_FINISH = 11,
    /// [`SevReceiveStart`].
    RECEIVE_START = 12,
    /// [`SevUpdateData`].
    RECEIVE_UPDATE_DATA = 13,
    /// Not implemented by the kernel.
    RECEIVE_UPDATE_VMSA = 14,
    /// No structure.
    RECEIVE_FINISH = 15,
    /// [`SevGuestStatus`].
    GUEST_STATUS = 16,
    /// [`SevDbg`].
    DBG_DECRYPT = 17,
    /// [`SevDbg`].
    DBG_ENCRYPT = 18,
    /// Not implemented by the kernel.
    CERT_EXPORT = 19,
    /// [`SevAttestation`].
    GET_ATTESTATION_REPORT = 20,
    /// No structure.
    SEND_CANCEL = 21,
    /// [`SevInit`].
    INIT2 = 22,
    /// [`SnpLaunchStart`].
    SNP_LAUNCH_START = 100,
    /// [`SnpLaunchUpdate`].
    SNP_LAUNCH_UPDATE = 101,
    /// [`SnpLaunchFinish`].
    SNP_LAUNCH_FINISH = 102,
    /// No structure.
    SNP_ENABLE_REQ_CERTS = 103,
    /// [`SevLocalSend`]. Proposed for Linux in 2021 and not taken; the number is this project's.
    LOCAL_SEND = 0x4b4f_0000,
    /// [`SevLocalReceive`]. As LOCAL_SEND.
    LOCAL_RECEIVE = 0x4b4f_0001,
}

/// The commands that a mirror takes.
pub const MIRROR_COMMANDS: [u32; 4] = [LAUNCH_UPDATE_VMSA, GUEST_STATUS, DBG_DECRYPT, DBG_ENCRYPT];

/// The longest session, certificate, header or packet that a command takes, in bytes.
pub const BLOB_MAX: u32 = 16384;

/// Types of pages in [`SnpLaunchUpdate`].
pub mod page_type {
    /// Measured contents.
    pub const NORMAL: u8 = 1;
    /// Zeros, without a source.
    pub const ZERO: u8 = 3;
    /// Contents that are not measured.
    pub const UNMEASURED: u8 = 4;
    /// The page that firmware fills with secrets.
    pub const SECRETS: u8 = 5;
    /// The page of CPUID values that firmware checks.
    pub const CPUID: u8 = 6;
}

layout! {
    /// `struct kvm_sev_cmd`: the argument of every command.
    SevCmd 24 { 0 id: U32, 4 pad0: U32, 8 data: U64, 16 error: U32, 20 sev_fd: U32, }
}

layout! {
    /// `struct kvm_sev_init`.
    SevInit 48 {
        0 vmsa_features: U64, 8 flags: U32, 12 ghcb_version: U16, 14 pad1: U16, 16 pad2: [U32; 8],
    }
}

layout! {
    /// `struct kvm_sev_launch_start`.
    SevLaunchStart 40 {
        0 handle: U32, 4 policy: U32, 8 dh: U64, 16 dh_len: U32, 20 pad0: U32,
        24 session: U64, 32 session_len: U32, 36 pad1: U32,
    }
}

layout! {
    /// `struct kvm_sev_launch_update_data` and `struct kvm_sev_launch_measure`.
    SevRange 16 { 0 uaddr: U64, 8 len: U32, 12 pad0: U32, }
}

layout! {
    /// `struct kvm_sev_launch_secret`.
    SevLaunchSecret 48 {
        0 hdr: U64, 8 hdr_len: U32, 12 pad0: U32, 16 guest: U64, 24 guest_len: U32, 28 pad1: U32,
        32 trans: U64, 40 trans_len: U32, 44 pad2: U32,
    }
}

layout! {
    /// `struct kvm_sev_guest_status`.
    SevGuestStatus 12 { 0 handle: U32, 4 policy: U32, 8 state: U32, }
}

layout! {
    /// `struct kvm_sev_dbg`.
    SevDbg 24 { 0 src: U64, 8 dst: U64, 16 len: U32, 20 pad0: U32, }
}

layout! {
    /// `struct kvm_sev_attestation_report`.
    SevAttestation 32 { 0 mnonce: [u8; 16], 16 uaddr: U64, 24 len: U32, 28 pad0: U32, }
}

layout! {
    /// `struct kvm_sev_send_start`.
    SevSendStart 72 {
        0 policy: U32, 4 pad0: U32, 8 pdh_cert: U64, 16 pdh_cert_len: U32, 20 pad1: U32,
        24 plat_certs: U64, 32 plat_certs_len: U32, 36 pad2: U32,
        40 amd_certs: U64, 48 amd_certs_len: U32, 52 pad3: U32,
        56 session: U64, 64 session_len: U32, 68 pad4: U32,
    }
}

layout! {
    /// `struct kvm_sev_send_update_data` and `struct kvm_sev_receive_update_data`.
    SevUpdateData 48 {
        0 hdr: U64, 8 hdr_len: U32, 12 pad0: U32, 16 guest: U64, 24 guest_len: U32, 28 pad1: U32,
        32 trans: U64, 40 trans_len: U32, 44 pad2: U32,
    }
}

layout! {
    /// `struct kvm_sev_receive_start`.
    SevReceiveStart 40 {
        0 handle: U32, 4 policy: U32, 8 pdh: U64, 16 pdh_len: U32, 20 pad0: U32,
        24 session: U64, 32 session_len: U32, 36 pad1: U32,
    }
}

layout! {
    /// The answer of LOCAL_SEND: whoever brings the token to another VM of the host gets the guest, once.
    SevLocalSend 16 { 0 token: [u8; 16], }
}

layout! {
    /// The argument of LOCAL_RECEIVE, with the guest's handle as its answer.
    SevLocalReceive 24 { 0 token: [u8; 16], 16 handle: U32, 20 pad0: U32, }
}

layout! {
    /// `struct kvm_sev_snp_launch_start`.
    SnpLaunchStart 64 {
        0 policy: U64, 8 gosvw: [u8; 16], 24 flags: U16, 26 pad0: [u8; 6], 32 pad1: [U64; 4],
    }
}

layout! {
    /// `struct kvm_sev_snp_launch_update`. `kind` is `type` in the kernel's header.
    SnpLaunchUpdate 64 {
        0 gfn_start: U64, 8 uaddr: U64, 16 len: U64, 24 kind: u8, 25 pad0: u8, 26 flags: U16,
        28 pad1: U32, 32 pad2: [U64; 4],
    }
}

layout! {
    /// `struct kvm_sev_snp_launch_finish`.
    SnpLaunchFinish 88 {
        0 id_block: U64, 8 id_auth: U64, 16 id_block_en: u8, 17 auth_key_en: u8,
        18 vcek_disabled: u8, 19 host_data: [u8; 32], 51 pad0: [u8; 3], 54 flags: U16,
        56 pad1: [U64; 4],
    }
}

layout! {
    /// `struct kvm_enc_region`: memory that is pinned for a SEV guest.
    EncRegion 16 { 0 addr: U64, 8 size: U64, }
}
