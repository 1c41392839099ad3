//! CPUID values an imported TD may have on this processor.

use crate::config::PlatformConfig;
use crate::td::TdConfig;
use crate::virt::cpuid::{LEAF_1, xsave_size};
use crate::virt::tables::{CPUID, XFAM};

/// Returns true if the TD can see these values of two registers of a row on this platform: EAX and EBX of half 0,
/// ECX and EDX of half 1. Rows before it have been imported.
pub(super) fn is_valid(
    cfg: &PlatformConfig,
    td: &TdConfig,
    row: usize,
    half: usize,
    pair: [u32; 2],
) -> bool {
    let Some(r) = CPUID.get(row).filter(|r| !r.faulting) else {
        return false;
    };
    let native = cfg.native_cpuid(r.leaf, r.subleaf);
    let registers = half * 2..half * 2 + 2;
    let within_row = registers.clone().zip(pair).all(|(i, value)| {
        value & r.fixed0[i] == 0
            && value & r.fixed1[i] == r.fixed1[i]
            && value & r.allow_direct[i] & !native[i] == 0
    });
    let lacking = |bit: u32| td.xfam >> bit & 1 == 0;
    let within_xfam = XFAM
        .iter()
        .filter(|x| (x.leaf, x.subleaf) == (r.leaf, r.subleaf) && lacking(x.xfam_bit))
        .all(|x| registers.clone().zip(pair).all(|(i, v)| v & x.mask[i] == 0));
    within_row && within_xfam && follows_leaf_rule(cfg, td, (r.leaf, r.subleaf), half, pair)
}

/// Leaves whose values follow from something else.
fn follows_leaf_rule(
    cfg: &PlatformConfig,
    td: &TdConfig,
    leaf: (u32, u32),
    half: usize,
    pair: [u32; 2],
) -> bool {
    const MONITOR: u32 = 1 << 3;
    const ECX: usize = 2;
    let native = cfg.native_cpuid(leaf.0, leaf.1);
    match (leaf, half) {
        ((5, _), _) => {
            let monitor = td.cpuid[LEAF_1][ECX] & MONITOR != 0;
            let wanted = if monitor { native } else { [0; 4] };
            pair[..] == wanted[half * 2..half * 2 + 2]
        }
        // A TD that migrates has no performance monitoring.
        ((0xA, _), _) => pair == [0, 0],
        ((0x15, _), 0) => pair[1] == u32::from(td.tsc_frequency),
        ((0xD, 0), 1) => pair[0] == xsave_size(cfg, td.xfam),
        _ => true,
    }
}
