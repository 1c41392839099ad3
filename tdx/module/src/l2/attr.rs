//! Attributes of a page for one VM, and of all VMs in one register.

/// Permissions of an L2 VM on a page (GPA attributes of the TDX module ABI, 16 bits a VM).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Attributes(u16);

impl Attributes {
    const READ: u16 = 1;
    const WRITE: u16 = 1 << 1;
    const EXECUTE_SUPERVISOR: u16 = 1 << 2;
    const EXECUTE_USER: u16 = 1 << 3;
    const PAGING_WRITE: u16 = 1 << 5;
    const SUPPRESS_VE: u16 = 1 << 7;
    const RESERVED: u16 = 0x7F00;
    const VALID: u16 = 1 << 15;
    const PERMISSIONS: u16 =
        Self::READ | Self::WRITE | Self::EXECUTE_SUPERVISOR | Self::EXECUTE_USER;

    /// No alias.
    pub(crate) const ZERO: Attributes = Attributes(0);
    /// A valid part without any attribute.
    pub(crate) const NONE: Attributes = Attributes(Self::VALID);
    /// Attributes that a table shows: all permissions.
    pub(crate) const TABLE: Attributes = Attributes(Self::VALID | Self::PERMISSIONS);

    /// From bits 7:0, valid.
    pub(crate) const fn from_bits(bits: u8) -> Self {
        Attributes(Self::VALID | bits as u16)
    }

    /// Bits 7:0.
    pub(crate) const fn bits(self) -> u8 {
        self.0 as u8
    }

    /// All 16 bits.
    pub(crate) const fn raw(self) -> u16 {
        self.0
    }

    pub(crate) const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    pub(crate) const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Some permission; without any, there is no alias.
    pub(crate) const fn is_present(self) -> bool {
        self.0 & Self::PERMISSIONS != 0
    }

    /// A combination the processor can express and the module allows.
    pub(crate) const fn is_legal(self) -> bool {
        let readable = self.0 & Self::READ != 0;
        self.0 & (Self::RESERVED | Self::SUPPRESS_VE) == 0
            && (readable || self.0 & (Self::WRITE | Self::PAGING_WRITE) == 0)
    }

    /// The attributes that `mask` selects.
    pub(crate) const fn masked(self, mask: u16) -> Self {
        Attributes(self.0 & (mask | Self::VALID))
    }

    /// `self` with the bits of `mask` taken from `new`.
    pub(crate) const fn merged(self, new: Attributes, mask: u16) -> Self {
        let mask = mask | Self::VALID;
        Attributes(self.0 & !mask | new.0 & mask)
    }
}

/// The attributes of L1 (always 0) and three L2 VMs, as registers carry them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Packed(pub(crate) u64);

impl Packed {
    pub(crate) const fn of(self, vm: usize) -> Attributes {
        Attributes(self.part(vm))
    }

    /// The 16 bits of a VM.
    pub(crate) const fn part(self, vm: usize) -> u16 {
        (self.0 >> (16 * (vm & 3))) as u16
    }

    pub(crate) const fn with(self, vm: usize, attributes: Attributes) -> Self {
        let shift = 16 * (vm & 3);
        Packed(self.0 & !(0xFFFF << shift) | (attributes.0 as u64) << shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_and_paging_writes_need_reading_and_nothing_else_is_tied() {
        for bits in 0..=u8::MAX {
            let a = Attributes::from_bits(bits);
            let bit = |n: u32| bits >> n & 1 == 1;
            let legal = !bit(7) && (bit(0) || !bit(1) && !bit(5));
            assert_eq!(a.is_legal(), legal, "{bits:#x}");
        }
        assert!(!Attributes(0x8101).is_legal());
    }

    #[test]
    fn a_merge_takes_exactly_the_masked_bits() {
        let old = Attributes::from_bits(0x5A);
        let new = Attributes::from_bits(0xFF);
        assert_eq!(old.merged(new, 0x0F).bits(), 0x5F);
        assert!(old.merged(new, 0).is_valid());
        assert!(!old.merged(Attributes::default(), 0).is_valid());
    }

    #[test]
    fn parts_of_a_register_are_independent() {
        let p = Packed(0)
            .with(1, Attributes::TABLE)
            .with(3, Attributes::NONE);
        assert_eq!(p.0, 0x8000_0000_800F_0000);
        assert!(p.of(0).is_zero() && p.of(2).is_zero());
        assert_eq!(p.with(1, Attributes::default()).0, 0x8000_0000_0000_0000);
    }
}
