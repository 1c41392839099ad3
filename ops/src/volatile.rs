//! Copies between memory that a guest uses at the same time and memory of Rust.
//!
//! The guest changes its memory at any time, so no reference may point there. These functions go by
//! raw pointers and atomic accesses, as a guest's processor of the software platform does. Up to 8 bytes that are
//! aligned in guest memory are one access: a ring index, for example, is never read half old and half new. Loads
//! acquire and stores release.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, fence};

/// The widest access that is aligned at `address` and no longer than `left` bytes.
const fn width(address: usize, left: usize) -> usize {
    let mut width = 8;
    while !address.is_multiple_of(width) || width > left {
        width /= 2;
    }
    width
}

/// Copies `into.len()` bytes from guest memory.
///
/// ```
/// let guest = [1_u8, 2, 3];
/// let mut copy = [0; 3];
/// // SAFETY: the array is there, and nothing writes it.
/// unsafe { kvm_ops::volatile::copy_from(guest.as_ptr(), &mut copy) };
/// assert_eq!(copy, guest);
/// ```
///
/// # Safety
/// The bytes from `source` on are mapped and readable during the call, and no Rust reference through
/// which they could change exists.
pub unsafe fn copy_from(source: *const u8, into: &mut [u8]) {
    let mut done = 0;
    while done < into.len() {
        let rest = &mut into[done..];
        let at = source.wrapping_add(done).cast_mut();
        let width = width(at as usize, rest.len());
        // SAFETY: `width` bytes from `at` on lie in the range that the caller promises, and `at` is
        // aligned to them. Relaxed loads of up to 8 bytes may be from memory that is readable only
        // (`core::sync::atomic`, "Atomic accesses to read-only memory").
        let value = unsafe {
            match width {
                8 => AtomicU64::from_ptr(at.cast()).load(Relaxed).to_le(),
                4 => AtomicU32::from_ptr(at.cast()).load(Relaxed).to_le().into(),
                2 => AtomicU16::from_ptr(at.cast()).load(Relaxed).to_le().into(),
                _ => AtomicU8::from_ptr(at).load(Relaxed).into(),
            }
        };
        fence(Acquire);
        rest[..width].copy_from_slice(&value.to_le_bytes()[..width]);
        done += width;
    }
}

/// Copies `from` to guest memory.
///
/// ```
/// let mut guest = [0_u8; 3];
/// // SAFETY: the array is there, and no reference to it is used meanwhile.
/// unsafe { kvm_ops::volatile::copy_to(guest.as_mut_ptr(), &[1, 2, 3]) };
/// assert_eq!(guest, [1, 2, 3]);
/// ```
///
/// # Safety
/// The bytes from `destination` on are mapped and writable during the call, and no Rust reference to
/// them exists.
pub unsafe fn copy_to(destination: *mut u8, from: &[u8]) {
    let mut done = 0;
    while done < from.len() {
        let rest = &from[done..];
        let at = destination.wrapping_add(done);
        let width = width(at as usize, rest.len());
        // SAFETY: `width` bytes from `at` on lie in the range that the caller promises, and `at` is
        // aligned to them.
        unsafe {
            match *rest {
                [a, b, c, d, e, f, g, h, ..] if width == 8 => AtomicU64::from_ptr(at.cast())
                    .store(u64::from_ne_bytes([a, b, c, d, e, f, g, h]), Release),
                [a, b, c, d, ..] if width == 4 => {
                    AtomicU32::from_ptr(at.cast()).store(u32::from_ne_bytes([a, b, c, d]), Release);
                }
                [a, b, ..] if width == 2 => {
                    AtomicU16::from_ptr(at.cast()).store(u16::from_ne_bytes([a, b]), Release);
                }
                _ => AtomicU8::from_ptr(at).store(rest[0], Release),
            }
        }
        done += width;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_as_wide_as_alignment_and_length_allow() {
        for (address, left, expected) in [
            (0, 8, 8),
            (8, 100, 8),
            (4, 100, 4),
            (0, 7, 4),
            (0, 3, 2),
            (6, 8, 2),
            (7, 8, 1),
            (0, 1, 1),
        ] {
            assert_eq!(width(address, left), expected, "{address} {left}");
        }
    }

    #[test]
    fn every_place_and_length_is_copied_and_nothing_beside_it() {
        #[repr(align(8))]
        struct Memory([u8; 40]);
        let mut bytes = [0; 40];
        (1..).zip(&mut bytes).for_each(|(n, byte)| *byte = n);
        for at in 0..10 {
            for len in 0..28 {
                let mut copy = [0; 28];
                let source = Memory(bytes);
                // SAFETY: `at + len` is below 40; nothing else uses the array meanwhile.
                unsafe { copy_from(source.0.as_ptr().add(at), &mut copy[..len]) };
                assert_eq!(copy[..len], bytes[at..at + len]);
                assert!(copy[len..].iter().all(|byte| *byte == 0));

                let mut target = Memory([0; 40]);
                // SAFETY: as above.
                unsafe { copy_to(target.0.as_mut_ptr().add(at), &bytes[..len]) };
                assert_eq!(target.0[at..at + len], bytes[..len]);
                let beside = target.0[..at].iter().chain(&target.0[at + len..]);
                assert!({ beside }.all(|byte| *byte == 0));
            }
        }
    }
}
