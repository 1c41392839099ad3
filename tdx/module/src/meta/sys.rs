//! Fields of the module and platform (SYS.RD).

use super::{
    BUILD_DATE, BUILD_NUMBER, MAJOR_VERSION, MINOR_VERSION, UPDATE_VERSION, VENDOR_ID, key, key_of,
    not_readable, unknown,
};
use crate::call::Leaf;
use crate::config::PlatformConfig;

/// Identifiers from the first to the last of an array; a scalar is an array of one.
type Span = (u64, u32);

/// Every host-readable field in next-id order.
#[rustfmt::skip]
const HOST: &[Span] = &[
    (0x0000_0002_0000_0000, 1), (0x0000_0002_0000_0001, 8),
    (0x0800_0002_0000_0000, 1), (0x8800_0002_0000_0001, 1), (0x8800_0001_0000_0002, 1),
    (0x0800_0001_0000_0003, 1), (0x0800_0001_0000_0004, 1), (0x0800_0001_0000_0005, 1),
    (0x0800_0001_0000_0006, 1),
    (0x8900_0001_0000_0000, 1), (0x8900_0001_0000_0001, 1), (0x8900_0000_0000_0002, 1),
    (0x8900_0001_0000_0003, 1), (0x8900_0000_0000_0004, 1), (0x8900_0001_0000_0005, 1),
    (0x8900_0002_0000_0006, 1),
    (0x0A00_0002_0000_0000, 1), (0x0A00_0000_0000_0001, 1), (0x0A00_0003_0000_0008, 1),
    (0x9000_0001_0000_0000, 1), (0x9000_0003_0000_0080, 32), (0x9000_0003_0000_0100, 32),
    (0x9100_0001_0000_0008, 1), (0x9100_0001_0000_0009, 1), (0x9100_0001_0000_0010, 1),
    (0x9100_0001_0000_0011, 1), (0x9100_0001_0000_0012, 1),
    (0x9800_0001_0000_0000, 1), (0x9800_0001_0000_0100, 1), (0x9800_0001_0000_0101, 1),
    (0x9800_0001_0000_0200, 1), (0x9800_0001_0000_0201, 1),
    (0x1900_0003_0000_0000, 1), (0x1900_0003_0000_0001, 1), (0x1900_0003_0000_0002, 1),
    (0x1900_0003_0000_0003, 1),
    (0x9900_0001_0000_0004, 1), (0x9900_0003_0000_0006, 1), (0x9900_0003_0000_0007, 1),
    (0x9900_0001_0000_0008, 1),
    (0x9900_0003_0000_0400, 32), (0x9900_0003_0000_0500, 64), (0x9900_0003_0000_0600, 1),
    (0x9900_0001_0000_0800, 1),
];

/// Every guest-readable field in next-id order.
#[rustfmt::skip]
const GUEST: &[Span] = &[
    (0x0800_0002_0000_0000, 1), (0x0800_0001_0000_0003, 1), (0x0800_0001_0000_0004, 1),
    (0x0A00_0002_0000_0000, 1), (0x0A00_0000_0000_0001, 1), (0x0A00_0003_0000_0008, 1),
    (0xA000_0003_0000_0000, 1), (0x2000_0001_0000_0001, 4), (0xA200_0001_0000_0000, 1),
];

/// Finds an identifier; returns it in canonical form and the one after it.
fn find(fields: &[Span], id: u64) -> Option<(u64, u64)> {
    let wanted = key_of(id);
    let position = fields.iter().position(|&(first, n)| {
        let (class, code) = key_of(first);
        class == wanted.0 && (code..code + n).contains(&wanted.1)
    })?;
    let (first, n) = fields[position];
    let canonical = first + u64::from(wanted.1 - key_of(first).1);
    // Within an array the next identifier is spelled like the one given.
    let next = if canonical + 1 < first + u64::from(n) {
        id + 1
    } else {
        fields.get(position + 1).map_or(u64::MAX, |f| f.0)
    };
    Some((canonical, next))
}

/// TDH.SYS.RD: value and next identifier.
pub(crate) fn read_host(cfg: &PlatformConfig, id: u64) -> Leaf<(u64, u64)> {
    key(id)?;
    match find(HOST, id) {
        Some((canonical, next)) => Ok((value(cfg, canonical), next)),
        None if find(GUEST, id).is_some() => not_readable(),
        None => unknown(),
    }
}

/// TDG.SYS.RD: value and next identifier.
pub(crate) fn read_guest(cfg: &PlatformConfig, id: u64) -> Leaf<(u64, u64)> {
    key(id)?;
    match find(GUEST, id) {
        Some((canonical, next)) => Ok((value(cfg, canonical), next)),
        None if find(HOST, id).is_some() => not_readable(),
        None => unknown(),
    }
}

fn value(cfg: &PlatformConfig, canonical: u64) -> u64 {
    let (class, code) = key_of(canonical);
    let index = |base: u32| (code - base) as usize;
    match (class, code) {
        (0x00, 0) => cfg.packages as u64,
        (0x00, 1..=8) if index(1) < cfg.packages => u64::from(cfg.fms),
        (0x08, 0) => u64::from(VENDOR_ID),
        (0x08, 1) => u64::from(BUILD_DATE),
        (0x08, 2) => u64::from(BUILD_NUMBER),
        (0x08, 3) => u64::from(MINOR_VERSION),
        (0x08, 4) => u64::from(MAJOR_VERSION),
        (0x08, 5) => u64::from(UPDATE_VERSION),
        (0x0A, 1) => 1,
        (0x0A, 8) => 0x001F_0FBF,
        (0x10, 0) => 32,
        (0x10, 0x80..=0x9F) => cfg.cmrs.get(index(0x80)).map_or(0, |c| c.base),
        (0x10, 0x100..=0x11F) => cfg.cmrs.get(index(0x100)).map_or(0, |c| c.size),
        (0x11, 0x08) => 64,
        (0x11, 0x09..=0x12) => 16,
        (0x18, 0) | (0x18, 0x101) => 0x1000,
        (0x18, 0x100) | (0x18, 0x200) => 0x6000,
        (0x18, 0x201) => 0x3000,
        (0x19, 0) => cfg.attributes_fixed0,
        (0x19, 1) => cfg.attributes_fixed1,
        (0x19, 2) => cfg.xfam_fixed0,
        (0x19, 3) => cfg.xfam_fixed1,
        (0x19, 4) => cfg.cpuid_configs.len() as u64,
        (0x19, 6) => cfg.config_flags_fixed0,
        (0x19, 8) => u64::from(cfg.max_vcpus),
        (0x19, 0x400..=0x41F) => cfg
            .cpuid_configs
            .get(index(0x400))
            .map_or(u64::MAX, |r| u64::from(r.leaf) | u64::from(r.subleaf) << 32),
        (0x19, 0x500..=0x53F) => {
            let pair = index(0x500);
            let half = |r: [u32; 4]| {
                let at = pair % 2 * 2;
                u64::from(r[at]) | u64::from(r[at + 1]) << 32
            };
            cfg.cpuid_configs
                .get(pair / 2)
                .map_or(0, |r| half(r.reported))
        }
        (0x19, 0x600) => cfg.arch_capabilities_config_mask,
        _ => 0,
    }
}
