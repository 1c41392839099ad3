//! Page state changes of an SNP guest by the GHCB page.

use kvm_ops::{Exit, Gpa, PAGE_SIZE, Privacy, Result};
use kvm_ops_cpu::Exit as CpuExit;

use super::{Malformed, Pending};
use crate::processor::{Next, Processor};
use crate::sev::protocol::{TO_PRIVATE, TO_SHARED};

/// Header and entries in the buffer.
const ENTRY: usize = 8;
const ENTRIES: u64 = 253;

/// SW_EXITINFO2: the header is wrong, an entry is, or something else.
const BAD_HEADER: u64 = 1 << 32 | 1;
const BAD_ENTRY: u64 = 1 << 32 | 2;
const GENERIC: u64 = 0x100 << 32;

/// An entry: pages done in bits 11:0, the frame from bit 12, the operation from bit 52, the size in
/// bit 56.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    fn done(self) -> u64 {
        self.0 & 0xfff
    }

    fn gpa(self) -> u64 {
        self.0 & 0x000f_ffff_ffff_f000
    }

    fn pages(self) -> u64 {
        match self.0 >> 56 & 1 {
            0 => 1,
            _ => 512,
        }
    }

    /// `None` for an operation that is not known; `Some(None)` for those that change no state: PSMASH
    /// and UNSMASH are hints.
    fn to(self) -> Option<Option<Privacy>> {
        const PSMASH: u64 = 3;
        const UNSMASH: u64 = 4;
        match self.0 >> 52 & 0xf {
            TO_PRIVATE => Some(Some(Privacy::Private)),
            TO_SHARED => Some(Some(Privacy::Shared)),
            PSMASH | UNSMASH => Some(None),
            _ => None,
        }
    }

    fn is_valid(self) -> bool {
        let aligned = self.gpa().is_multiple_of(self.pages() * PAGE_SIZE);
        aligned && self.done() <= self.pages() && self.to().is_some()
    }
}

impl Processor {
    /// Does the changes that are left: the embedder is asked for each run of adjacent pages.
    pub(super) fn change_pages(&mut self, exit: CpuExit) -> Result<Next> {
        let ghcb = self.ghcb()?;
        let Some(header) = ghcb.scratch(ENTRY) else {
            return self.malformed(exit, Malformed::Scratch);
        };
        let base = header.start;
        let (current, last) = (ghcb.word(base) & 0xffff, ghcb.word(base) >> 16 & 0xffff);
        if last >= ENTRIES || ghcb.scratch(ENTRY * (2 + last as usize)).is_none() {
            return self.took(exit, BAD_HEADER);
        }
        if current > last {
            return self.took(exit, 0);
        }
        let entry = |n: u64| Entry(ghcb.word(base + ENTRY * (1 + n as usize)));
        let first = entry(current);
        if !first.is_valid() {
            return self.took(exit, BAD_ENTRY);
        }
        let Some(Some(to)) = first.to() else {
            self.entries_done(1)?;
            return self.change_pages(exit);
        };
        let gpa = first.gpa() + first.done() * PAGE_SIZE;
        let mut pages = first.pages() - first.done();
        let mut entries = 1;
        while current + entries <= last {
            let next = entry(current + entries);
            let adjacent = next.gpa() == gpa + pages * PAGE_SIZE && next.to() == first.to();
            if !next.is_valid() || !adjacent || next.done() != 0 {
                break;
            }
            pages += next.pages();
            entries += 1;
        }
        let entries = entries as u16;
        if pages == 0 {
            self.entries_done(entries)?;
            return self.change_pages(exit);
        }
        let leave = Exit::MapGpaRange {
            gpa: Gpa::new(gpa),
            pages,
            to,
        };
        self.wait_for(Pending::Pages { exit, entries }, leave, Vec::new())
    }

    /// Takes the embedder's answer for so many entries.
    pub(super) fn converted(&mut self, exit: CpuExit, entries: u16, errno: u64) {
        let done = match errno {
            0 => self.entries_done(entries),
            _ => self.took(exit, GENERIC).map(drop),
        };
        if let (Ok(()), Some(side)) = (done, &mut self.sev) {
            side.going_on = Some(exit).filter(|_| side.ghcb.is_some());
        }
    }

    /// Marks entries as done.
    fn entries_done(&mut self, entries: u16) -> Result<()> {
        let ghcb = self.ghcb()?;
        let Some(header) = ghcb.scratch(ENTRY) else {
            return Ok(());
        };
        let (base, word) = (header.start, ghcb.word(header.start));
        let current = word & 0xffff;
        for n in current..current + u64::from(entries) {
            let at = base + ENTRY * (1 + n as usize);
            let entry = Entry(ghcb.word(at));
            ghcb.set_word(at, entry.0 & !0xfff | entry.pages());
        }
        ghcb.set_word(base, word & !0xffff | (current + u64::from(entries)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_name_pages_operation_and_what_is_done() {
        let entry = Entry(0x0110_0000_0020_0003);
        assert_eq!(
            (entry.gpa(), entry.pages(), entry.done()),
            (0x20_0000, 512, 3)
        );
        assert_eq!(entry.to(), Some(Some(Privacy::Private)));
        assert!(entry.is_valid());
        for bad in [
            0x0110_0000_0020_1000, // 2 MiB, not aligned
            0x0010_0000_0020_1002, // more done than there is
            0x0000_0000_0020_1000, // no operation
            0x00f0_0000_0020_1000,
        ] {
            assert!(!Entry(bad).is_valid(), "{bad:#x}");
        }
    }
}
