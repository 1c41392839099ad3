//! The CPUID values that a TD sees, by TDH.MNG.RD.

use kvm_ops::{Error, Host, Result, Step};

use super::Td;

/// The field CPUID_VALUES (TDX module ABI, "TD-scope metadata"), of two words for each sub-leaf: EAX and
/// EBX, then ECX and EDX.
const CPUID_VALUES: u64 = 0x9410_0003_0000_0000;
/// Its code: bit 31 of the leaf, bits 6:0 of the leaf, a leaf without sub-leaves, the sub-leaf.
const EXTENDED_LEAF: u64 = 1 << 16;
const LEAF_SHIFT: u32 = 9;
const NO_SUBLEAF: u64 = 1 << 8;
const SUBLEAF_SHIFT: u32 = 1;
/// Bits of a leaf or sub-leaf that a code has room for, beside bit 31 of the leaf.
const NAMED: u32 = 0x7f;

/// The field's name for a sub-leaf, or for a leaf without sub-leaves. `None` if no code names it.
fn field(leaf: u32, subleaf: Option<u32>) -> Option<u64> {
    if leaf & !(1 << 31 | NAMED) != 0 || subleaf.is_some_and(|subleaf| subleaf > NAMED) {
        return None;
    }
    let extended = if leaf >> 31 != 0 { EXTENDED_LEAF } else { 0 };
    let leaf = u64::from(leaf & NAMED) << LEAF_SHIFT;
    let subleaf = match subleaf {
        Some(subleaf) => u64::from(subleaf) << SUBLEAF_SHIFT,
        None => NO_SUBLEAF | u64::from(NAMED) << SUBLEAF_SHIFT,
    };
    Some(CPUID_VALUES | extended | leaf | subleaf)
}

impl<H: Host> Td<H> {
    /// EAX to EDX of a sub-leaf; `None` if the module has no value for it.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: Option<u32>) -> Result<Option<[u32; 4]>> {
        self.life
            .step()
            .require_one_of(&[Step::Initialized, Step::Runnable])?;
        let Some(field) = field(leaf, subleaf) else {
            return Ok(None);
        };
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        let mut registers = [0; 4];
        for (word, pair) in (field..).zip(registers.chunks_exact_mut(2)) {
            let value = match calls.mng_rd(tdr, word).map_err(|failed| failed.error()) {
                Ok(value) => value,
                // The module has no such field.
                Err(Error::Firmware(_)) => return Ok(None),
                Err(error) => return Err(error),
            };
            (pair[0], pair[1]) = (value as u32, (value >> 32) as u32);
        }
        Ok(Some(registers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_abi() {
        for (leaf, subleaf, code) in [
            (0, None, 0x1fe),
            (1, None, 0x3fe),
            (4, Some(0), 0x800),
            (4, Some(3), 0x806),
            (7, Some(1), 0xe02),
            (0x1f, Some(5), 0x3e0a),
            (0x8000_0008, None, 0x111fe),
        ] {
            assert_eq!(field(leaf, subleaf), Some(CPUID_VALUES | code), "{leaf:#x}");
        }
        for (leaf, subleaf) in [(0x80, None), (0x4000_0000, None), (4, Some(0x80))] {
            assert_eq!(field(leaf, subleaf), None, "{leaf:#x}");
        }
    }
}
