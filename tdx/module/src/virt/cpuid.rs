//! The CPUID values of a TD: native ones, cut to what the module virtualises, as TDH.MNG.INIT configures them.

use super::tables::{ANY, CPUID, Quad, XFAM, cpuid_index};
use crate::config::PlatformConfig;
use crate::status::{Code, Operand, Status};
use crate::td::{ATTR_MIGRATABLE, ATTR_PERFMON, ATTR_PKS};

/// Rows of the CPUID table.
pub(crate) const ROWS: usize = 68;

const ATTR_LASS: u64 = 1 << 27;
pub(crate) const XFAM_PT: u32 = 8;
pub(crate) const XFAM_LBR: u32 = 15;
/// Components that XCR0 enables; IA32_XSS enables the others.
pub(crate) const XCR0_COMPONENTS: u64 = 0x6_02E7;
const XFAM_AMX: u64 = 3 << 17;

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

const TSX_CTRL: u64 = 1 << 7;
pub(crate) const IA32_ARCH_CAPABILITIES: u32 = 0x10A;

/// Features of a TD that its CPUID values decide, not its attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Flags {
    pub(crate) dca: bool,
    pub(crate) tsc_deadline: bool,
    pub(crate) tsx: bool,
    pub(crate) waitpkg: bool,
    pub(crate) tme: bool,
    pub(crate) pconfig: bool,
}

/// A TD's CPUID values, by row of the table.
pub(crate) type Values = [Quad; ROWS];

/// Error of a refused configuration: a status, and the leaf and sub-leaf that RCX names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refused {
    pub(crate) status: Status,
    /// Leaf | sub-leaf<<32.
    pub(crate) row: Option<u64>,
}

impl PlatformConfig {
    /// Native CPUID values, without the parts that depend on the processor and its state.
    pub(crate) fn native_cpuid(&self, leaf: u32, subleaf: u32) -> Quad {
        self.cpuid
            .iter()
            .find(|r| {
                r.leaf == leaf && (r.subleaf == ANY || r.subleaf == subleaf || subleaf == ANY)
            })
            .map_or([0; 4], |r| r.values)
    }

    /// A native MSR at power-on.
    pub(crate) fn native_msr(&self, address: u32) -> u64 {
        self.msrs
            .iter()
            .find(|(a, _)| *a == address)
            .map_or(0, |(_, value)| *value)
    }

    /// A row's values before a TD configures any.
    pub(crate) fn base_cpuid(&self, row: usize) -> Quad {
        let Some(r) = CPUID.get(row) else {
            return [0; 4];
        };
        let native = match r.leaf {
            // Not something the row fixes, but the model the platform was given.
            1 => {
                let mut native = self.native_cpuid(1, 0);
                native[EAX] = self.fms;
                native
            }
            leaf => self.native_cpuid(leaf, r.subleaf),
        };
        core::array::from_fn(|i| native[i] & !r.fixed0[i] | r.fixed1[i])
    }

    /// The bits of a configurable sub-leaf that TDH.SYS.RD and TDH.SYS.INFO report: those the host may choose,
    /// and of those it may clear the ones this CPU has.
    #[must_use]
    pub fn reported_cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let Some(row) = cpuid_index(leaf, subleaf) else {
            return [0; 4];
        };
        let base = self.base_cpuid(row);
        let r = &CPUID[row];
        core::array::from_fn(|i| r.config_direct[i] | r.allow_direct[i] & base[i])
    }
}

/// Inputs of the values.
pub(crate) struct Wanted<'a> {
    pub(crate) cfg: &'a PlatformConfig,
    pub(crate) attributes: u64,
    pub(crate) xfam: u64,
    pub(crate) tsc_frequency: u16,
    /// The host's choice, in the order of the platform's configurable sub-leaves.
    pub(crate) config: &'a [Quad],
}

impl Wanted<'_> {
    fn has_xfam(&self, bit: u32) -> bool {
        self.xfam >> bit & 1 != 0
    }

    fn has(&self, attribute: u64) -> bool {
        self.attributes & attribute != 0
    }

    /// The values, checked row by row.
    pub(crate) fn values(&self) -> Result<Box<Values>, Refused> {
        let mut values = Box::new([[0; 4]; ROWS]);
        for row in 0..ROWS.min(CPUID.len()) {
            values[row] = self.configured(row)?;
            self.apply_rules(row, &mut values)?;
        }
        self.topology(&mut values).map_err(|()| Refused {
            status: Code::CPUID_LEAF_1F_FORMAT_UNRECOGNIZED.status(),
            row: None,
        })?;
        Ok(values)
    }

    fn refused(row: usize) -> Refused {
        let r = &CPUID[row];
        Refused {
            status: Code::OPERAND_INVALID.on(Operand::CPUID_CONFIG),
            row: Some(u64::from(r.leaf) | u64::from(r.subleaf) << 32),
        }
    }

    /// The host's choice for a row, if it has one.
    fn chosen(&self, row: usize) -> Option<(Quad, Quad)> {
        let r = &CPUID[row];
        let configs = &self.cfg.cpuid_configs;
        let at = configs
            .iter()
            .position(|c| r.configurable && (c.leaf, c.subleaf) == (r.leaf, r.subleaf))?;
        Some((self.config.get(at).copied()?, configs[at].permitted))
    }

    fn configured(&self, row: usize) -> Result<Quad, Refused> {
        let r = &CPUID[row];
        let mut values = self.cfg.base_cpuid(row);
        let Some((chosen, permitted)) = self.chosen(row) else {
            return Ok(values);
        };
        if chosen.iter().zip(permitted).any(|(c, mask)| c & !mask != 0) {
            return Err(Self::refused(row));
        }
        for i in 0..4 {
            let direct = r.config_direct[i];
            values[i] = values[i] & !direct | chosen[i] & direct;
            values[i] &= !(r.allow_direct[i] & !chosen[i]);
        }
        Ok(values)
    }

    /// Clears what belongs to state components the TD does not have.
    fn apply_xfam(&self, row: usize, values: &mut Quad) {
        let r = &CPUID[row];
        let lacking = XFAM
            .iter()
            .filter(|x| (x.leaf, x.subleaf) == (r.leaf, r.subleaf) && !self.has_xfam(x.xfam_bit));
        for x in lacking {
            for (value, mask) in values.iter_mut().zip(x.mask) {
                *value &= !mask;
            }
        }
    }

    fn apply_rules(&self, row: usize, all: &mut Values) -> Result<(), Refused> {
        let r = &CPUID[row];
        let perfmon = self.has(ATTR_PERFMON);
        self.apply_xfam(row, &mut all[row]);
        let monitor = all[LEAF_1][ECX] >> 3 & 1 != 0;
        let perfmon_ext = all[LEAF_7_1][EAX] >> 8 & 1 != 0;
        let v = &mut all[row];
        let keep_if = |v: &mut Quad, condition: bool| {
            if !condition {
                *v = [0; 4];
            }
        };
        match (r.leaf, r.subleaf) {
            (1, _) => {
                let native = self.cfg.fms;
                if v[EAX] == 0 {
                    v[EAX] = native;
                }
                if !self.is_allowed_fms(v[EAX]) {
                    return Err(Self::refused(row));
                }
            }
            (5, _) => keep_if(v, monitor),
            (7, 0) => self.leaf_7(row, v)?,
            (7, 1) => v[EAX] = v[EAX] & !(1 << 6) | u32::from(self.has(ATTR_LASS)) << 6,
            (0xA, _) => keep_if(v, perfmon),
            (0xD, 0) => v[ECX] = self.xsave_size(),
            (0xD, 1) => {
                const XFD: u32 = 1 << 4;
                if !self.has_xfd() {
                    v[EAX] &= !XFD;
                }
            }
            (0xD, n) => keep_if(v, self.has_xfam(n)),
            (0x14, _) => keep_if(v, self.has_xfam(XFAM_PT)),
            (0x15, _) => v[EBX] = u32::from(self.tsc_frequency),
            (0x19, _) => *v = [0; 4],
            (0x1A, _) => keep_if(v, !self.has(ATTR_MIGRATABLE)),
            (0x1C, _) => keep_if(v, self.has_xfam(XFAM_LBR)),
            (0x1D, _) => keep_if(v, self.xfam & XFAM_AMX == XFAM_AMX),
            (0x23, _) => keep_if(v, perfmon && perfmon_ext),
            (0x8000_0008, _) => {
                let la57 = all[LEAF_7_0][ECX] >> 16 & 1 != 0;
                let bits = if la57 { 57 } else { 48 };
                all[row][EAX] = all[row][EAX] & !0xFF00 | bits << 8;
            }
            _ => {}
        }
        Ok(())
    }

    /// The native family/model/stepping, or for a TD that may migrate a lower stepping.
    fn is_allowed_fms(&self, eax: u32) -> bool {
        let native = self.cfg.fms;
        let stepping = |v: u32| v & 0xF;
        eax == native
            || self.has(ATTR_MIGRATABLE)
                && eax >> 4 == native >> 4
                && stepping(eax) < stepping(native)
    }

    fn leaf_7(&self, row: usize, v: &mut Quad) -> Result<(), Refused> {
        const PKS: u32 = 31;
        const KEY_LOCKER: u32 = 23;
        let (hle, rtm) = (v[EBX] >> 4 & 1, v[EBX] >> 11 & 1);
        if hle != rtm {
            return Err(Self::refused(row));
        }
        if hle != 0 && self.cfg.native_msr(IA32_ARCH_CAPABILITIES) & TSX_CTRL == 0 {
            return Err(Refused {
                status: Code::INCORRECT_MSR_VALUE.detail(IA32_ARCH_CAPABILITIES),
                row: None,
            });
        }
        v[ECX] &= !(1 << PKS | 1 << KEY_LOCKER);
        v[ECX] |= u32::from(self.has(ATTR_PKS)) << PKS;
        Ok(())
    }

    /// Some state component of the TD faults on first use (CPUID D.n ECX bit 2).
    fn has_xfd(&self) -> bool {
        has_xfd(self.cfg, self.xfam)
    }

    /// Size in bytes of an XSAVE area, in the standard format, for all of the TD's user components.
    fn xsave_size(&self) -> u32 {
        xsave_size(self.cfg, self.xfam)
    }

    /// Leaf 1F, and leaf B which follows from it. The error is an unrecognised format.
    fn topology(&self, all: &mut Values) -> Result<(), ()> {
        let first = cpuid_index(0x1F, 0).ok_or(())?;
        let subleaves = first..first + 6;
        if all[first] == [0; 4] {
            if subleaves.clone().any(|row| all[row] != [0; 4]) {
                return Err(());
            }
            for (subleaf, row) in (0..).zip(subleaves.clone()) {
                all[row] = self.cfg.native_cpuid(0x1F, subleaf);
            }
        }
        leaf_b(all)
    }
}

/// Fills leaf B from leaf 1F, which must list level types in ascending order, with a core level.
pub(crate) fn leaf_b(all: &mut Values) -> Result<(), ()> {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    const TYPES: u32 = 6;
    let first = cpuid_index(0x1F, 0).ok_or(())?;
    let b = cpuid_index(0xB, 0).ok_or(())?;
    let level_type = |v: &Quad| v[ECX] >> 8 & 0xFF;
    let (mut previous, mut seen_core) = (0, false);
    let mut smt = [0; 4];
    for values in &all[first..first + 6] {
        let values = *values;
        let kind = level_type(&values);
        if kind == 0 {
            break;
        }
        if kind <= previous || kind >= TYPES {
            return Err(());
        }
        if kind == SMT {
            smt = values;
        }
        seen_core |= kind == CORE;
        previous = kind;
    }
    if !seen_core {
        return Err(());
    }
    // The module takes the last sub-leaf there is, whether it describes a level or not.
    let mut last = all[first + 5];
    last[ECX] = last[ECX] & !0xFF00 | CORE << 8;
    all[b] = smt;
    all[b + 1] = last;
    Ok(())
}

/// Rows that other rules look at.
pub(crate) const LEAF_1: usize = 0;
pub(crate) const LEAF_7_0: usize = 5;
const LEAF_7_1: usize = 6;

pub(crate) fn has_xfd(cfg: &PlatformConfig, xfam: u64) -> bool {
    (2..63).any(|n| xfam >> n & 1 != 0 && cfg.native_cpuid(0xD, n)[ECX] >> 2 & 1 != 0)
}

/// Size in bytes of an XSAVE area, in the standard format, for the user components of a mask.
pub(crate) fn xsave_size(cfg: &PlatformConfig, components: u64) -> u32 {
    const LEGACY_AND_HEADER: u32 = 576;
    (2..63)
        .filter(|n| components >> n & 1 != 0)
        .map(|n| cfg.native_cpuid(0xD, n))
        .filter(|d| d[ECX] & 1 == 0)
        .map(|d| d[EBX].saturating_add(d[EAX]))
        .fold(LEGACY_AND_HEADER, u32::max)
}

/// Features that follow from the values.
pub(crate) fn flags(all: &Values) -> Flags {
    let bit = |row: usize, register: usize, bit: u32| all[row][register] >> bit & 1 != 0;
    Flags {
        dca: bit(LEAF_1, ECX, 18),
        tsc_deadline: bit(LEAF_1, ECX, 24),
        tsx: bit(LEAF_7_0, EBX, 4),
        waitpkg: bit(LEAF_7_0, ECX, 5),
        tme: bit(LEAF_7_0, ECX, 13),
        pconfig: bit(LEAF_7_0, EDX, 18),
    }
}
