//! The compacted layout of a TD's extended state in its vCPUs' buffers.

use crate::config::PlatformConfig;

/// State components with an offset.
pub(crate) const COMPONENTS: usize = 19;
const LEGACY_AND_HEADER: u32 = 576;

/// Offset of each component of an XFAM, 0 for those it lacks, and the size of all.
pub(crate) fn layout(cfg: &PlatformConfig, xfam: u64) -> ([u32; COMPONENTS], u32) {
    let mut offsets = [0; COMPONENTS];
    let mut end = LEGACY_AND_HEADER;
    for (n, offset) in offsets.iter_mut().enumerate().skip(2) {
        if xfam >> n & 1 == 0 {
            continue;
        }
        let [size, _, flags, _] = cfg.native_cpuid(0xD, n as u32);
        const ALIGNED: u32 = 1 << 1;
        if flags & ALIGNED != 0 {
            end = end.next_multiple_of(64);
        }
        *offset = end;
        end = end.saturating_add(size);
    }
    (offsets, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_components_of_the_default_cpu_lie_behind_each_other() {
        let platform = crate::PlatformBuilder::new().build().expect("platform");
        let (offsets, size) = layout(platform.config(), 0x6_DBE7);
        assert_eq!(offsets[2], 0x240);
        assert_eq!(offsets[15], 0xA60);
        assert_eq!(offsets[17], 0xDC0, "aligned to 64 bytes");
        assert_eq!(offsets[18], 0xE00);
        assert_eq!(size, 0x2E00);
        assert_eq!(layout(platform.config(), 3), ([0; COMPONENTS], 0x240));
    }
}
