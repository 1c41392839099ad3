//! Buffers of SEV and SEV-ES guests: launch, ASIDs, debugging.

use super::{Length, Reserved, SevPolicy, U32, U64, layout};

layout! {
    /// LAUNCH_START.
    LaunchStart 0x24 {
        /// 0, or a guest to share the key with; then the handle of the new guest.
        0x00 inout handle: U32,
        0x04 in policy: SevPolicy,
        /// Certificate of the owner's Diffie-Hellman key. With 0 here and in `session_paddr` the
        /// firmware draws the transport keys.
        0x08 in dh_cert_paddr: U64,
        0x10 in dh_cert_len: U32,
        0x14 _ reserved: Reserved<4>,
        0x18 in session_paddr: U64,
        0x20 in session_len: U32,
    }
}

layout! {
    /// LAUNCH_UPDATE_DATA.
    LaunchUpdateData 0x14 {
        0x00 in handle: U32,
        0x04 _ reserved: Reserved<4>,
        /// A multiple of 16.
        0x08 in data_paddr: U64,
        /// A multiple of 16.
        0x10 in data_len: U32,
    }
}

layout! {
    /// LAUNCH_UPDATE_VMSA.
    LaunchUpdateVmsa 0x14 {
        0x00 in handle: U32,
        0x04 _ reserved: Reserved<4>,
        /// A multiple of 0x1000.
        0x08 in vmsa_paddr: U64,
        /// 0x1000.
        0x10 in vmsa_len: U32,
    }
}

layout! {
    /// LAUNCH_MEASURE.
    LaunchMeasure 0x14 {
        0x00 in handle: U32,
        0x04 _ reserved: Reserved<4>,
        0x08 in measure_paddr: U64,
        /// Length of the memory, then of the measurement.
        0x10 inout measure_len: U32,
    }
}

layout! {
    /// LAUNCH_FINISH.
    LaunchFinish 4 { 0 in handle: U32, }
}

layout! {
    /// ATTESTATION.
    Attestation 0x24 {
        0x00 in handle: U32,
        0x04 _ reserved: Reserved<4>,
        0x08 in paddr: U64,
        /// Nonce of the one who asks.
        0x10 in mnonce: [u8; 16],
        /// Length of the memory, then of the report.
        0x20 inout length: U32,
    }
}

layout! {
    /// ACTIVATE.
    Activate 8 {
        0 in handle: U32,
        4 in asid: U32,
    }
}

layout! {
    /// ACTIVATE_EX.
    ActivateEx 0x18 {
        0x00 in ex_len: Length<0x18>,
        0x04 in handle: U32,
        0x08 in asid: U32,
        /// Number of cores in the list.
        0x0c in numids: U32,
        /// List of 4-byte core numbers.
        0x10 in ids_paddr: U64,
    }
}

layout! {
    /// DEACTIVATE.
    Deactivate 4 { 0 in handle: U32, }
}

layout! {
    /// DECOMMISSION.
    Decommission 4 { 0 in handle: U32, }
}

layout! {
    /// GUEST_STATUS.
    GuestStatus 0x0d {
        0x00 in handle: U32,
        0x04 out policy: SevPolicy,
        /// 0 while the guest is not active.
        0x08 out asid: U32,
        /// Number of a [`GuestState`](crate::GuestState).
        0x0c out state: u8,
    }
}

layout! {
    /// COPY.
    CopyMemory 0x18 {
        0x00 in handle: U32,
        /// A multiple of 16.
        0x04 in length: U32,
        /// A multiple of 16.
        0x08 in src_paddr: U64,
        /// A multiple of 16.
        0x10 in dst_paddr: U64,
    }
}

layout! {
    /// DBG_DECRYPT.
    DbgDecrypt 0x1c {
        0x00 in handle: U32,
        0x04 _ reserved: Reserved<4>,
        /// Memory of the guest; a multiple of 16.
        0x08 in src_paddr: U64,
        /// A multiple of 16.
        0x10 in dst_paddr: U64,
        /// A multiple of 16.
        0x18 in length: U32,
    }
}

layout! {
    /// DBG_ENCRYPT.
    DbgEncrypt 0x1c {
        0x00 in handle: U32,
        0x04 _ reserved: Reserved<4>,
        /// A multiple of 16.
        0x08 in src_paddr: U64,
        /// Memory of the guest; a multiple of 16.
        0x10 in dst_paddr: U64,
        /// A multiple of 16.
        0x18 in length: U32,
    }
}
