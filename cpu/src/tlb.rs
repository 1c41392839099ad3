//! The software TLB: linear pages to host pointers.
//!
//! This module and the frame access of `physical.rs` are the only ones that touch host memory. An
//! entry's pointer comes from a [`Frame`](crate::Frame), whose maker promised that it stays valid
//! until the bus is dropped (the processor owns the bus) or its generation changes (the
//! processor flushes then, before anything else).

use alloc::boxed::Box;
use alloc::vec;
use core::ptr::NonNull;

const SIZE: usize = 1024;
const SETS: usize = 4;
/// No page has this number, as tags have zeros in the low 12 bits.
const NONE: u64 = u64::MAX;

/// The sets: which rights the entries of each were checked for.
pub(crate) const SUPERVISOR: usize = 0;
pub(crate) const USER: usize = 1;
/// Supervisor accesses with SMAP overridden by EFLAGS.AC.
pub(crate) const SUPERVISOR_AC: usize = 2;
/// Never filled, so every access is slow and can check alignment.
pub(crate) const CHECKED: usize = 3;

#[derive(Clone, Copy)]
struct Entry {
    read: u64,
    write: u64,
    /// Host address minus linear address.
    addend: usize,
    gpa: u64,
}

const EMPTY: Entry = Entry {
    read: NONE,
    write: NONE,
    addend: 0,
    gpa: NONE,
};

pub(crate) struct Tlb {
    sets: Box<[[Entry; SIZE]; SETS]>,
    /// Lowest and highest linear address mapped by large pages since the last flush.
    large: (u64, u64),
}

/// Reads `N` bytes (1, 2, 4 or 8) as a little-endian number.
///
/// # Safety
///
/// `N` bytes at `host` must be readable.
#[inline(always)]
pub(crate) unsafe fn load<const N: usize>(host: *const u8) -> u64 {
    // SAFETY: the caller promises the bytes; `read_unaligned` needs no alignment.
    unsafe {
        match N {
            1 => u64::from(host.read()),
            2 => u64::from(u16::from_le(host.cast::<u16>().read_unaligned())),
            4 => u64::from(u32::from_le(host.cast::<u32>().read_unaligned())),
            _ => u64::from_le(host.cast::<u64>().read_unaligned()),
        }
    }
}

/// Writes the low `N` bytes (1, 2, 4 or 8) of `value`, little-endian.
///
/// # Safety
///
/// `N` bytes at `host` must be writable.
#[inline(always)]
pub(crate) unsafe fn store<const N: usize>(host: *mut u8, value: u64) {
    // SAFETY: the caller promises the bytes; `write_unaligned` needs no alignment.
    unsafe {
        match N {
            1 => host.write(value as u8),
            2 => host.cast::<u16>().write_unaligned((value as u16).to_le()),
            4 => host.cast::<u32>().write_unaligned((value as u32).to_le()),
            _ => host.cast::<u64>().write_unaligned(value.to_le()),
        }
    }
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            sets: Self::empty(),
            large: (NONE, 0),
        }
    }

    fn empty() -> Box<[[Entry; SIZE]; SETS]> {
        // On the heap at once: the array is too large for a stack.
        match vec![[EMPTY; SIZE]; SETS].into_boxed_slice().try_into() {
            Ok(sets) => sets,
            Err(_) => unreachable!("the vector has as many sets as the array"),
        }
    }

    #[inline(always)]
    fn entry(&self, set: usize, linear: u64) -> &Entry {
        &self.sets[set & 3][(linear >> 12) as usize % SIZE]
    }

    #[inline(always)]
    pub(crate) fn load<const N: usize>(&self, set: usize, linear: u64) -> Option<u64> {
        let e = self.entry(set, linear);
        if e.read == linear.wrapping_add(N as u64 - 1) & !0xfff {
            let host = e.addend.wrapping_add(linear as usize) as *const u8;
            // SAFETY: first and last byte are in the page of the tag, which `fill` tied to a
            // readable frame; flushes remove entries before their frame goes (module text).
            Some(unsafe { load::<N>(host) })
        } else {
            None
        }
    }

    /// Sixteen bytes of one page, as two numbers.
    pub(crate) fn load_pair(&self, set: usize, linear: u64) -> (Option<u64>, Option<u64>) {
        (
            self.load::<8>(set, linear),
            self.load::<8>(set, linear.wrapping_add(8)),
        )
    }

    /// A load from a page that may be written too.
    #[inline(always)]
    pub(crate) fn load_writable<const N: usize>(&self, set: usize, linear: u64) -> Option<u64> {
        let e = self.entry(set, linear);
        let last = linear.wrapping_add(N as u64 - 1) & !0xfff;
        if e.write == last {
            self.load::<N>(set, linear)
        } else {
            None
        }
    }

    #[inline(always)]
    pub(crate) fn store<const N: usize>(&mut self, set: usize, linear: u64, value: u64) -> bool {
        let e = self.entry(set, linear);
        if e.write == linear.wrapping_add(N as u64 - 1) & !0xfff {
            let host = e.addend.wrapping_add(linear as usize) as *mut u8;
            // SAFETY: as in `load`; a write tag is given to writable frames only.
            unsafe { store::<N>(host, value) };
            true
        } else {
            false
        }
    }

    fn span(&self, set: usize, linear: u64, write: bool) -> Option<(*mut u8, usize)> {
        let e = self.entry(set, linear);
        let tag = if write { e.write } else { e.read };
        (tag == linear & !0xfff).then(|| {
            let host = e.addend.wrapping_add(linear as usize) as *mut u8;
            (host, 4096 - (linear as usize & 0xfff))
        })
    }

    /// Bytes from `linear` to the end of its page, if the page has the tag.
    pub(crate) fn room(&self, set: usize, linear: u64, write: bool) -> Option<usize> {
        self.span(set, linear, write).map(|(_, room)| room)
    }

    /// Writes `pattern` (1 to 8 bytes) `count` times, as far as the page reaches.
    pub(crate) fn fill_bytes(&mut self, set: usize, linear: u64, pattern: &[u8], count: usize) {
        let Some((host, room)) = self.span(set, linear, true) else {
            return;
        };
        for i in 0..count.min(room / pattern.len().max(1)) {
            let at = host.wrapping_add(i * pattern.len());
            // SAFETY: `(i + 1) * pattern.len()` is at most `room`, so the bytes are in the page
            // of a write tag; `pattern` is no guest memory.
            unsafe { core::ptr::copy_nonoverlapping(pattern.as_ptr(), at, pattern.len()) };
        }
    }

    /// Copies `len` bytes between two pages with tags; false if that is not possible or if the
    /// bytes overlap.
    pub(crate) fn copy_apart(&mut self, set: usize, from: u64, to: u64, len: usize) -> bool {
        let (Some((source, a)), Some((target, b))) =
            (self.span(set, from, false), self.span(set, to, true))
        else {
            return false;
        };
        if len > a || len > b || (source as usize).abs_diff(target as usize) < len {
            return false;
        }
        // SAFETY: both ranges are inside of pages with a read and a write tag, and apart.
        unsafe { core::ptr::copy_nonoverlapping(source, target, len) };
        true
    }

    /// Ties a page to a frame. `write` gives it the write tag.
    pub(crate) fn fill(
        &mut self,
        set: usize,
        linear: u64,
        gpa: u64,
        host: NonNull<u8>,
        write: bool,
    ) {
        if set == CHECKED {
            return;
        }
        let page = linear & !0xfff;
        let addend = (host.as_ptr().expose_provenance()).wrapping_sub(page as usize);
        let tag = if write { page } else { NONE };
        self.sets[set & 3][(page >> 12) as usize % SIZE] = Entry {
            read: page,
            write: tag,
            addend,
            gpa: gpa & !0xfff,
        };
    }

    pub(crate) fn note_large(&mut self, linear: u64, size: u64) {
        let start = linear & !(size - 1);
        self.large.0 = self.large.0.min(start);
        self.large.1 = self.large.1.max(start + (size - 1));
    }

    pub(crate) fn flush(&mut self) {
        for set in &mut self.sets[..3] {
            set.fill(EMPTY);
        }
        self.large = (NONE, 0);
    }

    /// Forgets one linear page, or everything if it may be part of a large page.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        if (self.large.0..=self.large.1).contains(&linear) {
            return self.flush();
        }
        for set in &mut self.sets[..3] {
            set[(linear >> 12) as usize % SIZE] = EMPTY;
        }
    }

    /// Takes the write tags of a frame away.
    pub(crate) fn protect(&mut self, gpa: u64) {
        for e in self
            .sets
            .iter_mut()
            .flatten()
            .filter(|e| e.gpa == gpa & !0xfff)
        {
            e.write = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_serves_its_page_and_nothing_across_its_end() {
        let mut frame = vec![0u8; 4096];
        frame[4095] = 7;
        let host = NonNull::new(frame.as_mut_ptr()).expect("not null");
        let mut tlb = Tlb::new();
        tlb.fill(SUPERVISOR, 0x5000, 0x9000, host, false);
        assert_eq!(tlb.load::<1>(SUPERVISOR, 0x5fff), Some(7));
        assert_eq!(tlb.load::<2>(SUPERVISOR, 0x5fff), None);
        assert_eq!(tlb.load::<1>(USER, 0x5fff), None);
        assert_eq!(
            tlb.load::<1>(SUPERVISOR, 0x5000 + (SIZE as u64) * 4096),
            None
        );
        assert!(!tlb.store::<1>(SUPERVISOR, 0x5000, 1));
        tlb.fill(SUPERVISOR, 0x5000, 0x9000, host, true);
        assert!(tlb.store::<8>(SUPERVISOR, 0x5ff8, 9));
        tlb.protect(0x9000);
        assert!(!tlb.store::<8>(SUPERVISOR, 0x5ff8, 9));
        tlb.flush_page(0x5000);
        assert_eq!(tlb.load::<1>(SUPERVISOR, 0x5fff), None);
    }
}
