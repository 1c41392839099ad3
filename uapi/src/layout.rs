//! The declaration of a structure with its size and the offset of every field.

/// Structures are packed and little-endian, so that any bytes of the right length are one. Padding
/// is a field.
macro_rules! layout {
    ($(#[$doc:meta])* $Name:ident $size:literal { $($offset:literal $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
        #[derive(zerocopy::KnownLayout, zerocopy::Unaligned)]
        #[repr(C)]
        #[allow(missing_docs)] // Each is the field of its name in the kernel's header.
        pub struct $Name { $(pub $field: $ty,)* }

        impl Default for $Name {
            /// All bytes zero.
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }

        const _: () = {
            assert!(core::mem::size_of::<$Name>() == $size);
            $(assert!(core::mem::offset_of!($Name, $field) == $offset);)*
        };
    };
}

pub(crate) use layout;
