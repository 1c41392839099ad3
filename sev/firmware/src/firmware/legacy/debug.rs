//! Debug commands and COPY.

use super::super::{Firmware, Outcome};
use crate::command::{CopyMemory, DbgDecrypt, DbgEncrypt, SevPolicy, U32, U64};
use crate::status::Status;

/// Bytes moved at a time.
const STEP: u32 = 0x1000;

/// The steps of a length: offset and size.
fn steps(len: u32) -> impl Iterator<Item = (u64, usize)> {
    (0..len)
        .step_by(STEP as usize)
        .map(move |at| (at.into(), STEP.min(len - at) as usize))
}

impl Firmware<'_> {
    fn debug_allowed(&self, handle: u32) -> Outcome {
        match self.guest(handle)?.policy.contains(SevPolicy::NODBG) {
            false => Ok(()),
            true => Err(Status::POLICY_FAILURE),
        }
    }

    /// Source and destination, both aligned to cipher blocks, and the length.
    fn block_ranges(&self, src: U64, dst: U64, length: U32) -> Outcome<(u64, u64, u32)> {
        let len = length.get();
        let src = self.guest_range(src.get(), len)?;
        let dst = self.guest_range(dst.get(), len)?;
        self.writable(dst, len.into())?;
        Ok((src, dst, len))
    }

    pub(super) fn dbg_decrypt(&mut self, handle: u32, buffer: &DbgDecrypt) -> Outcome {
        self.debug_allowed(handle)?;
        let (src, dst, len) =
            self.block_ranges(buffer.src_paddr, buffer.dst_paddr, buffer.length)?;
        let key = self.memory_key(handle)?;
        let mut page = [0; STEP as usize];
        for (at, n) in steps(len) {
            self.guest_read(&key, src + at, &mut page[..n])?;
            self.write(dst + at, &page[..n])?;
        }
        Ok(())
    }

    pub(super) fn dbg_encrypt(&mut self, handle: u32, buffer: &DbgEncrypt) -> Outcome {
        self.debug_allowed(handle)?;
        let (src, dst, len) =
            self.block_ranges(buffer.src_paddr, buffer.dst_paddr, buffer.length)?;
        let key = self.memory_key(handle)?;
        let mut page = [0; STEP as usize];
        for (at, n) in steps(len) {
            self.read(src + at, &mut page[..n])?;
            self.guest_write(&key, dst + at, &page[..n])?;
        }
        Ok(())
    }

    pub(super) fn copy(&mut self, handle: u32, buffer: &CopyMemory) -> Outcome {
        let (src, dst, len) =
            self.block_ranges(buffer.src_paddr, buffer.dst_paddr, buffer.length)?;
        // Step by step, an overlap would read what was just written.
        if src.abs_diff(dst) < len.into() {
            return Err(Status::INVALID_ADDRESS);
        }
        let key = self.memory_key(handle)?;
        let mut page = [0; STEP as usize];
        for (at, n) in steps(len) {
            self.guest_read(&key, src + at, &mut page[..n])?;
            self.guest_write(&key, dst + at, &page[..n])?;
        }
        Ok(())
    }
}
