//! TDINFO_STRUCT: the identity of a TD, as its report shows it and as bindings compare it.

use crate::td::Td;
use core::ops::Range;

/// Byte ranges of the fields: ATTRIBUTES, XFAM, MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG, RTMR0 to 3, SERVTD_HASH.
pub(crate) const FIELDS: [Range<usize>; 11] = [
    0..8,
    8..16,
    16..64,
    64..112,
    112..160,
    160..208,
    208..256,
    256..304,
    304..352,
    352..400,
    400..448,
];

/// TDINFO_STRUCT of a TD.
pub(crate) fn td_info(td: &Td) -> [u8; 512] {
    let config = td.config();
    let servtd_hash = td.bindings().hash;
    let m = td.measurement();
    let mut info = [0; 512];
    info[..8].copy_from_slice(&config.attributes.to_le_bytes());
    info[8..16].copy_from_slice(&config.xfam.to_le_bytes());
    let digests = std::iter::once(&m.mrtd)
        .chain(&config.mr_config_id)
        .chain(&m.rtmr)
        .chain(std::iter::once(&servtd_hash));
    for (slot, digest) in info[16..].chunks_exact_mut(48).zip(digests) {
        slot.copy_from_slice(&digest.0);
    }
    info
}
