//! Addresses, frames, page levels and the shared-GPA mask.
//!
//! A [`Gfn`] never carries the bit that tells private from shared memory:
//! [`SharedMask::split`] is the only way from a [`Gpa`] a guest used to a `Gfn`.

use core::fmt;

/// Bytes in a 4 KiB page.
pub const PAGE_SIZE: u64 = 4096;

const PAGE_SHIFT: u32 = 12;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $label:literal) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw value.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($label, "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// A guest-physical address as a guest uses it: it may carry the shared bit (TDX) or the
    /// C-bit (SEV).
    Gpa, "Gpa"
}
address! {
    /// A guest frame number: a guest-physical address in units of 4 KiB, without any mask bit.
    Gfn, "Gfn"
}
address! {
    /// A host-physical address, in bytes.
    Hpa, "Hpa"
}
address! {
    /// A host page frame number: a host-physical address in units of 4 KiB.
    Pfn, "Pfn"
}

macro_rules! frame_of {
    ($frame:ident, $addr:ident) => {
        impl $frame {
            /// The frame that contains `addr`.
            #[inline]
            pub const fn containing(addr: $addr) -> Self {
                Self(addr.0 >> PAGE_SHIFT)
            }

            /// The address of the frame's first byte. `None` where it does not fit in 64 bits.
            #[inline]
            pub const fn base(self) -> Option<$addr> {
                if self.0 >> (64 - PAGE_SHIFT) != 0 {
                    return None;
                }
                Some($addr(self.0 << PAGE_SHIFT))
            }

            /// The frame `frames` further on. `None` on overflow.
            #[inline]
            pub const fn checked_add(self, frames: u64) -> Option<Self> {
                match self.0.checked_add(frames) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// True if the frame starts a page of `level`.
            #[inline]
            pub const fn is_aligned(self, level: Level) -> bool {
                self.0 & (level.frames() - 1) == 0
            }
        }

        impl $addr {
            /// The address `bytes` further on. `None` on overflow.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// True if the address starts a 4 KiB page.
            #[inline]
            pub const fn is_page_aligned(self) -> bool {
                self.0 & (PAGE_SIZE - 1) == 0
            }
        }
    };
}
frame_of!(Gfn, Gpa);
frame_of!(Pfn, Hpa);

/// The size of a page, or the level of the table entry that maps it.
///
/// The numbers are those of the TDX module's ABI (0 for 4 KiB; SDM vol. 3 counts from 1).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// A 4 KiB page.
    Size4K = 0,
    /// A 2 MiB page.
    Size2M = 1,
    /// A 1 GiB page.
    Size1G = 2,
    /// An entry that covers 512 GiB. It maps tables only.
    Size512G = 3,
    /// An entry of a 5-level table's root, 256 TiB. It maps tables only.
    Size256T = 4,
}

impl Level {
    /// Every level, smallest first.
    pub const ALL: [Level; 5] = [
        Self::Size4K,
        Self::Size2M,
        Self::Size1G,
        Self::Size512G,
        Self::Size256T,
    ];

    /// The number of 4 KiB frames that an entry of this level covers.
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << (9 * self as u32)
    }

    /// The number of bytes that an entry of this level covers.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.frames() << PAGE_SHIFT
    }

    /// The next larger level.
    #[inline]
    pub const fn parent(self) -> Option<Level> {
        match self {
            Self::Size4K => Some(Self::Size2M),
            Self::Size2M => Some(Self::Size1G),
            Self::Size1G => Some(Self::Size512G),
            Self::Size512G => Some(Self::Size256T),
            Self::Size256T => None,
        }
    }
}

/// The owner of a guest-physical page: the guest alone, or guest and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privacy {
    /// Only the guest can read it.
    Private,
    /// Guest and host both read and write it. All memory of a normal VM is shared.
    Shared,
}

impl fmt::Display for Privacy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Private => "private",
            Self::Shared => "shared",
        })
    }
}

/// The bit of a guest-physical address that tells private from shared, with its polarity.
///
/// TDX sets bit 47 or 51 for *shared* (GPAW 48 or 52; TDX module ABI, "GPA width"); SEV sets the
/// C-bit for *private* (APM vol. 2, 15.34); a normal VM has no such bit, and all its memory is
/// shared. The mask is read once when a VM is created and kept as a plain field, because a
/// dispatched call for each address would cost more than the mask itself.
///
/// ```
/// use kvm_ops_core::{Gpa, Gfn, Privacy, SharedMask};
/// let td = SharedMask::shared_bit(47).unwrap();
/// let gpa = Gpa::new(1 << 47 | 0x5000);
/// assert_eq!(td.split(gpa), (Gfn::new(5), Privacy::Shared));
/// assert_eq!(td.join(Gfn::new(5), Privacy::Shared), Some(Gpa::new(1 << 47 | 0x5000)));
/// assert_eq!(SharedMask::NONE.split(Gpa::new(0x5000)), (Gfn::new(5), Privacy::Shared));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedMask {
    bit: u64,
    /// The meaning of the bit when it is set.
    set: Privacy,
}

impl SharedMask {
    /// A normal VM: no mask bit, everything shared.
    pub const NONE: Self = Self {
        bit: 0,
        set: Privacy::Private,
    };

    /// TDX polarity: the bit set means shared. `None` unless `bit` is 12 to 63.
    #[inline]
    pub const fn shared_bit(bit: u32) -> Option<Self> {
        Self::with(bit, Privacy::Shared)
    }

    /// SEV polarity: the bit set means private. `None` unless `bit` is 12 to 63.
    #[inline]
    pub const fn private_bit(bit: u32) -> Option<Self> {
        Self::with(bit, Privacy::Private)
    }

    const fn with(bit: u32, set: Privacy) -> Option<Self> {
        if bit < PAGE_SHIFT || bit > 63 {
            return None;
        }
        Some(Self { bit: 1 << bit, set })
    }

    /// The mask as a GPA bit; 0 for a normal VM. Linux calls it `gfn_direct_bits` (as a gfn).
    #[inline]
    pub const fn bits(self) -> u64 {
        self.bit
    }

    /// Splits what the guest used into the frame and the kind of access.
    #[inline]
    pub const fn split(self, gpa: Gpa) -> (Gfn, Privacy) {
        let gfn = Gfn((gpa.0 & !self.bit) >> PAGE_SHIFT);
        let privacy = match (gpa.0 & self.bit != 0, self.set) {
            (true, Privacy::Shared) | (false, Privacy::Private) => Privacy::Shared,
            (true, Privacy::Private) | (false, Privacy::Shared) => Privacy::Private,
        };
        (gfn, privacy)
    }

    /// The address by which the guest reaches `gfn` with that privacy.
    ///
    /// `None` where there is none: the frame does not fit, it runs into the mask bit, or a normal
    /// VM was asked for private memory.
    #[inline]
    pub const fn join(self, gfn: Gfn, privacy: Privacy) -> Option<Gpa> {
        let Some(base) = gfn.base() else { return None };
        if base.0 & self.bit != 0 {
            return None;
        }
        match (privacy, self.set) {
            (Privacy::Private, _) if self.bit == 0 => None,
            (Privacy::Shared, Privacy::Shared) | (Privacy::Private, Privacy::Private) => {
                Some(Gpa(base.0 | self.bit))
            }
            (Privacy::Shared, Privacy::Private) | (Privacy::Private, Privacy::Shared) => Some(base),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_and_join_are_inverse_for_both_polarities_and_every_bit() {
        for bit in 12..64 {
            for mask in [
                SharedMask::shared_bit(bit).unwrap(),
                SharedMask::private_bit(bit).unwrap(),
            ] {
                for privacy in [Privacy::Private, Privacy::Shared] {
                    let frames = 1 << (bit - 12);
                    for gfn in [0, 1, 0x1234, frames - 1]
                        .into_iter()
                        .filter(|gfn| *gfn < frames)
                    {
                        let gfn = Gfn::new(gfn);
                        let gpa = mask.join(gfn, privacy).unwrap();
                        assert_eq!(mask.split(gpa), (gfn, privacy), "bit {bit} {gpa}");
                    }
                }
                assert_eq!(mask.join(Gfn::new(1 << (bit - 12)), Privacy::Shared), None);
            }
        }
        for bit in [0, 11, 64, u32::MAX] {
            assert_eq!(SharedMask::shared_bit(bit), None);
            assert_eq!(SharedMask::private_bit(bit), None);
        }
    }

    #[test]
    fn a_normal_vm_has_only_shared_memory() {
        for gpa in [0, 0xfff, 1 << 47, u64::MAX] {
            assert_eq!(
                SharedMask::NONE.split(Gpa::new(gpa)),
                (Gfn::new(gpa >> 12), Privacy::Shared)
            );
        }
        assert_eq!(SharedMask::NONE.join(Gfn::new(1), Privacy::Private), None);
        assert_eq!(
            SharedMask::NONE.join(Gfn::new(1), Privacy::Shared),
            Some(Gpa::new(0x1000))
        );
    }

    #[test]
    fn frames_that_do_not_fit_and_sums_that_overflow_are_refused() {
        assert_eq!(Gfn::new(1 << 52).base(), None);
        assert_eq!(Gfn::new((1 << 52) - 1).base(), Some(Gpa::new(!0xfff)));
        assert_eq!(Gfn::new(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
    }

    #[test]
    fn levels_cover_what_the_tables_cover() {
        let bytes: [u64; 5] = [1 << 12, 1 << 21, 1 << 30, 1 << 39, 1 << 48];
        for (level, bytes) in Level::ALL.into_iter().zip(bytes) {
            assert_eq!(level.bytes(), bytes);
            assert_eq!(level.frames() * 4096, bytes);
            assert!(Gfn::new(level.frames()).is_aligned(level));
            assert!(level == Level::Size4K || !Gfn::new(1).is_aligned(level));
        }
    }
}
