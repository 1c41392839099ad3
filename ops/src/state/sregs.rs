//! Segments, descriptor tables and control registers.

use super::{CodeSize, DescTable, Segment, SegmentName};
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

    /// True for a value that CR0 can hold: the upper half is clear, PG needs PE, and NW needs CD
    /// (`is_valid_cr0` in main.c).
    pub const fn is_valid(value: u64) -> bool {
        value >> 32 == 0
            && (value & PG == 0 || value & PE != 0)
            && (value & NW == 0 || value & CD != 0)
    }
}

/// CR4 bits (SDM vol. 3, 2.5).
pub mod cr4 {
    /// The bits that no processor defines: all but VME to SMXE (0-14), FSGSBASE to UINTR (16-25),
    /// LASS (27), LAM_SUP (28) and FRED (32).
    const RESERVED: u64 = !(0x7fff | 0x3ff << 16 | 0b11 << 27 | 1 << 32);

    /// True for a value that CR4 can hold, as far as CPUID is not needed to tell (`is_valid_cr4` in
    /// main.c).
    pub const fn is_valid(value: u64) -> bool {
        value & RESERVED == 0
    }
}

/// Segments, descriptor tables and control registers (`struct kvm_sregs`).
#[allow(missing_docs)] // Each is the register of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescTable,
    pub idt: DescTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// External interrupts that are pending in the platform, one bit a vector.
    pub interrupt_bitmap: [u64; 4],
}

impl Sregs {
    /// The current privilege level, 0 to 3: the DPL of SS (SDM vol. 3, 26.4.1; `get_cpl` in main.c).
    pub const fn cpl(&self) -> u8 {
        self.ss.dpl
    }

    /// The default operand size of the code segment.
    pub const fn code_size(&self) -> CodeSize {
        match (self.cs.l, self.cs.db) {
            (true, _) => CodeSize::Bits64,
            (false, true) => CodeSize::Bits32,
            (false, false) => CodeSize::Bits16,
        }
    }

    /// A segment register by name.
    pub const fn segment(&self, name: SegmentName) -> &Segment {
        match name {
            SegmentName::Cs => &self.cs,
            SegmentName::Ds => &self.ds,
            SegmentName::Es => &self.es,
            SegmentName::Fs => &self.fs,
            SegmentName::Gs => &self.gs,
            SegmentName::Ss => &self.ss,
            SegmentName::Tr => &self.tr,
            SegmentName::Ldt => &self.ldt,
        }
    }

    /// A segment register by name, to change.
    pub const fn segment_mut(&mut self, name: SegmentName) -> &mut Segment {
        match name {
            SegmentName::Cs => &mut self.cs,
            SegmentName::Ds => &mut self.ds,
            SegmentName::Es => &mut self.es,
            SegmentName::Fs => &mut self.fs,
            SegmentName::Gs => &mut self.gs,
            SegmentName::Ss => &mut self.ss,
            SegmentName::Tr => &mut self.tr,
            SegmentName::Ldt => &mut self.ldt,
        }
    }

    /// Checks the control registers against the rules that hold on every x86 processor.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the value of CR0 or CR4.
    ///
    /// ```
    /// use kvm_ops_core::{Error, Field, Sregs, cr0};
    /// let sregs = Sregs { cr0: cr0::PG, ..Sregs::default() }; // paging without protection
    /// assert_eq!(sregs.validate(), Err(Error::Invalid(Field::Cr0, cr0::PG)));
    /// ```
    pub const fn validate(&self) -> Result<()> {
        if !cr0::is_valid(self.cr0) {
            return Err(Error::Invalid(Field::Cr0, self.cr0));
        }
        if !cr4::is_valid(self.cr4) {
            return Err(Error::Invalid(Field::Cr4, self.cr4));
        }
        Ok(())
    }
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
                    assert_eq!(cr0::is_valid(pe | pg | nw | cd), expected);
                }
            }
        }
        assert!(!cr0::is_valid(1 << 32));
    }

    #[test]
    fn cr4_has_no_reserved_bit() {
        for bit in 0..64 {
            let defined = !matches!(bit, 15 | 26 | 29..=31 | 33..);
            assert_eq!(cr4::is_valid(1 << bit), defined, "bit {bit}");
        }
    }

    #[test]
    fn each_segment_has_one_name() {
        let mut sregs = Sregs::default();
        for (selector, name) in (1..).zip(SegmentName::ALL) {
            sregs.segment_mut(name).selector = selector;
        }
        let Sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            ..
        } = sregs;
        for (selector, segment) in (1..).zip([cs, ds, es, fs, gs, ss, tr, ldt]) {
            assert_eq!(segment.selector, selector);
        }
        for (selector, name) in (1..).zip(SegmentName::ALL) {
            assert_eq!(sregs.segment(name).selector, selector);
        }
    }
}
