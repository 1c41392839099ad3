//! Rules of the control registers that hold on every x86 processor.

use crate::{Error, Field, Result};

/// CR0 bits by the names of SDM vol. 3, 2.5.
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits that no processor defines: all but VME to SMXE (0-14), FSGSBASE to UINTR (16-25),
/// LASS (27), LAM_SUP (28) and FRED (32).
const CR4_RESERVED: u64 = !(0x7fff | 0x3ff << 16 | 0b11 << 27 | 1 << 32);

/// Whether a value may stand in CR0: upper half clear, PG only with PE, NW only with CD.
pub const fn cr0_is_valid(value: u64) -> bool {
    value >> 32 == 0
        && (value & cr0::PG == 0 || value & cr0::PE != 0)
        && (value & cr0::NW == 0 || value & cr0::CD != 0)
}

/// Whether a value may stand in CR4, as far as no CPUID is needed to tell.
pub const fn cr4_is_valid(value: u64) -> bool {
    value & CR4_RESERVED == 0
}

/// An exception vector, checked.
///
/// # Errors
/// [`Error::Invalid`] for a vector above 31.
pub const fn exception_vector(vector: u8) -> Result<u8> {
    if vector > 31 {
        return Err(Error::Invalid(Field::Vector, vector as u64));
    }
    Ok(vector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cr0_needs_pe_for_pg_and_cd_for_nw() {
        for pe in [0, cr0::PE] {
            for pg in [0, cr0::PG] {
                for (nw, cd) in [(0, 0), (0, cr0::CD), (cr0::NW, 0), (cr0::NW, cr0::CD)] {
                    let expected = (pg == 0 || pe != 0) && (nw == 0 || cd != 0);
                    assert_eq!(cr0_is_valid(pe | pg | nw | cd), expected);
                }
            }
        }
        assert!(!cr0_is_valid(1 << 32));
    }

    #[test]
    fn cr4_has_no_reserved_bit() {
        for bit in 0..64 {
            let defined = !matches!(bit, 15 | 26 | 29..=31 | 33..);
            assert_eq!(cr4_is_valid(1 << bit), defined, "bit {bit}");
        }
    }
}
