//! Segment registers and descriptors.

/// A segment register: ES, CS, SS, DS, FS, GS in the order of the encoding, or LDTR and TR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Visible part.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, expanded by the granularity.
    pub limit: u32,
    /// Access rights in the format of the VMCS: type in bits 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13,
    /// D/B 14, G 15, unusable 16.
    pub rights: u32,
}

/// Index of each segment register.
pub(crate) const ES: usize = 0;
pub(crate) const CS: usize = 1;
pub(crate) const SS: usize = 2;
pub(crate) const FS: usize = 4;
pub(crate) const GS: usize = 5;

impl Segment {
    /// A segment that holds no descriptor.
    pub(crate) const fn null(selector: u16) -> Self {
        Self {
            selector,
            base: 0,
            limit: 0,
            rights: 1 << 16,
        }
    }

    /// A segment of real mode: base from the selector, 64 KiB, accessed.
    pub(crate) const fn real(selector: u16, code: bool) -> Self {
        let base = (selector as u64) << 4;
        Self {
            selector,
            base,
            limit: 0xffff,
            rights: if code { 0x9b } else { 0x93 },
        }
    }

    /// Reads the 8 bytes of a descriptor.
    pub(crate) const fn from_descriptor(selector: u16, low: u64) -> Self {
        let base = (low >> 16 & 0xff_ffff) | (low >> 56 & 0xff) << 24;
        let raw = (low & 0xffff | (low >> 32 & 0xf_0000)) as u32;
        let granular = low >> 55 & 1 != 0;
        let limit = if granular { raw << 12 | 0xfff } else { raw };
        let rights = (low >> 40 & 0xff | (low >> 52 & 0xf) << 12) as u32;
        Self {
            selector,
            base,
            limit,
            rights,
        }
    }

    pub(crate) const fn usable(&self) -> bool {
        self.rights & 1 << 16 == 0
    }

    pub(crate) const fn present(&self) -> bool {
        self.rights & 1 << 7 != 0
    }

    pub(crate) const fn dpl(&self) -> u8 {
        (self.rights >> 5 & 3) as u8
    }

    pub(crate) const fn kind(&self) -> u8 {
        (self.rights & 15) as u8
    }

    /// True for code and data, false for system descriptors.
    pub(crate) const fn is_memory(&self) -> bool {
        self.rights & 1 << 4 != 0
    }

    pub(crate) const fn is_code(&self) -> bool {
        self.is_memory() && self.rights & 8 != 0
    }

    pub(crate) const fn conforming(&self) -> bool {
        self.rights & 4 != 0
    }

    /// Writable data.
    pub(crate) const fn writable(&self) -> bool {
        self.is_memory() && self.rights & 8 == 0 && self.rights & 2 != 0
    }

    /// Data, or code that can be read.
    pub(crate) const fn readable(&self) -> bool {
        self.is_memory() && (self.rights & 8 == 0 || self.rights & 2 != 0)
    }

    /// L: 64-bit code.
    pub(crate) const fn long(&self) -> bool {
        self.rights & 1 << 13 != 0
    }

    /// D/B: 32-bit code or stack.
    pub(crate) const fn big(&self) -> bool {
        self.rights & 1 << 14 != 0
    }

    /// True if `size` bytes at `offset` are inside of the limit.
    pub(crate) const fn contains(&self, offset: u64, size: u64) -> bool {
        let last = offset + (size - 1);
        if self.rights & 0x1c == 0x14 {
            let top = if self.big() { u32::MAX as u64 } else { 0xffff };
            offset > self.limit as u64 && last <= top
        } else {
            last <= self.limit as u64
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_descriptor() {
        let s = Segment::from_descriptor(8, 0x00cf_9b00_0000_ffff);
        assert_eq!((s.base, s.limit, s.dpl()), (0, u32::MAX, 0));
        assert!(s.is_code() && s.present() && s.big() && !s.long());
    }

    #[test]
    fn expand_down_segments_hold_what_is_above_the_limit() {
        let s = Segment {
            selector: 0,
            base: 0,
            limit: 0xfff,
            rights: 0x97 | 1 << 14,
        };
        assert!(!s.contains(0xfff, 1));
        assert!(s.contains(0x1000, 4));
        assert!(!s.contains(0xffff_fffe, 4));
    }
}
