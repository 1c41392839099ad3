//! Statistics files, which `KVM_GET_STATS_FD` makes.

use crate::layout::layout;
use crate::{U16, U32};

/// Bytes of a name, and of the identification.
pub const NAME_SIZE: usize = 48;

layout! {
    /// `struct kvm_stats_header`.
    StatsHeader 24 {
        0 flags: U32, 4 name_size: U32, 8 num_desc: U32, 12 id_offset: U32, 16 desc_offset: U32,
        20 data_offset: U32,
    }
}

layout! {
    /// `struct kvm_stats_desc`, with its name. `exponent` is signed.
    StatsDesc 64 {
        0 flags: U32, 4 exponent: U16, 6 size: U16, 8 offset: U32, 12 bucket_size: U32,
        16 name: [u8; 48],
    }
}

/// The flags of a count that only grows.
pub const CUMULATIVE: u32 = 0;
