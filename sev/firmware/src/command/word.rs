//! Numbers whose values are checked when they are made, as types of fields.

/// Declares a field type around a little-endian number, with `from_raw` for values that the firmware
/// is to refuse and a getter. The type's `new`, which checks, is written beside it.
macro_rules! word {
    ($(#[$doc:meta])* $Name:ident($wire:ty), $int:ty, $get:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes)]
        #[derive(zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(transparent)]
        pub struct $Name($wire);

        impl $Name {
            /// Any value, unchecked: for buffers that the firmware is to refuse.
            pub const fn from_raw(value: $int) -> Self {
                Self(<$wire>::new(value))
            }

            /// The value.
            pub const fn $get(self) -> $int {
                self.0.get()
            }
        }

        impl $crate::command::layout::Wire for $Name {
            const DEFAULT: Self = Self::from_raw(0);
        }

        impl core::fmt::Debug for $Name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.$get())
            }
        }
    };
}
pub(crate) use word;
