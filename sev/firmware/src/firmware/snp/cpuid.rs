//! The CPUID page: answers that the firmware vouches for.

use super::super::Firmware;
use crate::machine::region::Page;
use crate::wire::{put, u32_at, u64_at};

/// Layout: count, 12 reserved bytes, then entries of 48 bytes.
const ENTRIES: usize = 0x10;
const ENTRY: usize = 48;
const MAX_ENTRIES: usize = 64;
/// EAX, EBX, ECX and EDX of the answer.
const ANSWER: usize = 0x18;

impl Firmware<'_> {
    /// Checks a CPUID page. On error returns the page with what the firmware would accept: values
    /// without the bits that the platform does not have, and at most 64 entries.
    pub(super) fn check_cpuid_page(&self, page: &Page) -> Result<(), Box<Page>> {
        let mut corrected = Box::new(*page);
        let count = u32_at(page, 0) as usize;
        if count > MAX_ENTRIES {
            put(&mut corrected[..], 0, &(MAX_ENTRIES as u32).to_le_bytes());
        }
        for entry in corrected[ENTRIES..]
            .chunks_exact_mut(ENTRY)
            .take(count.min(MAX_ENTRIES))
        {
            self.correct_entry(entry);
        }
        if *corrected == *page {
            Ok(())
        } else {
            Err(corrected)
        }
    }

    fn correct_entry(&self, entry: &mut [u8]) {
        if u64_at(entry, 0x28) != 0 {
            put(entry, 0x28, &[0; 8]);
        }
        let query = (u32_at(entry, 0), u32_at(entry, 4));
        let limits = &self.machine.config.cpuid;
        let Some(limit) = limits.iter().find(|l| (l.eax_in, l.ecx_in) == query) else {
            return;
        };
        for (register, allowed) in limit.allowed.iter().enumerate() {
            let at = ANSWER + register * 4;
            let value = u32_at(entry, at) & allowed;
            put(entry, at, &value.to_le_bytes());
        }
    }
}
