//! Addresses of pages, and the permissions of VMPLs.

use super::FieldError;
use super::layout::Wire;
use super::word;
use crate::machine::entry::{PageSize, permission};
use std::fmt;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

word! {
    /// System physical address of a 4 KiB page, with or without the C-bit. A multiple of 0x1000.
    #[derive(PartialOrd, Ord)]
    PageAddress(U64), u64, get
}

impl PageAddress {
    /// This address, if it is that of a page.
    pub const fn new(address: u64) -> Result<Self, FieldError> {
        match aligned(address, PageSize::Size4K) {
            Ok(address) => Ok(Self::from_raw(address)),
            Err(error) => Err(error),
        }
    }
}

const fn aligned(address: u64, size: PageSize) -> Result<u64, FieldError> {
    match size.aligns(address) {
        true => Ok(address),
        false => Err(FieldError::Unaligned {
            address,
            align: size.bytes(),
        }),
    }
}

word! {
    /// PAGE_PADDR in bits 63:12 and PAGE_SIZE in bit 0 of one word, as PAGE_RECLAIM and PAGE_UNSMASH
    /// have them.
    SizedPage(U64), u64, raw
}

impl SizedPage {
    /// The page of this size at an address that is a multiple of it.
    pub fn new(address: u64, size: PageSize) -> Result<Self, FieldError> {
        let address = aligned(address, size)?;
        Ok(Self::from_raw(
            address | u64::from(size == PageSize::Size2M),
        ))
    }

    /// The address, as it stands in the word.
    pub const fn address(self) -> u64 {
        self.raw() & !1
    }

    /// The size.
    pub const fn size(self) -> PageSize {
        PageSize::of_bit(self.raw() & 1 != 0)
    }
}

/// Permissions of one VMPL: bits of [`permission`].
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct VmplPerms(u8);

impl VmplPerms {
    /// These bits, none of which is reserved.
    pub const fn new(bits: u8) -> Result<Self, FieldError> {
        match bits & !permission::ALL {
            0 => Ok(Self(bits)),
            reserved => Err(FieldError::Reserved {
                field: "VmplPerms",
                value: bits as u64,
                bits: reserved as u64,
            }),
        }
    }

    /// Any bits, reserved ones too: for buffers that the firmware is to refuse.
    pub const fn from_raw(bits: u8) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl Wire for VmplPerms {
    const DEFAULT: Self = Self::from_raw(0);
}

impl fmt::Debug for VmplPerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_whole_pages() {
        for (address, small, large) in [
            (0, true, true),
            (0x1000, true, false),
            (0x20_0000, true, true),
            (1 << 51 | 0x20_0000, true, true),
            (0xfff, false, false),
            (u64::MAX, false, false),
        ] {
            assert_eq!(PageAddress::new(address).is_ok(), small, "{address:#x}");
            let sized = SizedPage::new(address, PageSize::Size2M);
            assert_eq!(sized.is_ok(), large, "{address:#x}");
        }
        let page = SizedPage::new(0x20_0000, PageSize::Size2M).unwrap();
        assert_eq!((page.raw(), page.address()), (0x20_0001, 0x20_0000));
        assert_eq!(page.size(), PageSize::Size2M);
        let error = SizedPage::new(0x1000, PageSize::Size2M).unwrap_err();
        let expected = "address 0x1000 is not a multiple of 0x200000";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn permissions_have_four_bits() {
        for bits in 0..=u8::MAX {
            assert_eq!(VmplPerms::new(bits).is_ok(), bits < 16, "{bits:#x}");
        }
        let error = VmplPerms::new(0x1f).unwrap_err();
        assert_eq!(
            error.to_string(),
            "VmplPerms 0x1f has the reserved bits 0x10"
        );
    }
}
