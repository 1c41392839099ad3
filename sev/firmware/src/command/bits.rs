//! Words of single bits, as types that hold no reserved ones by accident.

use thiserror::Error;

/// Errors of putting a value into a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FieldError {
    /// The value has bits that the field reserves.
    #[error("{field} {value:#x} has the reserved bits {bits:#x}")]
    Reserved {
        /// The type of the field.
        field: &'static str,
        /// The value.
        value: u64,
        /// The reserved bits in it.
        bits: u64,
    },
    /// The value lacks bits that must be 1.
    #[error("{field} {value:#x} lacks the bits {bits:#x}, which must be 1")]
    Missing {
        /// The type of the field.
        field: &'static str,
        /// The value.
        value: u64,
        /// The bits that it lacks.
        bits: u64,
    },
    /// The number has no meaning in the field.
    #[error("{field} {value:#x} does not exist")]
    Unknown {
        /// The type of the field.
        field: &'static str,
        /// The value.
        value: u64,
    },
    /// The address is not that of a page.
    #[error("address {address:#x} is not a multiple of {align:#x}")]
    Unaligned {
        /// The address.
        address: u64,
        /// The size of the page.
        align: u64,
    },
}

/// Declares a word of bits: its name, the integer it is made of, the bits that must be 1, the bits
/// of subfields that the type has functions for, and `NAME = position` for each single bit.
macro_rules! bits {
    (
        $(#[$doc:meta])*
        $Name:ident: $int:ty, ones $ones:literal, subfields $subfields:literal {
            $($(#[$about:meta])* $BIT:ident = $position:literal,)*
        }
    ) => {
        $(#[$doc])*
        ///
        /// Made with `|` from its bits, or from a number with `new`, which refuses reserved ones.
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes)]
        #[derive(zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(transparent)]
        pub struct $Name([u8; size_of::<$int>()]);

        impl $Name {
            $($(#[$about])* pub const $BIT: Self = Self::from_raw($ones | 1 << $position);)*

            /// Bits that must be 1.
            pub const ONES: $int = $ones;
            /// Every bit that is not reserved.
            pub const DEFINED: $int = $ones | $subfields $(| 1 << $position)*;

            /// These bits; the error names those that are reserved or missing.
            pub const fn new(bits: $int) -> Result<Self, $crate::command::FieldError> {
                let word = Self::from_raw(bits);
                let (field, value) = (stringify!($Name), bits as u64);
                match (word.reserved(), word.missing()) {
                    (0, 0) => Ok(word),
                    (0, missing) => Err($crate::command::FieldError::Missing {
                        field,
                        value,
                        bits: missing as u64,
                    }),
                    (reserved, _) => Err($crate::command::FieldError::Reserved {
                        field,
                        value,
                        bits: reserved as u64,
                    }),
                }
            }

            /// Any bits, reserved ones too: for buffers that the firmware is to refuse.
            pub const fn from_raw(bits: $int) -> Self {
                Self(bits.to_le_bytes())
            }

            /// The bits.
            pub const fn bits(self) -> $int {
                <$int>::from_le_bytes(self.0)
            }

            /// Returns true if every bit of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.bits() & other.bits() == other.bits()
            }

            /// Reserved bits that are set.
            pub(crate) const fn reserved(self) -> $int {
                self.bits() & !Self::DEFINED
            }

            /// Bits that must be 1 and are not.
            pub(crate) const fn missing(self) -> $int {
                Self::ONES & !self.bits()
            }
        }

        impl Default for $Name {
            fn default() -> Self {
                Self::from_raw(Self::ONES)
            }
        }

        impl $crate::command::layout::Wire for $Name {
            const DEFAULT: Self = Self::from_raw(Self::ONES);
        }

        impl From<$Name> for $int {
            fn from(word: $Name) -> $int {
                word.bits()
            }
        }

        impl core::ops::BitOr for $Name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self::from_raw(self.bits() | other.bits())
            }
        }

        impl core::fmt::Debug for $Name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.bits())
            }
        }
    };
}
pub(crate) use bits;
