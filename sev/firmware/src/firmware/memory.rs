//! The firmware's accesses to system memory.
//!
//! Addresses may carry the C-bit, as Linux passes them; it is dropped. While SNP is initialised,
//! a page that the firmware writes must be in Firmware state.

use super::{Firmware, Outcome};
use crate::cipher::{BLOCK, MemoryKey};
use crate::command::U32;
use crate::machine::entry::PageState;
use crate::machine::region::{PAGE, Place, pieces};
use crate::status::Status;

impl Firmware<'_> {
    /// An address without its C-bit.
    pub(super) fn address(&self, address: u64) -> u64 {
        address & !(1 << self.machine.config.c_bit)
    }

    /// An address range in memory, or INVALID_ADDRESS.
    pub(super) fn range(&self, address: u64, len: u64) -> Outcome<u64> {
        let address = self.address(address);
        if self.machine.memory.contains(address, len) {
            Ok(address)
        } else {
            Err(Status::INVALID_ADDRESS)
        }
    }

    /// The page in memory at an address.
    pub(super) fn place(&self, address: u64) -> Outcome<Place<'_>> {
        let place = self.machine.memory.place(address);
        place.ok_or(Status::INVALID_ADDRESS)
    }

    /// A range of whole cipher blocks of a guest.
    pub(super) fn guest_range(&self, address: u64, len: u32) -> Outcome<u64> {
        let address = self.range(address, len.into())?;
        if address % BLOCK as u64 != 0 {
            return Err(Status::INVALID_ADDRESS);
        }
        if len == 0 || !(len as usize).is_multiple_of(BLOCK) {
            return Err(Status::INVALID_LEN);
        }
        Ok(address)
    }

    pub(super) fn read(&self, address: u64, out: &mut [u8]) -> Outcome {
        let address = self.range(address, out.len() as u64)?;
        self.machine
            .host_read(address, out)
            .map_err(|_| Status::INVALID_ADDRESS)
    }

    pub(super) fn read_array<const N: usize>(&self, address: u64) -> Outcome<Box<[u8; N]>> {
        let mut out = Box::new([0; N]);
        self.read(address, &mut out[..])?;
        Ok(out)
    }

    /// Checks that the firmware may write a range.
    pub(super) fn writable(&self, address: u64, len: u64) -> Outcome<u64> {
        let address = self.range(address, len)?;
        if self.sp.snp.is_none() || len == 0 {
            return Ok(address);
        }
        let first = address / PAGE as u64;
        let last = (address + len - 1) / PAGE as u64;
        for page in first..=last {
            let place = self.place(page * PAGE as u64)?;
            let state = place.peek().entry(place.index).state;
            if state != PageState::Firmware {
                return Err(Status::INVALID_PAGE_STATE);
            }
        }
        Ok(address)
    }

    pub(super) fn write(&self, address: u64, data: &[u8]) -> Outcome {
        let address = self.writable(address, data.len() as u64)?;
        self.write_checked(address, data)
    }

    /// Writes a range that was found writable. Pages in Firmware state stay in it: only the
    /// firmware itself changes them.
    fn write_checked(&self, address: u64, data: &[u8]) -> Outcome {
        for (at, offset, range) in pieces(address, data.len()) {
            let place = self.place(at)?;
            place.lock().write(place.index, offset, &data[range]);
        }
        Ok(())
    }

    /// Writes an output whose length the caller gave. A length that is too small, like the 0 of a
    /// query, gives INVALID_LEN; the length that is needed is in `len` either way.
    pub(super) fn write_sized(&self, address: u64, len: &mut U32, data: &[u8]) -> Outcome {
        let given = std::mem::replace(len, (data.len() as u32).into());
        if given.get() < len.get() {
            return Err(Status::INVALID_LEN);
        }
        self.write(address, data)
    }

    /// Reads guest memory through its key.
    pub(super) fn guest_read(&self, key: &MemoryKey, address: u64, out: &mut [u8]) -> Outcome {
        for (at, offset, range) in pieces(address, out.len()) {
            let place = self.place(at)?;
            let region = place.lock();
            region.read_with(key, place.spa, place.index, offset, &mut out[range]);
        }
        Ok(())
    }

    /// Writes guest memory through its key, in a range that was found writable.
    pub(super) fn guest_write(&self, key: &MemoryKey, address: u64, data: &[u8]) -> Outcome {
        for (at, offset, range) in pieces(address, data.len()) {
            let place = self.place(at)?;
            let mut region = place.lock();
            region.write_with(key, place.spa, place.index, offset, &data[range]);
        }
        Ok(())
    }

    /// Encrypts memory in place and shows its plain text, page by page.
    pub(super) fn encrypt_in_place(
        &self,
        key: &MemoryKey,
        address: u64,
        len: u32,
        mut see: impl FnMut(&[u8]),
    ) -> Outcome {
        let mut buffer = [0; PAGE];
        for (at, offset, range) in pieces(address, len as usize) {
            let data = &mut buffer[..range.len()];
            let place = self.place(at)?;
            let mut region = place.lock();
            region.read(place.index, offset, data);
            see(data);
            region.write_with(key, place.spa, place.index, offset, data);
        }
        Ok(())
    }
}
