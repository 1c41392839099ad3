//! One definition for a structure, its table of fields and the assertions on its layout.

use std::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A field of a command buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, as the structure has it.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
    /// True if the firmware writes it.
    pub out: bool,
}

/// The fields of a structure that [`layout!`] declared.
pub trait Layout {
    /// Every field but the reserved ones.
    const FIELDS: &'static [Field];
}

/// A type that a field of a structure can have.
pub(crate) trait Wire: Sized {
    /// The value of a field that is not mentioned.
    const DEFAULT: Self;
    /// The length that the structure around it must have, if the field says one.
    const LENGTH: Option<u32> = None;
}

macro_rules! plain {
    ($($ty:ty = $default:expr),*) => { $(impl Wire for $ty { const DEFAULT: Self = $default; })* };
}
plain!(u8 = 0, U16 = U16::ZERO, U32 = U32::ZERO, U64 = U64::ZERO);

impl<T: Wire, const N: usize> Wire for [T; N] {
    const DEFAULT: Self = [T::DEFAULT; N];
}

/// Reserved bytes. They are zero, unless the structure was read from bytes that are not.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct Reserved<const N: usize>([u8; N]);

impl<const N: usize> Wire for Reserved<N> {
    const DEFAULT: Self = Self([0; N]);
}

impl<const N: usize> Default for Reserved<N> {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl<const N: usize> fmt::Debug for Reserved<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.iter().all(|byte| *byte == 0) {
            true => f.write_str("0"),
            false => write!(f, "{:x?}", self.0),
        }
    }
}

/// The length of the structure that it stands in, which is its default: `N` bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct Length<const N: u32>(U32);

impl<const N: u32> Length<N> {
    /// Any length; the firmware refuses one that is not the structure's.
    pub const fn from_raw(bytes: u32) -> Self {
        Self(U32::new(bytes))
    }

    /// The number of bytes.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    pub(crate) const fn is_right(self) -> bool {
        self.get() == N
    }
}

impl<const N: u32> Wire for Length<N> {
    const DEFAULT: Self = Self::from_raw(N);
    const LENGTH: Option<u32> = Some(N);
}

impl<const N: u32> Default for Length<N> {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl<const N: u32> fmt::Debug for Length<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.get())
    }
}

/// Declares a structure: name, size, and for each field `offset direction name: type`. The
/// direction is `in`, `out`, `inout`, or `_` for reserved bytes. Size, offsets and the value of a
/// [`Length`] are asserted when the crate is compiled. A name alone is a structure without bytes.
macro_rules! layout {
    ($($(#[$doc:meta])* $Name:ident;)+) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes)]
        #[derive(zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(C)]
        pub struct $Name;

        impl $crate::command::Layout for $Name {
            const FIELDS: &'static [$crate::command::Field] = &[];
        }
    )+ };
    (
        $(#[$doc:meta])*
        $Name:ident $size:literal {
            $($(#[$about:meta])* $offset:literal $direction:tt $field:ident: $ty:ty,)+
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes)]
        #[derive(zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(C)]
        pub struct $Name {
            $(
                $(#[$about])*
                #[doc = $crate::command::layout::about!($offset $direction)]
                pub $field: $ty,
            )+
        }

        const _: () = {
            assert!(size_of::<$Name>() == $size);
            $(assert!(core::mem::offset_of!($Name, $field) == $offset);)+
            $(if let Some(length) = <$ty as $crate::command::layout::Wire>::LENGTH {
                assert!(length == $size);
            })+
        };

        impl Default for $Name {
            fn default() -> Self {
                Self { $($field: <$ty as $crate::command::layout::Wire>::DEFAULT,)+ }
            }
        }

        impl $crate::command::Layout for $Name {
            const FIELDS: &'static [$crate::command::Field] =
                $crate::command::layout::fields!($Name [] $($direction $field: $ty,)+);
        }
    };
}

/// The last line of a field's documentation.
macro_rules! about {
    ($offset:literal in) => {
        concat!("\n\nIn, at offset ", stringify!($offset), ".")
    };
    ($offset:literal out) => {
        concat!("\n\nOut, at offset ", stringify!($offset), ".")
    };
    ($offset:literal inout) => {
        concat!("\n\nIn and out, at offset ", stringify!($offset), ".")
    };
    ($offset:literal _) => {
        concat!("Reserved, at offset ", stringify!($offset), ".")
    };
}

/// The table of fields, without the reserved ones.
macro_rules! fields {
    ($Name:ident [$($done:expr,)*]) => { &[$($done),*] };
    ($Name:ident [$($done:expr,)*] _ $field:ident: $ty:ty, $($rest:tt)*) => {
        $crate::command::layout::fields!($Name [$($done,)*] $($rest)*)
    };
    ($Name:ident [$($done:expr,)*] in $field:ident: $ty:ty, $($rest:tt)*) => {
        $crate::command::layout::fields!($Name [
            $($done,)* $crate::command::layout::field!($Name $field: $ty, false),
        ] $($rest)*)
    };
    ($Name:ident [$($done:expr,)*] $out:ident $field:ident: $ty:ty, $($rest:tt)*) => {
        $crate::command::layout::fields!($Name [
            $($done,)* $crate::command::layout::field!($Name $field: $ty, true),
        ] $($rest)*)
    };
}

macro_rules! field {
    ($Name:ident $field:ident: $ty:ty, $out:literal) => {
        $crate::command::Field {
            name: stringify!($field),
            offset: core::mem::offset_of!($Name, $field),
            len: size_of::<$ty>(),
            out: $out,
        }
    };
}

pub(crate) use {about, field, fields, layout};
