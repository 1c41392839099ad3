//! Memory that the program lends to its guests.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};

use kvm_ops::HostRange;
use kvm_ops_softkvm::FileMemory;
use libc::{c_int, c_void, off_t};

use crate::own::{self, Own, own};
use crate::{files, raw};

/// Addresses, from the first to the one behind the last.
type Range = (u64, u64);

/// What the program lent, and what it is taking away.
#[derive(Default)]
pub(crate) struct Book {
    lent: BTreeSet<Range>,
    leaving: Vec<Range>,
}

fn book(own: &Own) -> MutexGuard<'_, Book> {
    own.book.lock().unwrap_or_else(PoisonError::into_inner)
}

fn range(address: u64, bytes: u64) -> Range {
    (address, address.saturating_add(bytes))
}

const fn meet(a: Range, b: Range) -> bool {
    a.0 < b.1 && b.0 < a.1
}

/// A line of /proc/self/maps: addresses, and the rights that come first.
fn mapping(line: &str) -> Option<(Range, bool, bool)> {
    let (addresses, rest) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let range = (number(start)?, number(end)?);
    let rights = rest.as_bytes();
    Some((
        range,
        rights.first() == Some(&b'r'),
        rights.get(1) == Some(&b'w'),
    ))
}

/// True if all of a range can be read now, and written if that is asked for.
fn is_accessible((mut next, end): Range, writable: bool) -> bool {
    let Ok(maps) = std::fs::read("/proc/self/maps") else {
        return false;
    };
    for ((start, stop), reads, writes) in String::from_utf8_lossy(&maps).lines().filter_map(mapping)
    {
        if stop <= next {
            continue;
        }
        if start > next || !reads || writable && !writes {
            return false;
        }
        next = stop;
        if next >= end {
            return true;
        }
    }
    false
}

/// Lends memory of the program to its guest.
pub(crate) fn lend(address: u64, bytes: u64, writable: bool) -> Option<HostRange> {
    let wanted = range(address, bytes);
    let mut book = book(own());
    // What is being taken away is there still, but not for long.
    if book.leaving.iter().any(|leaving| meet(*leaving, wanted)) || !is_accessible(wanted, writable)
    {
        return None;
    }
    book.lent.insert(wanted);
    // SAFETY: the program gives the range to its guest, and it can be accessed now. No reference of ours is to it. Guests
    // lose it in front of every function of libc that takes it away. A program that takes it away otherwise takes the
    // signal for that, as one whose own code uses it.
    unsafe { HostRange::new(address, bytes) }.ok()
}

/// Takes memory away from the program by a function, and from guests before.
pub(crate) fn take_away<T>(address: u64, bytes: u64, function: impl FnOnce() -> T) -> T {
    let Some(own) = own::found() else {
        return function();
    };
    let gone = range(address, bytes);
    let is_lent = {
        let mut book = book(own);
        book.leaving.push(gone);
        let before = book.lent.len();
        book.lent.retain(|lent| !meet(*lent, gone));
        book.lent.len() != before
    };
    if is_lent {
        files::invalidate(address, bytes);
    }
    let result = function();
    let mut book = book(own);
    if let Some(place) = book.leaving.iter().position(|leaving| *leaving == gone) {
        book.leaving.swap_remove(place);
    }
    result
}

/// Our mapping of a guest_memfd.
struct Mapping(HostRange);

/// Maps part of a guest_memfd.
pub(crate) fn map(fd: c_int, offset: u64, bytes: u64) -> Option<Arc<dyn FileMemory>> {
    let len = usize::try_from(bytes).ok()?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let at = std::ptr::null_mut();
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let at: *mut c_void = unsafe { raw::mmap(at, len, prot, flags, fd, offset as off_t) };
    if at == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the mapping is this value's, which the slot keeps until it is taken back, and nothing else
    // refers to it.
    let range = unsafe { HostRange::new(at as u64, bytes) }.ok()?;
    Some(Arc::new(Mapping(range)))
}

impl FileMemory for Mapping {
    fn range(&self) -> HostRange {
        self.0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let args = [self.0.address(), self.0.bytes(), 0, 0, 0, 0];
        // SAFETY: our mapping, which no slot has any more.
        unsafe { raw::syscall(libc::SYS_munmap, args) };
    }
}
