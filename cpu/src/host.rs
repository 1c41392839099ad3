//! Accesses to frames: all of them are atomic, since other processors of the machine and the host may use the
//! same bytes at the same time.
//!
//! An aligned operand of up to 8 bytes is one access, as processors promise. Loads acquire and stores release:
//! the order of accesses that x86 keeps (loads in order, stores in order, no store before an earlier load), at
//! no cost on an x86 host. What x86 leaves open, a load before an earlier store, stays open. A misaligned
//! operand is several accesses.
//!
//! Guests mix sizes: one processor stores 8 bytes, another one loads 4 of them. Rust's memory model says nothing
//! of racing accesses of different sizes. LLVM's, to which they are lowered, does, byte by byte, and so does the
//! hardware; every access here is one instruction of its own, through a pointer that the compiler knows nothing of.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, fence};

/// Reads `N` bytes (1, 2, 4 or 8) as a little-endian number.
///
/// # Safety
///
/// `N` bytes at `host` must be readable, and `host` be aligned to them. Who writes them at the same time does so
/// with atomic accesses.
#[inline(always)]
pub(crate) unsafe fn load<const N: usize>(host: *mut u8) -> u64 {
    // SAFETY: the caller promises the bytes and their alignment. Nothing is written: relaxed loads of at most 8
    // bytes may be from memory that is readable only (`core::sync::atomic`, "Atomic accesses to read-only memory").
    let value = unsafe {
        match N {
            1 => u64::from(AtomicU8::from_ptr(host).load(Relaxed)),
            2 => u64::from(u16::from_le(AtomicU16::from_ptr(host.cast()).load(Relaxed))),
            4 => u64::from(u32::from_le(AtomicU32::from_ptr(host.cast()).load(Relaxed))),
            _ => u64::from_le(AtomicU64::from_ptr(host.cast()).load(Relaxed)),
        }
    };
    fence(Acquire);
    value
}

/// Writes the low `N` bytes (1, 2, 4 or 8) of `value`, little-endian.
///
/// # Safety
///
/// As for [`load`], and the bytes must be writable.
#[inline(always)]
pub(crate) unsafe fn store<const N: usize>(host: *mut u8, value: u64) {
    // SAFETY: the caller promises the bytes and their alignment.
    unsafe {
        match N {
            1 => AtomicU8::from_ptr(host).store(value as u8, Release),
            2 => AtomicU16::from_ptr(host.cast()).store((value as u16).to_le(), Release),
            4 => AtomicU32::from_ptr(host.cast()).store((value as u32).to_le(), Release),
            _ => AtomicU64::from_ptr(host.cast()).store(value.to_le(), Release),
        }
    }
}

/// Replaces `old` by `new`, both of `size` bytes (1, 2, 4 or 8), unless the memory holds something else. True if
/// it did. A full barrier, as a locked instruction is one.
///
/// # Safety
///
/// As for [`store`], with `size` for `N`.
pub(crate) unsafe fn exchange(host: *mut u8, size: usize, old: u64, new: u64) -> bool {
    // SAFETY: the caller promises the bytes and their alignment.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(host)
                .compare_exchange(old as u8, new as u8, SeqCst, Relaxed)
                .is_ok(),
            2 => AtomicU16::from_ptr(host.cast())
                .compare_exchange((old as u16).to_le(), (new as u16).to_le(), SeqCst, Relaxed)
                .is_ok(),
            4 => AtomicU32::from_ptr(host.cast())
                .compare_exchange((old as u32).to_le(), (new as u32).to_le(), SeqCst, Relaxed)
                .is_ok(),
            _ => AtomicU64::from_ptr(host.cast())
                .compare_exchange(old.to_le(), new.to_le(), SeqCst, Relaxed)
                .is_ok(),
        }
    }
}

/// Reads 16 bytes as two accesses.
///
/// # Safety
///
/// As for [`load`], for 16 bytes.
pub(crate) unsafe fn load_pair(host: *mut u8) -> u128 {
    // SAFETY: the caller's promise.
    unsafe { u128::from(load::<8>(host)) | u128::from(load::<8>(host.wrapping_add(8))) << 64 }
}

/// True if [`exchange_pair`] can be used.
pub(crate) fn has_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        const CMPXCHG16B: u32 = 1 << 13;
        // SAFETY: every x86-64 processor has the CPUID instruction, in every mode. (A safe function in newer toolchains, hence the allow.)
        #[allow(unused_unsafe)]
        let features = unsafe { core::arch::x86_64::__cpuid(1) }.ecx;
        features & CMPXCHG16B != 0
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// [`exchange`] of 16 bytes.
///
/// # Safety
///
/// As for [`exchange`], with 16 for `size`; [`has_pairs`] is true.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn exchange_pair(host: *mut u8, old: u128, new: u128) -> bool {
    let equal: u8;
    // The compiler's own registers need RBX. An intrinsic would do, but its callers are compiled without the feature.
    // SAFETY: the caller promises the instruction, and the bytes and their alignment, which are all that it touches.
    unsafe {
        core::arch::asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b xmmword ptr [rdi]",
            "sete r8b",
            "mov rbx, rsi",
            in("rdi") host,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") old as u64 => _,
            inout("rdx") (old >> 64) as u64 => _,
            out("r8b") equal,
            options(nostack),
        );
    }
    equal != 0
}

/// Never called: [`has_pairs`] is false.
///
/// # Safety
///
/// None.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn exchange_pair(_: *mut u8, _: u128, _: u128) -> bool {
    false
}

/// [`load`] from anywhere, while no other processor runs: the operand is read at once, and not atomically.
///
/// # Safety
///
/// As for [`load`], but for the alignment, and nobody writes the bytes at the same time.
#[inline(always)]
pub(crate) unsafe fn load_alone<const N: usize>(host: *mut u8) -> u64 {
    // SAFETY: the caller's promise; `read_unaligned` needs no alignment.
    unsafe {
        match N {
            1 => u64::from(host.read()),
            2 => u64::from(u16::from_le(host.cast::<u16>().read_unaligned())),
            4 => u64::from(u32::from_le(host.cast::<u32>().read_unaligned())),
            _ => u64::from_le(host.cast::<u64>().read_unaligned()),
        }
    }
}

/// [`store`] to anywhere, as [`load_alone`] loads.
///
/// # Safety
///
/// As for [`store`], but for the alignment, and nobody uses the bytes at the same time.
#[inline(always)]
pub(crate) unsafe fn store_alone<const N: usize>(host: *mut u8, value: u64) {
    // SAFETY: the caller's promise; `write_unaligned` needs no alignment.
    unsafe {
        match N {
            1 => host.write(value as u8),
            2 => host.cast::<u16>().write_unaligned((value as u16).to_le()),
            4 => host.cast::<u32>().write_unaligned((value as u32).to_le()),
            _ => host.cast::<u64>().write_unaligned(value.to_le()),
        }
    }
}

/// [`load`] with the size as a number.
///
/// # Safety
///
/// As for [`load`].
pub(crate) unsafe fn load_sized(host: *mut u8, size: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => load::<1>(host),
            2 => load::<2>(host),
            4 => load::<4>(host),
            _ => load::<8>(host),
        }
    }
}

/// [`store`] with the size as a number.
///
/// # Safety
///
/// As for [`store`].
unsafe fn store_sized(host: *mut u8, size: usize, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => store::<1>(host, value),
            2 => store::<2>(host, value),
            4 => store::<4>(host, value),
            _ => store::<8>(host, value),
        }
    }
}

/// The widest access that is aligned at `at` and no longer than `left` bytes.
#[inline(always)]
fn width(at: *mut u8, left: usize) -> usize {
    let aligned = 1 << (at as usize | 8).trailing_zeros();
    let fits = 1 << left.min(8).ilog2();
    if aligned < fits { aligned } else { fits }
}

/// Reads `size` bytes (1 to 8) anywhere, in aligned pieces.
///
/// # Safety
///
/// As for [`load`], but for the alignment; `size` is not 0.
pub(crate) unsafe fn load_pieces(host: *mut u8, size: usize) -> u64 {
    let (mut value, mut done) = (0, 0);
    while done < size {
        let at = host.wrapping_add(done);
        let width = width(at, size - done);
        // SAFETY: `width` bytes are in the range that the caller promises, and `at` is aligned to them.
        value |= unsafe { load_sized(at, width) } << (8 * done);
        done += width;
    }
    value
}

/// Writes the low `size` bytes (1 to 8) of `value` anywhere, in aligned pieces.
///
/// # Safety
///
/// As for [`store`], but for the alignment; `size` is not 0.
pub(crate) unsafe fn store_pieces(host: *mut u8, size: usize, value: u64) {
    let mut done = 0;
    while done < size {
        let at = host.wrapping_add(done);
        let width = width(at, size - done);
        // SAFETY: as in `load_pieces`, and the caller promises that the bytes are writable.
        unsafe { store_sized(at, width, value >> (8 * done)) };
        done += width;
    }
}

/// Copies a frame's bytes into `data`.
///
/// # Safety
///
/// As for [`load`], for `data.len()` bytes, but for the alignment; `data` does not overlap them.
pub(crate) unsafe fn read(host: *mut u8, data: &mut [u8]) {
    let mut done = 0;
    while done < data.len() {
        let at = host.wrapping_add(done);
        let width = width(at, data.len() - done);
        if width == 8 {
            let words = data[done..].chunks_exact_mut(8);
            for (n, word) in words.enumerate() {
                // SAFETY: as in `load_pieces`: `at` is aligned to 8 bytes, and so is what follows it.
                let value = unsafe { load::<8>(at.wrapping_add(8 * n)) };
                word.copy_from_slice(&value.to_le_bytes());
            }
            done += (data.len() - done) & !7;
            continue;
        }
        // SAFETY: as in `load_pieces`.
        let value = unsafe { load_sized(at, width) };
        data[done..done + width].copy_from_slice(&value.to_le_bytes()[..width]);
        done += width;
    }
}

/// Copies `data` into a frame.
///
/// # Safety
///
/// As for [`store`], for `data.len()` bytes, but for the alignment; `data` does not overlap them.
pub(crate) unsafe fn write(host: *mut u8, data: &[u8]) {
    let mut done = 0;
    while done < data.len() {
        let at = host.wrapping_add(done);
        let width = width(at, data.len() - done);
        let mut value = [0; 8];
        if width == 8 {
            let words = data[done..].chunks_exact(8);
            for (n, word) in words.enumerate() {
                value.copy_from_slice(word);
                // SAFETY: as in `store_pieces`: `at` is aligned to 8 bytes, and so is what follows it.
                unsafe { store::<8>(at.wrapping_add(8 * n), u64::from_le_bytes(value)) };
            }
            done += (data.len() - done) & !7;
            continue;
        }
        value[..width].copy_from_slice(&data[done..done + width]);
        // SAFETY: as in `store_pieces`.
        unsafe { store_sized(at, width, u64::from_le_bytes(value)) };
        done += width;
    }
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `value` `count` times. An element that is aligned is written at once.
///
/// # Safety
///
/// As for [`write`], for `size * count` bytes.
pub(crate) unsafe fn fill(host: *mut u8, value: u64, size: usize, count: usize) {
    // What 8 bytes hold wherever they start at a whole element.
    let pattern = match size {
        1 => (value & 0xff) * 0x0101_0101_0101_0101,
        2 => (value & 0xffff) * 0x0001_0001_0001_0001,
        4 => (value & 0xffff_ffff) * 0x0000_0001_0000_0001,
        _ => value,
    };
    let (bytes, mut done) = (size * count, 0);
    while done < bytes {
        let at = host.wrapping_add(done);
        let width = width(at, bytes - done);
        let value = pattern.rotate_right((done % 8 * 8) as u32);
        if width == 8 {
            let words = (bytes - done) / 8;
            for n in 0..words {
                // SAFETY: the words are in the range that the caller promises, and `at` is aligned to them.
                unsafe { store::<8>(at.wrapping_add(8 * n), value) };
            }
            done += 8 * words;
            continue;
        }
        // SAFETY: `width` bytes are in the range that the caller promises, and `at` is aligned to them.
        unsafe { store_sized(at, width, value) };
        done += width;
    }
}

/// Copies `bytes` bytes between frames. An element that is aligned in both is copied at once.
///
/// # Safety
///
/// As for [`read`] of `from` and [`write`] of `to`; the ranges do not overlap.
pub(crate) unsafe fn copy(from: *mut u8, to: *mut u8, bytes: usize) {
    let mut done = 0;
    while done < bytes {
        let at = to.wrapping_add(done);
        let width = width(at, bytes - done);
        let source = from.wrapping_add(done);
        if width == 8 && (source as usize).is_multiple_of(8) {
            let words = (bytes - done) / 8;
            for n in 0..words {
                // SAFETY: the words are in both ranges, where both pointers are aligned to them.
                unsafe {
                    store::<8>(
                        at.wrapping_add(8 * n),
                        load::<8>(source.wrapping_add(8 * n)),
                    )
                };
            }
            done += 8 * words;
            continue;
        }
        // SAFETY: `width` bytes are in both ranges that the caller promises, and `at` is aligned to them.
        unsafe { store_sized(at, width, load_pieces(source, width)) };
        done += width;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[repr(align(8))]
    struct Memory([u8; 40]);

    impl Memory {
        fn at(&mut self, offset: usize) -> *mut u8 {
            self.0.as_mut_ptr().wrapping_add(offset)
        }
    }

    fn numbered() -> Memory {
        let mut memory = Memory([0; 40]);
        (1..).zip(&mut memory.0).for_each(|(n, byte)| *byte = n);
        memory
    }

    #[test]
    fn pieces_of_every_place_and_size_are_read_and_written_and_nothing_beside_them() {
        for at in 0..16 {
            for size in 1..=8 {
                let mut memory = numbered();
                let mut expected = [0; 8];
                expected[..size].copy_from_slice(&memory.0[at..at + size]);
                let expected = u64::from_le_bytes(expected);
                // SAFETY: `at + size` is below 40, and nothing else uses the array meanwhile.
                assert_eq!(unsafe { load_pieces(memory.at(at), size) }, expected);
                let mut target = Memory([0xee; 40]);
                // SAFETY: as above.
                unsafe { store_pieces(target.at(at), size, expected) };
                assert_eq!(target.0[at..at + size], memory.0[at..at + size]);
                let beside = target.0[..at].iter().chain(&target.0[at + size..]);
                assert!({ beside }.all(|byte| *byte == 0xee));
            }
        }
    }

    #[test]
    fn copies_of_every_place_and_length_are_whole() {
        for (from, to, len) in (0..9)
            .flat_map(|from| (0..9).flat_map(move |to| (0..24).map(move |len| (from, to, len))))
        {
            let mut source = numbered();
            let mut target = Memory([0; 40]);
            // SAFETY: both ranges are in their arrays, which nothing else uses meanwhile.
            unsafe { copy(source.at(from), target.at(to), len) };
            assert_eq!(target.0[to..to + len], source.0[from..from + len]);
            let beside = target.0[..to].iter().chain(&target.0[to + len..]);
            assert!({ beside }.all(|byte| *byte == 0));
            let mut data: Vec<u8> = alloc::vec![0; len];
            // SAFETY: as above.
            unsafe { read(target.at(to), &mut data) };
            assert_eq!(data, source.0[from..from + len]);
            let mut again = Memory([0; 40]);
            // SAFETY: as above.
            unsafe { write(again.at(to), &data) };
            assert_eq!(again.0, target.0);
        }
    }

    #[test]
    fn elements_of_every_size_fill_any_place() {
        for (size, at) in [1, 2, 4, 8]
            .into_iter()
            .flat_map(|size| (0..8).map(move |at| (size, at)))
        {
            let value = 0x8877_6655_4433_2211_u64;
            let mut memory = Memory([0; 40]);
            // SAFETY: three elements from `at` on are in the array, which nothing else uses meanwhile.
            unsafe { fill(memory.at(at), value, size, 3) };
            let mut expected = [0; 40];
            for element in 0..3 {
                let start = at + element * size;
                expected[start..start + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            assert_eq!(memory.0, expected, "{size} {at}");
        }
    }

    #[test]
    fn an_exchange_happens_only_if_the_memory_holds_the_old_value() {
        for size in [1, 2, 4, 8] {
            let mut memory = numbered();
            // SAFETY: the first 16 bytes of the array, aligned to 8, which nothing else uses meanwhile.
            unsafe {
                let old = load_sized(memory.at(8), size);
                assert!(!exchange(memory.at(8), size, old + 1, 0));
                assert_eq!(load_sized(memory.at(8), size), old);
                assert!(exchange(memory.at(8), size, old, old - 1));
                assert_eq!(load_sized(memory.at(8), size), old - 1);
            }
            assert_eq!(memory.0[8 + size..], numbered().0[8 + size..]);
        }
    }
}
