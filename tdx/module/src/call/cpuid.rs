//! CPUID configuration in TD_PARAMS.

use super::mng_init::{CPUID_OFFSET, Params};
use super::{Call, Leaf, invalid};
use crate::config::PlatformConfig;
use crate::status::{Code, Operand};

fn row(params: &Params, index: usize) -> [u32; 4] {
    core::array::from_fn(|i| params.u32(CPUID_OFFSET + index * 16 + i * 4))
}

/// Every row within its mask, in the order of their rank; the first that is not is named in RCX.
pub(super) fn check_rows(c: &mut Call<'_, '_>, params: &Params, migratable: bool) -> Leaf {
    let cfg = &c.p.cfg;
    let mut order: Vec<usize> = (0..cfg.cpuid_configs.len()).collect();
    order.sort_by_key(|i| cfg.cpuid_configs[*i].rank);
    for i in order {
        let config = cfg.cpuid_configs[i];
        let values = row(params, i);
        let outside = values
            .iter()
            .zip(config.permitted)
            .any(|(v, mask)| v & !mask != 0);
        let wrong_model = config.leaf == 1 && !is_allowed_fms(values[0], cfg.fms, migratable);
        if outside || wrong_model {
            c.regs.rcx = u64::from(config.leaf) | u64::from(config.subleaf) << 32;
            return Err(invalid(Operand::CPUID_CONFIG));
        }
    }
    Ok(())
}

/// 0 (native), the native family/model/stepping, or for a TD that may migrate a lower stepping.
fn is_allowed_fms(eax: u32, native: u32, migratable: bool) -> bool {
    let stepping = |v: u32| v & 0xF;
    eax == 0
        || eax == native
        || migratable && eax >> 4 == native >> 4 && stepping(eax) < stepping(native)
}

/// CPUID leaf 1F: the topology a TD is shown. All zero means native.
pub(super) fn check_topology(cfg: &PlatformConfig, params: &Params) -> Leaf {
    const CORE: u32 = 2;
    const TYPES: u32 = 6;
    let bad = Code::CPUID_LEAF_1F_FORMAT_UNRECOGNIZED.status();
    let mut rows: Vec<(u32, [u32; 4])> = cfg
        .cpuid_configs
        .iter()
        .enumerate()
        .filter(|(_, config)| config.leaf == 0x1F)
        .map(|(i, config)| (config.subleaf, row(params, i)))
        .collect();
    rows.sort_by_key(|(subleaf, _)| *subleaf);
    if rows.iter().all(|(_, values)| *values == [0; 4]) {
        return Ok(());
    }
    let mut previous = 0;
    let mut seen_core = false;
    for (_, values) in rows {
        let level_type = values[2] >> 8 & 0xFF;
        if level_type == 0 {
            if !seen_core {
                return Err(bad);
            }
        } else if level_type <= previous || level_type >= TYPES {
            return Err(bad);
        }
        seen_core |= level_type == CORE;
        previous = level_type;
    }
    Ok(())
}
