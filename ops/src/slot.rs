//! Memory slots: ranges of guest-physical addresses and the host memory behind them.

use crate::{Error, Field, Gpa, PAGE_SIZE, Result, SlotId};

/// A page-aligned range of host memory that may be lent to guests.
///
/// On KVM the address is one of this process; a bare-metal hypervisor puts a host-physical
/// address here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    address: u64,
    bytes: u64,
}

impl HostRange {
    /// Declares host memory fit for lending.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the address or the size is not a multiple of 4 KiB, the size is 0, or
    /// the range wraps.
    ///
    /// # Safety
    /// The value is plain data that can be copied, so its maker answers for every slot that it may
    /// get into: who hands it to others hands on this contract. From the moment the range is put
    /// into a slot until that slot is deleted or its VM is freed:
    /// * the memory stays mapped and writable (readable, for a read-only slot);
    /// * no Rust reference to it exists, because the guest writes it at any time.
    #[inline]
    pub const unsafe fn new(address: u64, bytes: u64) -> Result<Self> {
        if !address.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Invalid(Field::HostAddress, address));
        }
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || address.checked_add(bytes).is_none() {
            return Err(Error::Invalid(Field::Size, bytes));
        }
        Ok(Self { address, bytes })
    }

    /// The part of `bytes` bytes from `offset` on, which may be lent as the whole. `None` for a part that
    /// is not inside, or not of whole pages.
    ///
    /// ```
    /// use kvm_ops_core::HostRange;
    /// // SAFETY: the range is not lent.
    /// let range = unsafe { HostRange::new(0x10_0000, 0x4000)? };
    /// assert_eq!(range.part(0x1000, 0x3000).map(|part| part.address()), Some(0x10_1000));
    /// assert_eq!(range.part(0x2000, 0x3000), None);
    /// # Ok::<(), kvm_ops_core::Error>(())
    /// ```
    pub const fn part(&self, offset: u64, bytes: u64) -> Option<Self> {
        let whole = offset.is_multiple_of(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE);
        if !whole || bytes == 0 || offset > self.bytes || bytes > self.bytes - offset {
            return None;
        }
        let address = self.address + offset;
        Some(Self { address, bytes })
    }

    /// The first byte's address.
    #[inline]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The ways in which a guest may use a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags {
    /// Guest writes do not reach memory but leave as
    /// [`Exit::MmioWrite`](crate::Exit::MmioWrite) (`KVM_MEM_READONLY`).
    pub read_only: bool,
    /// The pages that the guest writes are recorded (`KVM_MEM_LOG_DIRTY_PAGES`).
    pub log_dirty: bool,
}

/// Private memory behind a slot: a guest_memfd on KVM (`KVM_MEM_GUEST_MEMFD`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrivateBacking {
    /// The file descriptor.
    pub fd: i32,
    /// The offset of the slot in the file, in bytes.
    pub offset: u64,
}

/// A memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemSlot {
    /// Its number.
    pub id: SlotId,
    /// The guest-physical address of its first byte.
    pub gpa: Gpa,
    /// The host memory behind it.
    pub host: HostRange,
    /// The ways in which the guest may use it.
    pub flags: SlotFlags,
    /// Private memory beside the shared memory of `host`, where the technology knows it.
    pub private: Option<PrivateBacking>,
}

impl MemSlot {
    /// A plain read-write slot.
    pub const fn new(id: SlotId, gpa: Gpa, host: HostRange) -> Self {
        let flags = SlotFlags {
            read_only: false,
            log_dirty: false,
        };
        Self {
            id,
            gpa,
            host,
            flags,
            private: None,
        }
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(&self) -> u64 {
        self.host.bytes()
    }

    /// The last guest-physical address in the slot, so that a slot that ends at 2^64 has one.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the slot does not start on a page or wraps around.
    pub const fn last(&self) -> Result<Gpa> {
        if !self.gpa.is_page_aligned() {
            return Err(Error::Invalid(Field::Gpa, self.gpa.get()));
        }
        match self.gpa.checked_add(self.bytes() - 1) {
            Some(last) => Ok(last),
            None => Err(Error::Invalid(Field::Size, self.bytes())),
        }
    }

    /// True if the other slot has the same number, address and memory. The flags may differ.
    pub fn is_same_place(&self, other: &Self) -> bool {
        (self.id, self.gpa, self.host, self.private)
            == (other.id, other.gpa, other.host, other.private)
    }

    /// True if the two cover a common guest-physical address.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self.last(), other.last()) {
            (Ok(last), Ok(other_last)) => self.gpa <= other_last && other.gpa <= last,
            _ => false,
        }
    }

    /// The length of a dirty bitmap of the slot in 64-bit words, one bit a page.
    pub const fn dirty_words(&self) -> usize {
        (self.bytes() / PAGE_SIZE).div_ceil(64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(address: u64, bytes: u64) -> Result<HostRange> {
        // SAFETY: never given to a VM.
        unsafe { HostRange::new(address, bytes) }
    }

    #[test]
    fn host_ranges_are_whole_pages_that_do_not_wrap() {
        assert!(host(0x1000, 0x1000).is_ok());
        assert_eq!(
            host(0x1001, 0x1000),
            Err(Error::Invalid(Field::HostAddress, 0x1001))
        );
        for bytes in [0, 1, 0xfff, 0x1001] {
            assert_eq!(host(0x1000, bytes), Err(Error::Invalid(Field::Size, bytes)));
        }
        assert_eq!(
            host(!0xfff, 0x1000),
            Err(Error::Invalid(Field::Size, 0x1000))
        );
    }

    #[test]
    fn overlap_is_symmetric_and_touching_is_not_overlap() {
        let slot =
            |gpa, pages: u64| MemSlot::new(SlotId(0), Gpa::new(gpa), host(0, pages << 12).unwrap());
        let a = slot(0x2000, 2);
        for (gpa, pages, overlaps) in [
            (0, 2, false),
            (0, 3, true),
            (0x3000, 1, true),
            (0x4000, 1, false),
            (0x2000, 2, true),
        ] {
            let b = slot(gpa, pages);
            assert_eq!(a.overlaps(&b), overlaps, "{gpa:#x}+{pages}");
            assert_eq!(b.overlaps(&a), overlaps, "{gpa:#x}+{pages}");
        }
        assert!(slot(!0xfff, 2).last().is_err());
        assert_eq!(slot(!0xfff, 1).last(), Ok(Gpa::new(u64::MAX)));
    }

    #[test]
    fn a_dirty_bitmap_has_a_bit_for_each_page() {
        for (pages, words) in [(1u64, 1), (64, 1), (65, 2), (128, 2)] {
            let slot = MemSlot::new(SlotId(0), Gpa::new(0), host(0, pages << 12).unwrap());
            assert_eq!(slot.dirty_words(), words);
        }
    }
}
