//! Places of the program's mappings in a run that is recorded, or served from a record: the same in both, though the library
//! itself maps more in one than in the other. So a program that hands addresses of its own to its guest finds them in a replay.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_void, size_t};

use crate::clock;

/// The system puts nothing between here and there by itself: programs and libraries are loaded above, or far below.
const FIRST: u64 = 1 << 44;
const END: u64 = 1 << 46;
/// As aligned as huge pages are.
const ALIGNMENT: u64 = 2 << 20;

/// The place to ask for, if the system is free to choose one and there is a record. The system chooses another one if it is taken.
pub(crate) fn wish(address: *mut c_void, len: size_t, flags: c_int) -> *mut c_void {
    static NEXT: AtomicU64 = AtomicU64::new(FIRST);
    if !address.is_null() || flags & (libc::MAP_FIXED | libc::MAP_32BIT) != 0 || !clock::is_on() {
        return address;
    }
    let bytes = (len as u64).checked_next_multiple_of(ALIGNMENT);
    let take = |next: u64| next.checked_add(bytes?).filter(|end| *end <= END);
    match NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
        Ok(place) => ptr::without_provenance_mut(place as usize),
        Err(_) => address,
    }
}
