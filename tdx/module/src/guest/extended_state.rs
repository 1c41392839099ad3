//! x87, SSE and the other state components of a vCPU, for a processor model: the buffer that XSAVES fills at a TD exit.

use crate::config::PlatformConfig;
use crate::meta::vcpu_initial::COMPACTED;
use crate::platform::Platform;
use crate::virt::xsave;

/// Bytes of the legacy region, and of the header behind it.
const LEGACY: usize = 512;
const HEADER: usize = 64;
/// The header's first two words in the buffer.
pub(crate) const XSTATE_BV: usize = LEGACY / 8;
const XCOMP_BV: usize = XSTATE_BV + 1;

/// The SSE component, to which MXCSR belongs in the compacted format; its place, and its value after reset.
const SSE: u64 = 1 << 1;
const MXCSR: usize = 24;
const MXCSR_RESET: u32 = 0x1F80;

/// Part of an area: bytes at an offset of the standard format, which have another one in the buffer.
struct Part {
    standard: usize,
    compacted: usize,
    bytes: usize,
}

/// The legacy region, and the user components of an XFAM behind it. Supervisor components have no place in the standard
/// format.
fn parts(cfg: &PlatformConfig, xfam: u64) -> impl Iterator<Item = Part> + '_ {
    const SUPERVISOR: u32 = 1;
    let (offsets, _) = xsave::layout(cfg, xfam);
    let legacy = Part {
        standard: 0,
        compacted: 0,
        bytes: LEGACY,
    };
    let others = (0u32..).zip(offsets).filter_map(|(n, compacted)| {
        if compacted == 0 {
            return None;
        }
        let [bytes, standard, flags, _] = cfg.native_cpuid(0xD, n);
        (flags & SUPERVISOR == 0).then_some(Part {
            standard: standard as usize,
            compacted: compacted as usize,
            bytes: bytes as usize,
        })
    });
    core::iter::once(legacy).chain(others)
}

fn u32_at(area: &[u8], at: usize) -> u32 {
    let bytes = area.get(at..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(area: &[u8], at: usize) -> u64 {
    u64::from(u32_at(area, at)) | u64::from(u32_at(area, at + 4)) << 32
}

/// Fills the buffer from an area of the standard format. What the area is too short for is in its initial state.
fn compact(cfg: &PlatformConfig, xfam: u64, area: &[u8], buffer: &mut [u64]) {
    for part in parts(cfg, xfam) {
        let words = buffer.iter_mut().skip(part.compacted / 8);
        for (word, n) in words.take(part.bytes / 8).zip(0..) {
            *word = u64_at(area, part.standard + n * 8);
        }
    }
    let mut in_use = u64_at(area, LEGACY) & xfam;
    if u32_at(area, MXCSR) != MXCSR_RESET {
        in_use |= SSE;
    }
    for (at, value) in [(XSTATE_BV, in_use), (XCOMP_BV, COMPACTED | xfam)] {
        if let Some(word) = buffer.get_mut(at) {
            *word = value;
        }
    }
}

/// The area of the standard format that a buffer holds.
fn expand(cfg: &PlatformConfig, xfam: u64, buffer: &[u64]) -> Vec<u8> {
    let end = |part: Part| part.standard + part.bytes;
    let bytes = parts(cfg, xfam).map(end).max().unwrap_or(0);
    let mut area = vec![0; bytes.max(LEGACY + HEADER)];
    for part in parts(cfg, xfam) {
        let words = buffer.iter().skip(part.compacted / 8);
        let bytes = area[part.standard..][..part.bytes].chunks_exact_mut(8);
        for (bytes, word) in bytes.zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    let in_use = buffer.get(XSTATE_BV).copied().unwrap_or(0);
    area[LEGACY..LEGACY + 8].copy_from_slice(&in_use.to_le_bytes());
    if in_use & SSE == 0 {
        area[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    }
    area
}

impl Platform {
    /// The state components of the vCPU that is named by its TDVPR page, as TDH.VP.ENTER loads them, if they are others than
    /// the processor model [saved](Self::save_extended_state): after an import, or a debugger's write. They are in
    /// XSAVE's standard format, legacy region, header and the user components of the TD's XFAM. `None` too as for
    /// [`Platform::guest_cpuid`].
    #[must_use]
    pub fn changed_extended_state(&self, tdvpr: u64) -> Option<Vec<u8>> {
        self.with_fields(tdvpr, |fields| {
            let changed = core::mem::take(&mut fields.ctx.xbuff_changed);
            let xfam = fields.td.config().xfam;
            changed.then(|| expand(&self.cfg, xfam, fields.ctx.store.xbuff()))
        })?
    }

    /// Saves the state components of a vCPU as a TD exit does (XSAVES): those of XFAM. `area` is in XSAVE's standard format, and
    /// may end before components that the model lacks. False if there is no such vCPU, or before its TDH.VP.INIT.
    ///
    /// Call it before TDH.VP.ENTER returns to its caller.
    pub fn save_extended_state(&self, tdvpr: u64, area: &[u8]) -> bool {
        let saved = self.with_fields(tdvpr, |fields| {
            let xfam = fields.td.config().xfam;
            compact(&self.cfg, xfam, area, fields.ctx.store.xbuff_mut());
            fields.ctx.xbuff_changed = false;
        });
        saved.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::vcpu_store::VcpuStore;

    fn platform() -> Platform {
        crate::PlatformBuilder::new().build().expect("platform")
    }

    /// An area with other bytes everywhere in its components.
    fn area(len: usize, in_use: u64) -> Vec<u8> {
        let mut area: Vec<u8> = (0..len).map(|n| (n * 7 + 1) as u8).collect();
        area[LEGACY..LEGACY + HEADER].fill(0);
        area[LEGACY..LEGACY + 8].copy_from_slice(&in_use.to_le_bytes());
        area
    }

    #[test]
    fn what_is_saved_is_loaded_with_each_xfam() {
        let platform = platform();
        let cfg = platform.config();
        for (xfam, len) in [(3, 576), (7, 832), (0xE7, 2688), (0x2E7, 2696)] {
            let mut store = VcpuStore::new(0);
            let from = area(len, xfam);
            compact(cfg, xfam, &from, store.xbuff_mut());
            let words = store.xbuff();
            assert_eq!(words[XCOMP_BV], COMPACTED | xfam);
            // The standard format has gaps, which nobody loads.
            let to = expand(cfg, xfam, words);
            assert_eq!(to.len(), len, "{xfam:#x}");
            for part in parts(cfg, xfam) {
                let range = part.standard..part.standard + part.bytes;
                assert_eq!(to[range.clone()], from[range], "{xfam:#x}");
            }
            assert_eq!(u64_at(&to, LEGACY), xfam);
        }
    }

    #[test]
    fn components_that_xfam_or_the_area_lacks_are_in_their_initial_state() {
        let platform = platform();
        let cfg = platform.config();
        let mut store = VcpuStore::new(0);
        // AVX is the area's, and not the TD's.
        compact(cfg, 3, &area(832, 7), store.xbuff_mut());
        assert_eq!(store.xbuff()[XSTATE_BV], 3);
        assert_eq!(store.xbuff()[72], 0, "no byte behind the header");
        // The TD has more than the model.
        compact(cfg, 0x2E7, &area(832, 7), store.xbuff_mut());
        assert_eq!(u64_at(&expand(cfg, 0x2E7, store.xbuff()), LEGACY), 7);
    }

    #[test]
    fn mxcsr_belongs_to_the_sse_component() {
        let platform = platform();
        let cfg = platform.config();
        let mut store = VcpuStore::new(0);
        // After TDH.VP.INIT all is in its initial state.
        assert_eq!(u32_at(&expand(cfg, 7, store.xbuff()), MXCSR), MXCSR_RESET);
        let mut reset = area(832, 0);
        reset[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        compact(cfg, 7, &reset, store.xbuff_mut());
        assert_eq!(store.xbuff()[XSTATE_BV], 0);
        reset[MXCSR..MXCSR + 4].copy_from_slice(&0x1FA0u32.to_le_bytes());
        compact(cfg, 7, &reset, store.xbuff_mut());
        assert_eq!(store.xbuff()[XSTATE_BV], SSE);
        assert_eq!(u32_at(&expand(cfg, 7, store.xbuff()), MXCSR), 0x1FA0);
    }
}
