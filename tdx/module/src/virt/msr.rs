//! The MSRs of a TD: which accesses exit, and what the module's VMX capability MSRs say.

use super::cpuid::{Flags, IA32_ARCH_CAPABILITIES, XFAM_LBR, XFAM_PT, has_xfd};
use super::tables::{Exits, Feature, MSRS, msr};
use crate::config::PlatformConfig;
use crate::td::{ATTR_DEBUG, ATTR_PERFMON, ATTR_PKS};

const XFAM_PKRU: u32 = 9;
const XFAM_CET: u64 = 3 << 11;
const XFAM_UINTR: u32 = 14;
pub(crate) const PERF_METRICS: u32 = 0x329;
pub(crate) const PERF_CAPABILITIES: u32 = 0x345;
const PERF_METRICS_AVAILABLE: u32 = 15;

/// Features of a TD that decide over its MSRs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MsrFeatures {
    attributes: u64,
    xfam: u64,
    flags: Flags,
    has_xfd: bool,
    has_perf_metrics: bool,
}

/// An access to an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrAccess {
    /// RDMSR.
    Read,
    /// WRMSR.
    Write,
}

impl MsrFeatures {
    pub(crate) fn new(cfg: &PlatformConfig, attributes: u64, xfam: u64, flags: Flags) -> Self {
        MsrFeatures {
            attributes,
            xfam,
            flags,
            has_xfd: has_xfd(cfg, xfam),
            has_perf_metrics: cfg.native_msr(PERF_CAPABILITIES) >> PERF_METRICS_AVAILABLE & 1 != 0,
        }
    }

    fn has_xfam(&self, bit: u32) -> bool {
        self.xfam >> bit & 1 != 0
    }

    fn perfmon(&self) -> bool {
        self.attributes & ATTR_PERFMON != 0
    }

    fn has(&self, feature: Feature, address: u32) -> bool {
        match feature {
            Feature::Perfmon => self.perfmon(),
            Feature::Pks => self.attributes & ATTR_PKS != 0,
            Feature::Tsx => self.flags.tsx,
            Feature::Waitpkg => self.flags.waitpkg,
            Feature::Cet => self.xfam & XFAM_CET == XFAM_CET,
            Feature::Lbr => self.has_xfam(XFAM_LBR),
            Feature::Pt => self.has_xfam(XFAM_PT),
            Feature::Uintr => self.has_xfam(XFAM_UINTR),
            Feature::Xfd => self.has_xfd,
            Feature::OfAddress => match address {
                PERF_METRICS => self.perfmon() && self.has_perf_metrics,
                _ => self.perfmon() && self.has_xfam(XFAM_PT),
            },
        }
    }

    /// An access leaves the TD for the module.
    pub(crate) fn exits(&self, address: u32, access: MsrAccess) -> bool {
        let Some(row) = msr(address) else { return true };
        let (exits, _) = match access {
            MsrAccess::Read => row.read,
            MsrAccess::Write => row.write,
        };
        match exits {
            Exits::Never => false,
            Exits::Always => true,
            Exits::Without(feature) => !self.has(feature, address),
        }
    }

    /// The MSR bitmaps page: bit set, access exits.
    pub(crate) fn bitmaps(&self) -> Vec<u64> {
        let mut words = vec![u64::MAX; BITMAP_WORDS];
        for row in MSRS.iter() {
            for address in row.first..=row.last {
                for access in [MsrAccess::Read, MsrAccess::Write] {
                    let passes = !self.exits(address, access);
                    if let Some(bit) = bitmap_bit(address, access).filter(|_| passes) {
                        words[bit / 64] &= !(1 << (bit % 64));
                    }
                }
            }
        }
        words
    }
}

/// Words of the MSR bitmaps page.
pub(crate) const BITMAP_WORDS: usize = 512;

/// The bit of an address in the MSR bitmaps page: low and high reads, low and high writes, 8192 bits each.
/// `None` outside both ranges, where every access exits.
pub(crate) fn bitmap_bit(address: u32, access: MsrAccess) -> Option<usize> {
    const HIGH: u32 = 0xC000_0000;
    const RANGE: u32 = 0x2000;
    let quarter = match access {
        MsrAccess::Read => 0,
        MsrAccess::Write => 2,
    };
    let (quarter, offset) = match address {
        0..RANGE => (quarter, address),
        HIGH.. if address - HIGH < RANGE => (quarter + 1, address - HIGH),
        _ => return None,
    };
    Some((quarter * RANGE + offset) as usize)
}

/// The IA32_ARCH_CAPABILITIES a TD sees.
///
/// `config` is the host's choice for the configurable bits, 0 without one. Bits that say the CPU lacks a
/// flaw's mitigation are never more than native, bit 19 (FB_CLEAR_CTRL) never less.
pub(crate) fn arch_capabilities(cfg: &PlatformConfig, config: u64, flags: Flags) -> u64 {
    const ALWAYS: u64 = 0x20_F16B;
    const AT_MOST_NATIVE: u64 = 1 << 4 | 1 << 20 | 1 << 24;
    const AT_LEAST_NATIVE: u64 = 1 << 19;
    const TSX_CTRL: u64 = 1 << 7;
    let native = cfg.native_msr(IA32_ARCH_CAPABILITIES);
    ALWAYS
        | config & native & AT_MOST_NATIVE
        | (config | native) & AT_LEAST_NATIVE
        | if flags.tsx { TSX_CTRL } else { 0 }
}

pub(crate) const CR4_FIXED1: u32 = 0x489;
pub(crate) const CR0_FIXED1: u32 = 0x487;
/// CR0 and CR4 bits a TD cannot clear: NE; MCE and VMXE.
pub(crate) const CR0_FIXED0: u64 = 0x20;
pub(crate) const CR4_FIXED0: u64 = 0x2040;

/// A VMX capability MSR as an L1 sees it: what its L2 VMs may be given. 0 for others.
pub(crate) fn vmx_capability(
    cfg: &PlatformConfig,
    attributes: u64,
    xfam: u64,
    address: u32,
) -> u64 {
    let has = |attribute: u64| attributes & attribute != 0;
    let if_ = |condition: bool, bits: u64| if condition { bits } else { 0 };
    let perf_ctrl = has(ATTR_DEBUG | ATTR_PERFMON);
    match address {
        0x480 => 0x01C0_0000_0000_0000,
        0x485 => 0x6004_40E0,
        0x486 => CR0_FIXED0,
        CR0_FIXED1 => 0x8005_003F,
        0x488 => CR4_FIXED0,
        CR4_FIXED1 => cr4_fixed1(cfg, attributes, xfam),
        0x48B => 0x1379_BFFE_1328_81F2,
        0x48C => 0x43_0001 | if_(xfam & XFAM_CET != 0, 1 << 23),
        0x48D => 0x0000_0029_0000_0029,
        // RDPMC exits unless the TD has its own counters.
        0x48E => 0xF9FB_9E8C_B122_0488 | if_(!has(ATTR_PERFMON), 1 << 11),
        0x48F => {
            let value = 0x1F3C_8204 | if_(perf_ctrl, 1 << 12 | 1 << 30);
            value << 32 | value
        }
        0x490 => {
            let value =
                0x3E_C004 | if_(perf_ctrl, 1 << 13) | if_(has(ATTR_DEBUG | ATTR_PKS), 1 << 22);
            // IA-32e mode is the guest's choice.
            (value | 1 << 9) << 32 | value
        }
        0x492 => 0xE,
        _ => 0,
    }
}

/// CR4 bits a TD can set: SMX never, others with their attribute or state component.
fn cr4_fixed1(cfg: &PlatformConfig, attributes: u64, xfam: u64) -> u64 {
    const SMXE: u64 = 1 << 14;
    const KEY_LOCKER: u64 = 1 << 19;
    const PKE: u64 = 1 << 22;
    const CET: u64 = 1 << 23;
    const PKS: u64 = 1 << 24;
    const UINTR: u64 = 1 << 25;
    let lacking = [
        (SMXE | KEY_LOCKER, false),
        (PKE, xfam >> XFAM_PKRU & 1 != 0),
        (CET, xfam & XFAM_CET != 0),
        (PKS, attributes & ATTR_PKS != 0),
        (UINTR, xfam >> XFAM_UINTR & 1 != 0),
    ];
    lacking
        .iter()
        .filter(|(_, has)| !has)
        .fold(cfg.native_msr(CR4_FIXED1), |value, (bits, _)| value & !bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bitmaps_say_what_the_table_says() {
        let cfg = crate::PlatformBuilder::new().build().expect("platform");
        for attributes in [0, ATTR_DEBUG, ATTR_PERFMON, ATTR_PKS] {
            for xfam in [3, 0x6_DBE7] {
                let features = MsrFeatures::new(cfg.config(), attributes, xfam, Flags::default());
                let bitmaps = features.bitmaps();
                for address in (0..0x2000).chain(0xC000_0000..0xC000_2000) {
                    for access in [MsrAccess::Read, MsrAccess::Write] {
                        let bit = bitmap_bit(address, access).expect("in range");
                        let set = bitmaps[bit / 64] >> (bit % 64) & 1 != 0;
                        assert_eq!(set, features.exits(address, access), "{address:#x}");
                    }
                }
            }
        }
    }

    #[test]
    fn addresses_outside_the_bitmaps_have_no_bit() {
        for address in [0x2000, 0xBFFF_FFFF, 0xC000_2000, u32::MAX] {
            assert_eq!(bitmap_bit(address, MsrAccess::Read), None);
        }
    }
}
