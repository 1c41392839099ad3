//! Writes to control registers, with their checks.

use crate::segment::CS;
use crate::state::*;

const CR0_KNOWN: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | CR0_TS
    | CR0_ET
    | CR0_NE
    | CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;

/// CR4 bits of this processor: VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, LA57,
/// FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP, PKE, PKS.
pub(crate) const CR4_KNOWN: u64 = 0x0077_1fff & !(1 << 18 | 1 << 19) | CR4_OSXSAVE | CR4_PKS;

/// Bits of CR4 that exist if CPUID offers their feature: leaf, register (1 is EBX), bit there.
const CR4_OFFERED: [(u64, u32, usize, u32); 9] = [
    (CR4_PCIDE, 1, 2, 17),
    (CR4_OSXSAVE, 1, 2, 26),
    (CR4_FSGSBASE, 7, 1, 0),
    (CR4_SMEP, 7, 1, 7),
    (CR4_SMAP, 7, 1, 20),
    (CR4_UMIP, 7, 2, 2),
    (CR4_PKE, 7, 2, 3),
    (CR4_LA57, 7, 2, 16),
    (CR4_PKS, 7, 2, 31),
];

impl Core {
    pub(crate) fn write_cr0(&mut self, value: u64) -> R<()> {
        let value = value & (CR0_KNOWN | !0xffff_ffff) | CR0_ET;
        let enables = value & CR0_PG != 0 && self.cr0 & CR0_PG == 0;
        let disables = value & CR0_PG == 0 && self.cr0 & CR0_PG != 0;
        let bad = value >> 32 != 0
            || value & CR0_PG != 0 && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
            || disables && (self.bits == 64 || self.cr4 & CR4_PCIDE != 0);
        if bad {
            return Err(self.gp(0));
        }
        if enables && self.efer & EFER_LME != 0 {
            if self.cr4 & CR4_PAE == 0 || self.seg[CS].long() {
                return Err(self.gp(0));
            }
            self.efer |= EFER_LMA;
        }
        if disables {
            self.efer &= !EFER_LMA;
        }
        self.cr0 = value;
        self.flush_linear();
        self.update_mode();
        Ok(())
    }

    pub(crate) fn write_cr3(&mut self, value: u64) -> R<()> {
        let value = if self.long_mode() {
            let no_flush = if self.cr4 & CR4_PCIDE != 0 {
                1 << 63
            } else {
                0
            };
            let value = value & !no_flush;
            if value >> self.phys_bits != 0 {
                return Err(self.gp(0));
            }
            value
        } else {
            value & 0xffff_ffff
        };
        self.cr3 = value;
        self.flush_linear();
        Ok(())
    }

    fn cr4_offered(&self) -> u64 {
        CR4_OFFERED.iter().fold(CR4_KNOWN, |bits, feature| {
            let (bit, leaf, register, at) = *feature;
            match self.cpuid.has(leaf, register, at) {
                true => bits,
                false => bits & !bit,
            }
        })
    }

    pub(crate) fn write_cr4(&mut self, value: u64) -> R<()> {
        let changed = value ^ self.cr4;
        let pcide = changed & value & CR4_PCIDE != 0;
        let bad = value & !self.cr4_offered() != 0
            || self.long_mode() && (value & CR4_PAE == 0 || changed & CR4_LA57 != 0)
            || pcide && (!self.long_mode() || self.cr3 & 0xfff != 0);
        if bad {
            return Err(self.gp(0));
        }
        self.cr4 = value;
        self.flush_linear();
        self.update_mode();
        Ok(())
    }

    /// EFER: SCE, LME and NXE can be written, LME only without paging.
    pub(crate) fn write_efer(&mut self, value: u64) -> Option<()> {
        let nx = if self.offers_nx() { EFER_NXE } else { 0 };
        let known = EFER_SCE | EFER_LME | EFER_LMA | nx;
        let lme_changes = (value ^ self.efer) & EFER_LME != 0;
        if value & !known != 0 || lme_changes && self.cr0 & CR0_PG != 0 {
            return None;
        }
        self.efer = value & !EFER_LMA | self.efer & EFER_LMA;
        self.flush_linear();
        Some(())
    }

    /// XCR0: x87 always, SSE as offered by CPUID.
    pub(crate) fn set_xcr0(&mut self, value: u64) -> bool {
        let offered = u64::from(self.cpuid.get(0xd, 0).eax);
        if value & 1 == 0 || value & !offered != 0 || value & 4 != 0 && value & 2 == 0 {
            return false;
        }
        self.fpu.xcr0 = value;
        true
    }
}
