//! Buffers of SEV-SNP.

use zerocopy::little_endian::{U16, U32, U64};

use super::buffer;

buffer! {
    /// A guest by its context page, and nothing else.
    Context [SnpDecommission, SnpGctxCreate] 8 { 0 gctx: U64, }
}

buffer! {
    /// SNP_ACTIVATE.
    SnpActivate [SnpActivate] 0xc { 0 gctx: U64, 8 asid: U32, }
}

buffer! {
    /// SNP_GUEST_STATUS; the status goes to a page in Firmware state.
    SnpGuestStatus [SnpGuestStatus] 0x10 { 0 gctx: U64, 8 address: U64, }
}

buffer! {
    /// SNP_LAUNCH_START.
    SnpLaunchStart [SnpLaunchStart] 0x30 {
        0 gctx: U64, 8 policy: U64, 0x10 ma_gctx: U64, 0x18 flags: U32, 0x1c desired_tsc_khz: U32,
        0x20 gosvw: [u8; 16],
    }
}

buffer! {
    /// SNP_LAUNCH_UPDATE. Flags: bit 0 for a 2 MiB page, bits 3:1 the page type.
    SnpLaunchUpdate [SnpLaunchUpdate] 0x20 {
        0 gctx: U64, 8 flags: U32, 0xc reserved: U32, 0x10 address: U64, 0x18 reserved1: u8,
        0x19 vmpl1_perms: u8, 0x1a vmpl2_perms: u8, 0x1b vmpl3_perms: u8, 0x1c reserved2: U32,
    }
}

buffer! {
    /// SNP_LAUNCH_FINISH. Flags: bit 0 for an ID block, bit 1 for an author key, bit 2 to disable
    /// the VCEK.
    SnpLaunchFinish [SnpLaunchFinish] 0x40 {
        0 gctx: U64, 8 id_block: U64, 0x10 id_auth: U64, 0x18 flags: U16, 0x1a reserved: [u8; 6],
        0x20 host_data: [u8; 32],
    }
}

buffer! {
    /// SNP_PAGE_SWAP_OUT, as soft-amd-sp has it: no open source shows the layout. Flags: bit 0 for a 2 MiB page, bits 2:1
    /// the kind of page, bit 3 for a record in the guest's context.
    SnpPageSwapOut [SnpPageSwapOut] 0x30 {
        0 gctx: U64, 8 src: U64, 0x10 dst: U64, 0x18 mdata: U64, 0x20 software_data: U64, 0x28 flags: U32,
        0x2c reserved: U32,
    }
}

buffer! {
    /// SNP_PAGE_SWAP_IN, as soft-amd-sp has it. Flags as those of SNP_PAGE_SWAP_OUT.
    SnpPageSwapIn [SnpPageSwapIn] 0x28 {
        0 gctx: U64, 8 src: U64, 0x10 dst: U64, 0x18 mdata: U64, 0x20 flags: U32, 0x24 reserved: U32,
    }
}

buffer! {
    /// SNP_PAGE_MD_INIT, as soft-amd-sp has it.
    SnpPageMdInit [SnpPageMdInit] 8 { 0 paddr: U64, }
}

buffer! {
    /// SNP_PAGE_RECLAIM. Bit 0 of the address is set for a 2 MiB page.
    SnpPageReclaim [SnpPageReclaim] 8 { 0 paddr: U64, }
}

buffer! {
    /// SNP_GUEST_REQUEST. The response goes to a page in Firmware state.
    SnpGuestRequest [SnpGuestRequest] 0x18 { 0 gctx: U64, 8 request: U64, 0x10 response: U64, }
}
