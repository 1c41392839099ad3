//! `TdParams` to TD_PARAMS, the structure that TDH.MNG.INIT reads (TDX module ABI, "TD_PARAMS").
//!
//! Everything is checked here against what the module allows, so that an error names the value; the
//! module, which names an operand at best, is not asked.

use kvm_ops::{CpuidEntry, Error, Field, Gpaw, Result, TdParams};

use crate::limits::Limits;

/// Bytes of the structure, which is also its alignment.
pub(crate) const SIZE: usize = 1024;

/// Units of TSC_FREQUENCY, in kHz.
const TSC_UNIT_KHZ: u32 = 25_000;
/// The lowest and highest TSC_FREQUENCY: 100 MHz to 10 GHz.
const TSC_UNITS: (u32, u32) = (4, 400);

const ATTRIBUTE_DEBUG: u64 = 1 << 0;
const ATTRIBUTE_MIGRATABLE: u64 = 1 << 29;
const ATTRIBUTE_PERFMON: u64 = 1 << 63;

/// CONFIG_FLAGS bit 0: the GPAW is 52.
const FLAG_GPAW: u64 = 1 << 0;
/// CONFIG_FLAGS bit 2: TDG.VP.VMCALL leaves the host's RBP alone.
const FLAG_NO_RBP_MOD: u64 = 1 << 2;

/// EPTP_CONTROLS bits 2:0: write-back memory.
const EPTP_WRITE_BACK: u64 = 6;

/// Offsets of the fields.
mod offset {
    pub(super) const ATTRIBUTES: usize = 0;
    pub(super) const XFAM: usize = 8;
    pub(super) const MAX_VCPUS: usize = 16;
    pub(super) const EPTP_CONTROLS: usize = 24;
    pub(super) const CONFIG_FLAGS: usize = 32;
    pub(super) const TSC_FREQUENCY: usize = 40;
    pub(super) const MRCONFIGID: usize = 80;
    pub(super) const MROWNER: usize = 128;
    pub(super) const MROWNERCONFIG: usize = 176;
    pub(super) const CPUID: usize = 256;
}

/// The structure, as it goes into memory.
///
/// # Errors
/// [`Error::Invalid`] names what the module does not allow: for bit masks the bits that are wrong.
pub(crate) fn encode(params: &TdParams, vcpus: u32, limits: &Limits) -> Result<[u8; SIZE]> {
    check_attributes(params.attributes, limits.attributes)?;
    check_xfam(params.xfam, limits.xfam)?;
    let max_vcpus = match u16::try_from(vcpus) {
        Ok(n) if n > 0 && vcpus <= limits.max_vcpus => n,
        _ => return Err(Error::Invalid(Field::VcpuCount, vcpus.into())),
    };
    let tsc = tsc_units(params.tsc_khz)?;
    let (gpaw, levels) = match params.gpaw {
        Gpaw::Bits48 => (0, 4),
        Gpaw::Bits52 if limits.config_flags & FLAG_GPAW == 0 => {
            return Err(Error::Invalid(Field::Gpaw, 52));
        }
        Gpaw::Bits52 => (FLAG_GPAW, 5),
    };
    let rbp = if params.no_rbp_mod {
        FLAG_NO_RBP_MOD
    } else {
        0
    };
    let flags = gpaw | limits.config_flags & rbp;

    let mut image = [0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset::ATTRIBUTES, &params.attributes.to_le_bytes());
    put(offset::XFAM, &params.xfam.to_le_bytes());
    put(offset::MAX_VCPUS, &max_vcpus.to_le_bytes());
    let eptp: u64 = EPTP_WRITE_BACK | (levels - 1) << 3;
    put(offset::EPTP_CONTROLS, &eptp.to_le_bytes());
    put(offset::CONFIG_FLAGS, &flags.to_le_bytes());
    put(offset::TSC_FREQUENCY, &tsc.to_le_bytes());
    put(offset::MRCONFIGID, &params.mrconfigid);
    put(offset::MROWNER, &params.mrowner);
    put(offset::MROWNERCONFIG, &params.mrownerconfig);
    for (n, entry) in params.cpuid.iter().enumerate() {
        let row = cpuid_row(entry, limits)?;
        if params.cpuid[..n]
            .iter()
            .any(|e| cpuid_row(e, limits) == Ok(row))
        {
            return Err(Error::Exists(Field::CpuidLeaf, cpuid_name(entry)));
        }
        for (i, register) in entry.regs.iter().enumerate() {
            put(offset::CPUID + row * 16 + i * 4, &register.to_le_bytes());
        }
    }
    Ok(image)
}

/// Bits that may not be set, and bits that must be and are not.
const fn wrong_bits(value: u64, (may, must): (u64, u64)) -> u64 {
    value & !may | must & !value
}

fn check_attributes(attributes: u64, allowed: (u64, u64)) -> Result<()> {
    let mut wrong = wrong_bits(attributes, allowed);
    // A TD that can move to another machine can be neither debugged nor counted (ABI, ATTRIBUTES).
    if attributes & ATTRIBUTE_MIGRATABLE != 0 {
        wrong |= attributes & (ATTRIBUTE_DEBUG | ATTRIBUTE_PERFMON);
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(Error::Invalid(Field::TdAttributes, wrong)),
    }
}

/// XFAM has the rules of XCR0 and IA32_XSS (SDM vol. 1, 13.3): some bits come together only.
fn check_xfam(xfam: u64, allowed: (u64, u64)) -> Result<()> {
    let mut wrong = wrong_bits(xfam, allowed);
    let bits = |mask: u64| xfam & mask;
    for together in [0b11, 0b111 << 5, 0b11 << 11, 0b11 << 17] {
        if bits(together) != 0 && bits(together) != together {
            wrong |= bits(together);
        }
    }
    // AVX-512 needs AVX.
    if bits(1 << 5) != 0 && bits(1 << 2) == 0 {
        wrong |= 1 << 5;
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(Error::Invalid(Field::Xfam, wrong)),
    }
}

fn tsc_units(khz: u32) -> Result<u16> {
    let units = khz / TSC_UNIT_KHZ;
    let in_range = (TSC_UNITS.0..=TSC_UNITS.1).contains(&units);
    match u16::try_from(units) {
        Ok(units) if in_range && khz.is_multiple_of(TSC_UNIT_KHZ) => Ok(units),
        _ => Err(Error::Invalid(Field::TscKhz, khz.into())),
    }
}

/// Leaf in bits 31:0, sub-leaf in bits 63:32, as the module names rows.
fn cpuid_name(entry: &CpuidEntry) -> u64 {
    u64::from(entry.leaf) | u64::from(entry.subleaf) << 32
}

/// The row of TD_PARAMS that an entry goes to.
fn cpuid_row(entry: &CpuidEntry, limits: &Limits) -> Result<usize> {
    let found = limits.cpuid.iter().position(|row| {
        row.leaf == entry.leaf && row.subleaf.is_none_or(|subleaf| subleaf == entry.subleaf)
    });
    let Some(row) = found else {
        return Err(Error::Invalid(Field::CpuidLeaf, cpuid_name(entry)));
    };
    let allowed = entry
        .regs
        .iter()
        .zip(limits.cpuid[row].mask)
        .all(|(value, mask)| value & !mask == 0);
    if !allowed {
        return Err(Error::Invalid(Field::CpuidBits, cpuid_name(entry)));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CpuidRow;
    use std::vec;
    use std::vec::Vec;

    fn limits() -> Limits {
        let row = |leaf, subleaf, mask| CpuidRow {
            leaf,
            subleaf,
            mask,
        };
        Limits {
            tdcs_pages: 6,
            tdvps_pages: 6,
            attributes: (0x8000_0000_7000_0001, 0),
            xfam: (0x6_dbe7, 3),
            config_flags: 0b101,
            max_vcpus: 576,
            cpuid: vec![
                row(1, None, [0xfff, 0, 0, 0]),
                row(4, Some(0), [u32::MAX; 4]),
                row(4, Some(1), [0, 1, 2, 3]),
            ],
        }
    }

    fn refused(params: &TdParams, vcpus: u32) -> Error {
        encode(params, vcpus, &limits()).unwrap_err()
    }

    #[test]
    fn rbp_is_the_hosts_unless_the_embedder_gives_it_to_the_guest() {
        let flags = |no_rbp_mod, limits: &Limits| {
            let params = TdParams {
                no_rbp_mod,
                ..TdParams::default()
            };
            encode(&params, 1, limits).unwrap()[offset::CONFIG_FLAGS]
        };
        let without = Limits {
            config_flags: FLAG_GPAW,
            ..limits()
        };
        assert_eq!((flags(true, &limits()), flags(false, &limits())), (4, 0));
        assert_eq!(flags(true, &without), 0);
    }

    #[test]
    fn each_value_that_the_module_does_not_allow_is_named() {
        let ok = TdParams::default();
        for vcpus in [0, 577, 65536, u32::MAX] {
            let error = Error::Invalid(Field::VcpuCount, vcpus.into());
            assert_eq!(refused(&ok, vcpus), error);
        }
        for (attributes, wrong) in [
            (1 << 1, 1 << 1),
            (0b111, 0b110),
            (1 << 29 | 1, 1),
            (1 << 63 | 1 << 29, 1 << 63),
        ] {
            let params = TdParams {
                attributes,
                ..ok.clone()
            };
            assert_eq!(
                refused(&params, 1),
                Error::Invalid(Field::TdAttributes, wrong)
            );
        }
        for (xfam, wrong) in [
            (0, 3),
            (1, 2 | 1),
            (3 | 1 << 10, 1 << 10),
            (3 | 1 << 5, 1 << 5),
            (7 | 1 << 6, 1 << 6),
            (3 | 7 << 5, 1 << 5),
            (3 | 1 << 11, 1 << 11),
            (3 | 1 << 18, 1 << 18),
        ] {
            let params = TdParams { xfam, ..ok.clone() };
            assert_eq!(refused(&params, 1), Error::Invalid(Field::Xfam, wrong));
        }
        for khz in [0, 24_999, 75_000, 100_001, 10_025_000, u32::MAX] {
            let params = TdParams {
                tsc_khz: khz,
                ..ok.clone()
            };
            assert_eq!(
                refused(&params, 1),
                Error::Invalid(Field::TscKhz, khz.into())
            );
        }
        let wide = TdParams {
            gpaw: Gpaw::Bits52,
            ..ok.clone()
        };
        let narrow = Limits {
            config_flags: 0,
            ..limits()
        };
        assert_eq!(
            encode(&wide, 1, &narrow).unwrap_err(),
            Error::Invalid(Field::Gpaw, 52)
        );
    }

    fn entry(leaf: u32, subleaf: u32, regs: [u32; 4]) -> CpuidEntry {
        CpuidEntry {
            leaf,
            subleaf,
            subleaf_significant: true,
            regs,
        }
    }

    fn with_cpuid(cpuid: Vec<CpuidEntry>) -> Result<[u8; SIZE]> {
        let params = TdParams {
            cpuid,
            ..TdParams::default()
        };
        encode(&params, 1, &limits())
    }

    #[test]
    fn cpuid_values_go_to_the_row_of_their_leaf_or_are_refused_by_name() {
        let image = with_cpuid(vec![
            entry(4, 1, [0, 1, 2, 3]),
            // A leaf without sub-leaves takes any.
            entry(1, 9, [0x123, 0, 0, 0]),
        ])
        .unwrap();
        assert_eq!(image[256..260], 0x123u32.to_le_bytes());
        assert_eq!(image[260..256 + 32], [0; 28]);
        let row: Vec<u8> = [0u32, 1, 2, 3]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        assert_eq!(image[256 + 32..256 + 48], row);

        let refused = |cpuid| with_cpuid(cpuid).unwrap_err();
        assert_eq!(
            refused(vec![entry(4, 2, [0; 4])]),
            Error::Invalid(Field::CpuidLeaf, 2 << 32 | 4)
        );
        assert_eq!(
            refused(vec![entry(4, 1, [1, 0, 0, 0])]),
            Error::Invalid(Field::CpuidBits, 1 << 32 | 4)
        );
        assert_eq!(
            refused(vec![entry(1, 0, [0; 4]), entry(1, 1, [0; 4])]),
            Error::Exists(Field::CpuidLeaf, 1 << 32 | 1)
        );
    }

    #[test]
    fn every_allowed_frequency_and_width_is_encoded_as_the_abi_says() {
        for units in 4..=400u16 {
            let params = TdParams {
                tsc_khz: u32::from(units) * 25_000,
                ..TdParams::default()
            };
            let image = encode(&params, 576, &limits()).unwrap();
            assert_eq!(image[40..42], units.to_le_bytes());
            assert_eq!(image[16..18], 576u16.to_le_bytes());
            assert_eq!((image[24], image[32]), (0x1e, 0b100));
        }
        let params = TdParams {
            gpaw: Gpaw::Bits52,
            mrconfigid: [1; 48],
            mrowner: [2; 48],
            mrownerconfig: [3; 48],
            ..TdParams::default()
        };
        let image = encode(&params, 1, &limits()).unwrap();
        assert_eq!((image[24], image[32]), (0x26, 0b101));
        assert_eq!(image[80..128], [1; 48]);
        assert_eq!(image[128..176], [2; 48]);
        assert_eq!(image[176..224], [3; 48]);
    }
}
