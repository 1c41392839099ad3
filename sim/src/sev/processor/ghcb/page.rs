//! The GHCB page: what a guest tells its host, and the host's answer (AMD 56421, "GHCB Layout").

use std::ops::Range;

use kvm_ops::{Gpa, Result};

use crate::access::{Copy, host_access};
use crate::vm::VmInner;

const PAGE: usize = 4096;

/// Offsets of the fields.
pub(super) const RAX: usize = 0x1f8;
pub(super) const RBX: usize = 0x318;
pub(super) const RCX: usize = 0x308;
pub(super) const RDX: usize = 0x310;
pub(super) const RSI: usize = 0x330;
pub(super) const CODE: usize = 0x390;
pub(super) const INFO_1: usize = 0x398;
pub(super) const INFO_2: usize = 0x3a0;
const SCRATCH: usize = 0x3a8;
pub(super) const XCR0: usize = 0x3e8;
/// A bit for each quadword before it: the field is passed.
const VALID: usize = 0x3f0;
const SAVE_END: usize = 0x400;
/// The buffer for longer data.
const BUFFER: Range<usize> = 0x800..0xff0;
const USAGE: usize = 0xffc;

/// The page, with the fields of the exit that brought it.
pub(in crate::sev::processor) struct Ghcb {
    gpa: u64,
    page: Box<[u8; PAGE]>,
    /// The fields that the guest passed.
    valid: [u8; SAVE_END - VALID],
}

impl Ghcb {
    /// Reads the page. No field is passed back yet.
    pub(super) fn read(vm: &VmInner, gpa: u64) -> Result<Self> {
        let mut page = Box::new([0; PAGE]);
        host_access(vm, Gpa::new(gpa), Copy::FromGuest(&mut page[..]))?;
        let mut valid = [0; SAVE_END - VALID];
        valid.copy_from_slice(&page[VALID..SAVE_END]);
        page[VALID..SAVE_END].fill(0);
        Ok(Self { gpa, page, valid })
    }

    /// Writes the answer: save area and buffer.
    pub(super) fn write(&self, vm: &VmInner) -> Result<()> {
        for part in [0..SAVE_END, BUFFER] {
            let at = Gpa::new(self.gpa + part.start as u64);
            host_access(vm, at, Copy::ToGuest(&self.page[part]))?;
        }
        Ok(())
    }

    /// The format of the page.
    pub(super) fn usage(&self) -> u32 {
        let bytes = [0, 1, 2, 3].map(|n| self.page[USAGE + n]);
        u32::from_le_bytes(bytes)
    }

    /// A field that the guest passed.
    pub(super) fn get(&self, at: usize) -> Option<u64> {
        let passed = self.valid[at / 64] >> (at / 8 % 8) & 1 != 0;
        passed.then(|| self.word(at))
    }

    pub(super) fn put(&mut self, at: usize, value: u64) {
        self.set_word(at, value);
        self.page[VALID + at / 64] |= 1 << (at / 8 % 8);
    }

    /// Eight bytes of the page.
    pub(super) fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.page[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn set_word(&mut self, at: usize, value: u64) {
        self.page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The place in the page of `len` bytes that SW_SCRATCH names. `None` unless they lie in the page's
    /// buffer: what lies elsewhere a host need not take.
    pub(super) fn scratch(&self, len: usize) -> Option<Range<usize>> {
        let at = self.get(SCRATCH)?.checked_sub(self.gpa)?;
        let start = usize::try_from(at).ok()?;
        let end = start.checked_add(len)?;
        (start >= BUFFER.start && end <= BUFFER.end).then_some(start..end)
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.page[range]
    }

    pub(super) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.page[range]
    }
}
