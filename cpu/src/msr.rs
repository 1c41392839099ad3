//! Model-specific registers.

use crate::mce::Mce;
use crate::segment::{FS, GS};
use crate::state::Core;

/// The MSRs that hold a value and nothing else, or that instructions use.
pub(crate) struct Msrs {
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) fmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) tsc_aux: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    /// TSC minus the processor's clock.
    pub(crate) tsc_offset: u64,
    pub(crate) tsc_adjust: u64,
    pat: u64,
    misc_enable: u64,
    /// IA32_POWER_CTL, which controls nothing.
    power_ctl: u64,
    mtrr_default: u64,
    mtrr_variable: [u64; 16],
    mtrr_fixed: [u64; 11],
    pub(crate) mce: Mce,
    /// Event selects and counters of AMD's first counters, which do not count.
    k7_counters: [u64; 8],
    /// HWCR of AMD's processors.
    hwcr: u64,
}

const HWCR: u32 = 0xc001_0015;
/// Bits of HWCR that can be written: McStatusWrEn, by which banks of machine checks take a status, and TscFreqSel.
const HWCR_MC_STATUS: u64 = 1 << 18;
const HWCR_WRITABLE: u64 = HWCR_MC_STATUS | 1 << 24;
/// Bits of HWCR that are taken and stay 0, as KVM has it: TLB cache disable, flush filter disable, IGNNE emulation.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;

/// The low half, which is all that AMD's processors keep of some MSRs.
const LOW: u64 = 0xffff_ffff;

/// IA32_MISC_ENABLE: bits that can be written (fast strings, thermal control, SpeedStep, MONITOR, limit of
/// CPUID, xTPR, no NX), and those that say what is unavailable (branch trace and PEBS).
const MISC_WRITABLE: u64 =
    1 << 0 | 1 << 3 | 1 << 16 | 1 << 18 | MISC_LIMIT_CPUID | 1 << 23 | MISC_NO_NX;
const MISC_FIXED: u64 = 0x1800;
const MISC_LIMIT_CPUID: u64 = 1 << 22;
const MISC_NO_NX: u64 = 1 << 34;

/// Variable MTRR pairs.
const MTRR_PAIRS: u64 = 8;
const FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

impl Msrs {
    pub(crate) fn new() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            // Fast strings on.
            misc_enable: MISC_FIXED | 1,
            power_ctl: 0,
            mtrr_default: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            mce: Mce::default(),
            k7_counters: [0; 8],
            hwcr: 0,
        }
    }

    /// CPUID leaf 0 tells no leaf above 2.
    pub(crate) fn limits_cpuid(&self) -> bool {
        self.misc_enable & MISC_LIMIT_CPUID != 0
    }

    pub(crate) fn disables_nx(&self) -> bool {
        self.misc_enable & MISC_NO_NX != 0
    }
}

/// The MSRs that [`Core::read_msr`] knows, but for those of machine checks' banks, which a processor may have.
pub(crate) fn exists(index: u32) -> bool {
    const SINGLE: [u32; 27] = [
        0x10,
        0x17,
        0x1b,
        0x3b,
        0x8b,
        0xfe,
        0x174,
        0x175,
        0x176,
        0x179,
        0x17a,
        0x1a0,
        0x1fc,
        0x277,
        0x2ff,
        0x6e0,
        0x6e1,
        0xda0,
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0xc000_0103,
    ];
    let x2apic = matches!(index, 0x802 | 0x803 | 0x808 | 0x80a | 0x80b | 0x80d | 0x80f..=0x828 | 0x830 | 0x832..=0x839 | 0x83e | 0x83f);
    SINGLE.contains(&index) || FIXED.contains(&index) || matches!(index, 0x200..=0x20f) || x2apic
}

/// Memory types that PAT and MTRRs may name.
fn memory_types(value: u64, pat: bool) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|t| matches!(t, 0 | 1 | 4 | 5 | 6) || pat && *t == 7)
}

impl Core {
    /// Clock of the processor: one tick an instruction, and what was skipped while halted.
    pub(crate) fn clock(&self) -> u64 {
        self.retired().wrapping_add(self.skipped)
    }

    pub(crate) fn tsc(&self) -> u64 {
        self.clock().wrapping_add(self.msrs.tsc_offset)
    }

    /// True for an MSR that exists, and for the banks of machine checks and the counters, of which a processor may have
    /// fewer or none.
    pub(crate) fn knows_msr(&self, index: u32) -> bool {
        let amd = matches!(index, 0xc001_0000..=0xc001_0007 | HWCR) && self.cpuid.is_amd();
        exists(index) || Mce::has(index) || amd
    }

    /// TSC_AUX is there for RDTSCP and RDPID.
    fn offers_tsc_aux(&self) -> bool {
        self.cpuid.has(0x8000_0001, 3, 27) || self.cpuid.has(7, 2, 22)
    }

    /// What a processor keeps of an address for SYSENTER; `None` is #GP. AMD's has 32 bits.
    fn sysenter_address(&self, value: u64) -> Option<u64> {
        if self.cpuid.is_amd() {
            return Some(value & LOW);
        }
        self.canonical_base(value).then_some(value)
    }

    fn offers_pks(&self) -> bool {
        self.cpuid.has(7, 2, 31)
    }

    pub(crate) fn offers_nx(&self) -> bool {
        !self.msrs.disables_nx()
    }

    /// Value of an MSR; `None` is #GP.
    pub(crate) fn read_msr(&self, index: u32) -> Option<u64> {
        let m = &self.msrs;
        Some(match index {
            0x10 => self.tsc(),
            // IA32_PLATFORM_ID: the first of the platforms that a microcode update may be for, as KVM says.
            0x17 => 0,
            0x1b => self.apic.base(),
            0x3b => m.tsc_adjust,
            // The revision that KVM gives a guest, which is no real microcode.
            0x8b if self.cpuid.is_amd() => 0x0100_0065,
            0x8b => 1 << 32,
            0xfe => MTRR_PAIRS | 1 << 8 | 1 << 10,
            0x174 => m.sysenter_cs,
            0x175 => m.sysenter_esp,
            0x176 => m.sysenter_eip,
            _ if Mce::has(index) => return m.mce.read(index),
            0x1a0 => m.misc_enable,
            0x1fc => m.power_ctl,
            0x200..=0x20f => m.mtrr_variable[index as usize & 15],
            0x277 => m.pat,
            0x2ff => m.mtrr_default,
            0x6e0 => self.apic.tsc_deadline(),
            0x6e1 if self.offers_pks() => self.pkrs.into(),
            0x6e1 => return None,
            0x800..=0x8ff => {
                let now = self.clock();
                return self.apic.read_x2(index, now);
            }
            0xda0 => 0,
            0xc000_0080 => self.efer,
            0xc000_0081 => m.star,
            0xc000_0082 => m.lstar,
            0xc000_0083 => m.cstar,
            0xc000_0084 => m.fmask,
            0xc000_0100 => self.seg[FS].base,
            0xc000_0101 => self.seg[GS].base,
            0xc000_0102 => m.kernel_gs_base,
            0xc000_0103 if self.offers_tsc_aux() => m.tsc_aux,
            0xc000_0103 => return None,
            0xc001_0000..=0xc001_0007 if self.cpuid.is_amd() => m.k7_counters[index as usize & 7],
            HWCR if self.cpuid.is_amd() => m.hwcr,
            _ => m.mtrr_fixed[FIXED.iter().position(|f| *f == index)?],
        })
    }

    /// What RDPMC reads of a counter, 48 bits; `None` is #GP. Intel's processors have no counters here.
    pub(crate) fn counter(&self, index: u32) -> Option<u64> {
        const BITS: u64 = (1 << 48) - 1;
        let (_, counters) = self.msrs.k7_counters.split_at(4);
        let value = counters
            .get(index as usize)
            .filter(|_| self.cpuid.is_amd())?;
        Some(value & BITS)
    }

    /// Writes an MSR; `None` is #GP.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let canonical = self.canonical_base(value);
        let address = |ok: bool| ok.then_some(value);
        match index {
            0x10 => {
                let delta = value.wrapping_sub(self.tsc());
                self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(delta);
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
            }
            0x1b => {
                let x2apic = crate::apic::X2APIC;
                if value & x2apic != 0 && !self.cpuid.has(1, 2, 21) {
                    return None;
                }
                self.apic.set_base(value, self.phys_bits)?;
                self.flush_all();
            }
            0x3b => {
                let delta = value.wrapping_sub(self.msrs.tsc_adjust);
                self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(delta);
                self.msrs.tsc_adjust = value;
            }
            0x8b => {}
            0x174 => self.msrs.sysenter_cs = value & LOW,
            0x175 => self.msrs.sysenter_esp = self.sysenter_address(value)?,
            0x176 => self.msrs.sysenter_eip = self.sysenter_address(value)?,
            _ if Mce::has(index) => {
                let status = self.cpuid.is_amd() && self.msrs.hwcr & HWCR_MC_STATUS != 0;
                return self.msrs.mce.write(index, value, status);
            }
            // KVM refuses a write that changes what is unavailable.
            0x1a0 if value & !MISC_WRITABLE == MISC_FIXED => self.msrs.misc_enable = value,
            0x1a0 => return None,
            0x1fc => self.msrs.power_ctl = value,
            0x200..=0x20f => {
                let mask = index & 1 != 0;
                let reserved = if mask { 0x7ff } else { 0xf00 };
                if value & reserved != 0 || value >> self.phys_bits != 0 {
                    return None;
                }
                if !mask && !memory_types(value & 0xff, false) {
                    return None;
                }
                self.msrs.mtrr_variable[index as usize & 15] = value;
            }
            0x277 => {
                if !memory_types(value, true) {
                    return None;
                }
                self.msrs.pat = value;
            }
            0x2ff => {
                if value & !0xcff != 0 || !memory_types(value & 0xff, false) {
                    return None;
                }
                self.msrs.mtrr_default = value;
            }
            0x6e0 => {
                let (now, tsc) = (self.clock(), self.tsc());
                self.apic.set_tsc_deadline(value, tsc, now);
            }
            0x6e1 if value >> 32 == 0 && self.offers_pks() => {
                self.pkrs = value as u32;
                self.flush_linear();
            }
            0x6e1 => return None,
            0x800..=0x8ff => {
                let now = self.clock();
                let effect = self.apic.write_x2(index, value, now)?;
                self.apply(effect);
            }
            0xda0 => return (value == 0).then_some(()),
            0xc000_0080 => self.write_efer(value)?,
            0xc000_0081 => self.msrs.star = value,
            0xc000_0082 => self.msrs.lstar = address(canonical)?,
            0xc000_0083 => self.msrs.cstar = address(canonical)?,
            0xc000_0084 => self.msrs.fmask = value & LOW,
            0xc000_0100 | 0xc000_0101 => {
                let seg = if index & 1 == 0 { FS } else { GS };
                self.seg[seg].base = address(canonical)?;
                self.update_mode();
            }
            0xc000_0102 => self.msrs.kernel_gs_base = address(canonical)?,
            0xc001_0000..=0xc001_0007 if self.cpuid.is_amd() => {
                self.msrs.k7_counters[index as usize & 7] = value;
            }
            HWCR if self.cpuid.is_amd() => {
                let value = value & !HWCR_IGNORED;
                self.msrs.hwcr = (value & !HWCR_WRITABLE == 0).then_some(value)?;
            }
            0xc000_0103 if !self.offers_tsc_aux() => return None,
            0xc000_0103 if self.cpuid.is_amd() => self.msrs.tsc_aux = value & LOW,
            0xc000_0103 => self.msrs.tsc_aux = (value >> 32 == 0).then_some(value)?,
            _ => {
                let slot = FIXED.iter().position(|f| *f == index)?;
                if !memory_types(value, false) {
                    return None;
                }
                self.msrs.mtrr_fixed[slot] = value;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::exists;
    use crate::{Access, Bus, CodePages, Cpu, CpuidTable, Mapping};
    use alloc::boxed::Box;

    struct Nothing;

    impl Bus for Nothing {
        fn map(&mut self, _: u64, _: Access) -> Mapping {
            Mapping::Device
        }
        fn read(&mut self, _: u64, _: &mut [u8]) -> bool {
            false
        }
        fn write(&mut self, _: u64, _: &[u8]) -> bool {
            false
        }
        fn port_in(&mut self, _: u16, _: u8) -> Option<u32> {
            None
        }
        fn port_out(&mut self, _: u16, _: u8, _: u32) -> Option<()> {
            None
        }
    }

    #[test]
    fn the_msrs_that_are_said_to_exist_are_those_that_can_be_read_or_written() {
        let mut cpu = Cpu::new(Box::new(Nothing), CodePages::new(1), CpuidTable::intel());
        assert!(cpu.set_apic_base(0xfee0_0d00), "x2APIC mode");
        for index in (0..0x2000).chain(0xc000_0000..0xc000_2000) {
            // EOI and self-IPI can be written and not read.
            let write_only = matches!(index, 0x80b | 0x83f);
            let known = cpu.read_msr(index).is_some() || write_only;
            assert_eq!(exists(index), known, "MSR {index:#x}");
        }
    }
}
