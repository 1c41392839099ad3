//! The structures of Linux `asm/kvm.h` (`struct kvm_sev_*`), with the size and offset of every
//! field asserted.

use zerocopy::little_endian::{U16, U32, U64};

macro_rules! layout {
    ($(#[$doc:meta])* $Name:ident $size:literal { $($offset:literal $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
        #[derive(zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(C)]
        #[allow(missing_docs)] // Each is the field of its name in asm/kvm.h.
        pub struct $Name { $(pub $field: $ty,)* }

        const _: () = {
            assert!(core::mem::size_of::<$Name>() == $size);
            $(assert!(core::mem::offset_of!($Name, $field) == $offset);)*
        };
    };
}

layout! {
    /// `KVM_SEV_INIT2`.
    SevInit 48 {
        0 vmsa_features: U64, 8 flags: U32, 12 ghcb_version: U16, 14 pad1: U16, 16 pad2: [U32; 8],
    }
}

layout! {
    /// `KVM_SEV_LAUNCH_START`. `dh` and `session` are offsets of blobs.
    SevLaunchStart 40 {
        0 handle: U32, 4 policy: U32, 8 dh: U64, 16 dh_len: U32, 20 pad0: U32,
        24 session: U64, 32 session_len: U32, 36 pad1: U32,
    }
}

layout! {
    /// `KVM_SEV_LAUNCH_UPDATE_DATA`: the host address of memory that a slot lends; and
    /// `KVM_SEV_LAUNCH_MEASURE`: the offset of a blob.
    SevRange 16 { 0 uaddr: U64, 8 len: U32, 12 pad0: U32, }
}

layout! {
    /// `KVM_SEV_LAUNCH_SECRET`. `hdr` and `trans` are offsets of blobs, `guest` a host address.
    SevLaunchSecret 48 {
        0 hdr: U64, 8 hdr_len: U32, 12 pad0: U32, 16 guest: U64, 24 guest_len: U32, 28 pad1: U32,
        32 trans: U64, 40 trans_len: U32, 44 pad2: U32,
    }
}

layout! {
    /// `KVM_SEV_GUEST_STATUS`.
    SevGuestStatus 12 { 0 handle: U32, 4 policy: U32, 8 state: U32, }
}

layout! {
    /// `KVM_SEV_DBG_DECRYPT` and `_ENCRYPT`. The guest's side is a host address, the other the
    /// offset of a blob.
    SevDbg 24 { 0 src: U64, 8 dst: U64, 16 len: U32, 20 pad0: U32, }
}

layout! {
    /// `KVM_SEV_GET_ATTESTATION_REPORT`. `uaddr` is the offset of a blob.
    SevAttestation 32 { 0 mnonce: [u8; 16], 16 uaddr: U64, 24 len: U32, 28 pad0: U32, }
}

layout! {
    /// `KVM_SEV_SNP_LAUNCH_START`.
    SnpLaunchStart 64 {
        0 policy: U64, 8 gosvw: [u8; 16], 24 flags: U16, 26 pad0: [u8; 6], 32 pad1: [U64; 4],
    }
}

layout! {
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`. `uaddr` is the offset of a blob.
    SnpLaunchUpdate 64 {
        0 gfn_start: U64, 8 uaddr: U64, 16 len: U64, 24 kind: u8, 25 pad0: u8, 26 flags: U16,
        28 pad1: U32, 32 pad2: [U64; 4],
    }
}

layout! {
    /// `KVM_SEV_SNP_LAUNCH_FINISH`. `id_block` and `id_auth` are offsets of blobs.
    SnpLaunchFinish 88 {
        0 id_block: U64, 8 id_auth: U64, 16 id_block_en: u8, 17 auth_key_en: u8,
        18 vcek_disabled: u8, 19 host_data: [u8; 32], 51 pad0: [u8; 3], 54 flags: U16,
        56 pad1: [U64; 4],
    }
}
