//! The software TLB: linear pages to host pointers.
//!
//! This module and the frame access of `physical.rs` are the only ones that touch host memory, by
//! the functions of `host.rs`. An entry's pointer comes from a [`Frame`](crate::Frame), whose maker promised that it stays valid
//! until the bus is dropped (the processor owns the bus) or its generation changes (the
//! processor flushes then, before anything else).

use alloc::boxed::Box;
use alloc::vec;
use core::ptr::NonNull;

use crate::host;

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
    /// The sets that have entries.
    filled: [bool; SETS],
    /// Lowest and highest linear address mapped by large pages since the last flush.
    large: (u64, u64),
    /// Other processors use the memory at the same time.
    pub(crate) parallel: bool,
}

/// The page of the last of `N` bytes at an address; no page's number if they are not aligned.
#[inline(always)]
const fn aligned_page<const N: usize>(linear: u64) -> u64 {
    linear & (!0xfff | (N as u64 - 1))
}

/// Place of a page in a set. Pages whose distance is a multiple of the set's reach must not meet in it: kernels copy
/// themselves over such distances.
#[inline(always)]
fn slot(linear: u64) -> usize {
    (linear >> 12 ^ linear >> 22) as usize % SIZE
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            sets: Self::empty(),
            filled: [false; SETS],
            large: (NONE, 0),
            parallel: false,
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
        &self.sets[set & 3][slot(linear)]
    }

    /// A load inside of a page. Without other processors at work a misaligned one is as fast as an aligned one;
    /// beside them it is left to [`load_pieces`](Self::load_pieces).
    #[inline(always)]
    pub(crate) fn load<const N: usize>(&self, set: usize, linear: u64) -> Option<u64> {
        let e = self.entry(set, linear);
        let host = e.addend.wrapping_add(linear as usize) as *mut u8;
        if e.read == aligned_page::<N>(linear) {
            // SAFETY: the operand is aligned (a tag has zeros below the page's number), so it lies in the page of
            // the tag, which `fill` tied to a readable frame; flushes remove entries before their frame goes
            // (module text).
            Some(unsafe { host::load::<N>(host) })
        } else if !self.parallel && e.read == linear.wrapping_add(N as u64 - 1) & !0xfff {
            // SAFETY: first and last byte are in the page of the tag; for the rest as above.
            Some(unsafe { host::load_alone::<N>(host) })
        } else {
            None
        }
    }

    /// A load of `size` bytes (1 to 8) inside of a page, in pieces unless it is aligned.
    pub(crate) fn load_pieces(&self, set: usize, linear: u64, size: usize) -> Option<u64> {
        let (host, room) = self.span(set, linear, false)?;
        // SAFETY: the bytes are in the page of a read tag; for the rest as in `load`.
        (size <= room).then(|| unsafe { host::load_pieces(host, size) })
    }

    /// A store of `size` bytes (1 to 8) inside of a page, in pieces unless it is aligned.
    pub(crate) fn store_pieces(
        &mut self,
        set: usize,
        linear: u64,
        size: usize,
        value: u64,
    ) -> bool {
        let Some((host, _)) = self
            .span(set, linear, true)
            .filter(|(_, room)| size <= *room)
        else {
            return false;
        };
        // SAFETY: the bytes are in the page of a write tag; for the rest as in `load`.
        unsafe { host::store_pieces(host, size, value) };
        true
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
        let host = e.addend.wrapping_add(linear as usize) as *mut u8;
        if e.write == aligned_page::<N>(linear) {
            // SAFETY: as in `load`; a write tag is given to writable frames only.
            unsafe { host::store::<N>(host, value) };
            true
        } else if !self.parallel && e.write == linear.wrapping_add(N as u64 - 1) & !0xfff {
            // SAFETY: as above.
            unsafe { host::store_alone::<N>(host, value) };
            true
        } else {
            false
        }
    }

    /// The host's address of a byte, and the number of bytes from there to the end of its page.
    pub(crate) fn span(&self, set: usize, linear: u64, write: bool) -> Option<(*mut u8, usize)> {
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

    /// Stores the low `size` bytes (1, 2, 4 or 8) of `value` up to `most` times, as far as the page reaches.
    /// Returns how often.
    pub(crate) fn store_many(
        &mut self,
        set: usize,
        linear: u64,
        value: u64,
        size: u32,
        most: u64,
    ) -> u64 {
        let Some((host, room)) = self.span(set, linear, true) else {
            return 0;
        };
        let count = (room as u64 / u64::from(size)).min(most);
        let n = count as usize;
        // SAFETY: `n` elements are at most `room` bytes, which are in the page of a write tag. Without other processors at
        // work nobody uses them at the same time.
        unsafe {
            match size {
                1 if !self.parallel => host.write_bytes(value as u8, n),
                _ => host::fill(host, value, size as usize, n),
            }
        }
        count
    }

    /// Copies up to `most` elements of `size` bytes inside of the two pages, with the result of one element after the
    /// other: the copy ends before it would read a byte that it wrote. Returns the number of elements.
    pub(crate) fn move_many(
        &mut self,
        set: usize,
        from: u64,
        to: u64,
        size: u32,
        most: u64,
    ) -> u64 {
        let (Some((source, a)), Some((target, b))) =
            (self.span(set, from, false), self.span(set, to, true))
        else {
            return 0;
        };
        let apart = (source as usize).abs_diff(target as usize);
        let count = (a.min(b).min(apart) as u64 / u64::from(size)).min(most);
        let bytes = (count * u64::from(size)) as usize;
        // SAFETY: both ranges are inside of pages with a read and a write tag, and `bytes` is at most the distance
        // between them.
        unsafe {
            match self.parallel {
                true => host::copy(source, target, bytes),
                false => core::ptr::copy_nonoverlapping(source, target, bytes),
            }
        }
        count
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
        self.filled[set & 3] = true;
        let page = linear & !0xfff;
        let addend = (host.as_ptr().expose_provenance()).wrapping_sub(page as usize);
        let tag = if write { page } else { NONE };
        self.sets[set & 3][slot(page)] = Entry {
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
        for (set, filled) in self.sets.iter_mut().zip(&mut self.filled) {
            if core::mem::take(filled) {
                set.fill(EMPTY);
            }
        }
        self.large = (NONE, 0);
    }

    /// Forgets one linear page, or everything if it may be part of a large page.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        if (self.large.0..=self.large.1).contains(&linear) {
            return self.flush();
        }
        for set in &mut self.sets[..3] {
            set[slot(linear)] = EMPTY;
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

    #[test]
    fn pages_at_a_distance_of_the_sets_reach_are_served_together() {
        let mut frame = vec![3u8; 4096];
        let host = NonNull::new(frame.as_mut_ptr()).expect("not null");
        let mut tlb = Tlb::new();
        let pages = (0..8).map(|n| 0x20_0000 + n * (SIZE as u64) * 4096);
        for page in pages.clone() {
            tlb.fill(SUPERVISOR, page, 0x9000, host, true);
        }
        for page in pages {
            assert_eq!(tlb.load::<1>(SUPERVISOR, page), Some(3), "{page:#x}");
        }
    }
}
