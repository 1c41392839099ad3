//! Debug commands and COPY.

use super::super::{Firmware, Outcome};
use super::policy;
use crate::status::Status;
use crate::wire::{u32_at, u64_at};

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
        match self.guest(handle)?.policy & policy::NODBG {
            0 => Ok(()),
            _ => Err(Status::POLICY_FAILURE),
        }
    }

    /// Source and destination, both aligned to cipher blocks, and the length.
    fn debug_ranges(&self, buffer: &[u8]) -> Outcome<(u64, u64, u32)> {
        let len = u32_at(buffer, 0x18);
        let src = self.guest_range(u64_at(buffer, 8), len)?;
        let dst = self.guest_range(u64_at(buffer, 0x10), len)?;
        self.writable(dst, len.into())?;
        Ok((src, dst, len))
    }

    pub(super) fn dbg_decrypt(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        self.debug_allowed(handle)?;
        let (src, dst, len) = self.debug_ranges(buffer)?;
        let key = self.memory_key(handle)?;
        let mut page = [0; STEP as usize];
        for (at, n) in steps(len) {
            self.guest_read(&key, src + at, &mut page[..n])?;
            self.write(dst + at, &page[..n])?;
        }
        Ok(())
    }

    pub(super) fn dbg_encrypt(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        self.debug_allowed(handle)?;
        let (src, dst, len) = self.debug_ranges(buffer)?;
        let key = self.memory_key(handle)?;
        let mut page = [0; STEP as usize];
        for (at, n) in steps(len) {
            self.read(src + at, &mut page[..n])?;
            self.guest_write(&key, dst + at, &page[..n])?;
        }
        Ok(())
    }

    pub(super) fn copy(&mut self, handle: u32, buffer: &[u8]) -> Outcome {
        let len = u32_at(buffer, 4);
        let src = self.guest_range(u64_at(buffer, 8), len)?;
        let dst = self.guest_range(u64_at(buffer, 0x10), len)?;
        self.writable(dst, len.into())?;
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
