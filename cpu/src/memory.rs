//! Linear and segmented accesses of instructions.

use crate::breakpoint::Watched;
use crate::bus::Access;
use crate::fault::Exception;
use crate::paging::{Linear, READ, SYSTEM_READ, SYSTEM_WRITE, WRITE};
use crate::physical::Place;
use crate::segment::SS;
use crate::state::{Core, Pending, R, Stop};
use crate::tlb;

/// Part of an access inside of one page.
#[derive(Clone, Copy)]
struct Piece {
    place: Place,
    gpa: u64,
    len: usize,
}

impl Core {
    /// Reads `N` bytes (1, 2, 4, 8) at a linear address; `seg` chooses #SS or #GP.
    #[inline(always)]
    pub(crate) fn load<const N: usize>(&mut self, seg: usize, linear: u64) -> R<u64> {
        self.load_by::<N, true>(seg, linear)
    }

    /// The same; unless `SLOW`, an access that the TLB does not serve stops without a reason, and the caller does
    /// it again slowly.
    #[inline(always)]
    pub(crate) fn load_by<const N: usize, const SLOW: bool>(
        &mut self,
        seg: usize,
        linear: u64,
    ) -> R<u64> {
        match self.tlb.load::<N>(self.set, linear) {
            Some(value) => Ok(value),
            None if SLOW => self.load_slow(seg, linear, N),
            None => Err(Stop),
        }
    }

    /// Reads what will be written: a fault says that it was a write, as hardware does for
    /// read-modify-write instructions.
    #[inline(always)]
    pub(crate) fn load_update<const N: usize>(&mut self, seg: usize, linear: u64) -> R<u64> {
        self.load_update_by::<N, true>(seg, linear)
    }

    /// The same, as [`Core::load_by`] does it.
    #[inline(always)]
    pub(crate) fn load_update_by<const N: usize, const SLOW: bool>(
        &mut self,
        seg: usize,
        linear: u64,
    ) -> R<u64> {
        match self.tlb.load_writable::<N>(self.set, linear) {
            Some(value) => Ok(value),
            None if SLOW => self.load_update_slow(seg, linear, N),
            None => Err(Stop),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_update_slow(&mut self, seg: usize, linear: u64, size: usize) -> R<u64> {
        self.aligned(linear, size)?;
        self.probe_write(seg, linear, size)?;
        self.load_slow(seg, linear, size)
    }

    /// Writes the low `N` bytes of `value`.
    #[inline(always)]
    pub(crate) fn store<const N: usize>(&mut self, seg: usize, linear: u64, value: u64) -> R<()> {
        self.store_by::<N, true>(seg, linear, value)
    }

    /// The same, as [`Core::load_by`] does it.
    #[inline(always)]
    pub(crate) fn store_by<const N: usize, const SLOW: bool>(
        &mut self,
        seg: usize,
        linear: u64,
        value: u64,
    ) -> R<()> {
        if self.tlb.store::<N>(self.set, linear, value) {
            Ok(())
        } else if SLOW {
            self.store_slow(seg, linear, N, value)
        } else {
            Err(Stop)
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, seg: usize, linear: u64, size: usize) -> R<u64> {
        if let Some(value) = self.tlb.load_pieces(self.set, linear, size) {
            return Ok(value);
        }
        let mut data = [0; 8];
        self.aligned(linear, size)?;
        self.read_linear(seg, linear, &mut data[..size], READ)?;
        Ok(u64::from_le_bytes(data))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, seg: usize, linear: u64, size: usize, value: u64) -> R<()> {
        if self.tlb.store_pieces(self.set, linear, size, value) {
            return Ok(());
        }
        self.aligned(linear, size)?;
        self.write_linear(seg, linear, &value.to_le_bytes()[..size], WRITE)
    }

    /// #AC at CPL 3 with EFLAGS.AC and CR0.AM.
    pub(crate) fn aligned(&mut self, linear: u64, size: usize) -> R<()> {
        let checked = self.cpl == 3 && self.system_flags & crate::flags::AC != 0;
        let misaligned = linear & (size as u64 - 1) != 0;
        if misaligned && checked && self.cr0 & crate::state::CR0_AM != 0 {
            return Err(self.fault(Exception::with_code(Exception::AC, 0)));
        }
        Ok(())
    }

    #[cold]
    fn not_canonical(&mut self, seg: usize) -> Stop {
        let vector = if seg == SS {
            Exception::SS
        } else {
            Exception::GP
        };
        self.fault(Exception::with_code(vector, 0))
    }

    /// The last byte has a canonical address. It is looked at before the page of the first one is walked.
    fn end_is_canonical(&mut self, seg: usize, linear: u64, len: usize) -> R<()> {
        let last = linear.wrapping_add(len.saturating_sub(1) as u64);
        if self.long_mode() && !self.canonical(last) {
            return Err(self.not_canonical(seg));
        }
        Ok(())
    }

    /// Reads any number of bytes.
    pub(crate) fn read_linear(
        &mut self,
        seg: usize,
        linear: u64,
        data: &mut [u8],
        access: Linear,
    ) -> R<()> {
        self.end_is_canonical(seg, linear, data.len())?;
        let mut done = 0;
        while done < data.len() {
            let at = self.wrap(linear.wrapping_add(done as u64));
            let piece = self.piece(seg, at, data.len() - done, access)?;
            let part = &mut data[done..done + piece.len];
            if !self.copy_out(piece.place, piece.gpa, part) {
                return Err(self.device_refused(piece.gpa, at, false));
            }
            done += piece.len;
        }
        Ok(())
    }

    /// Writes any number of bytes up to a page; nothing is written if one page faults.
    pub(crate) fn write_linear(
        &mut self,
        seg: usize,
        linear: u64,
        data: &[u8],
        access: Linear,
    ) -> R<()> {
        self.end_is_canonical(seg, linear, data.len())?;
        let first = self.piece(seg, self.wrap(linear), data.len(), access)?;
        let rest = &data[first.len..];
        let second = if rest.is_empty() {
            None
        } else {
            let at = self.wrap(linear.wrapping_add(first.len as u64));
            Some(self.piece(seg, at, rest.len(), access)?)
        };
        for piece in [Some(first), second].into_iter().flatten() {
            if matches!(piece.place, Place::Host { .. })
                && self.pages.overlaps(piece.gpa, piece.len)
            {
                self.pending = Pending::CodeWrite(piece.gpa);
                return Err(Stop);
            }
        }
        if !self.copy_in(first.place, first.gpa, &data[..first.len]) {
            return Err(self.device_refused(first.gpa, linear, true));
        }
        if let Some(second) = second
            && !self.copy_in(second.place, second.gpa, rest)
        {
            return Err(self.device_refused(second.gpa, linear, true));
        }
        for piece in [Some(first), second].into_iter().flatten() {
            if matches!(piece.place, Place::Host { .. }) {
                self.stored(piece.gpa, piece.len);
            }
        }
        Ok(())
    }

    #[cold]
    fn device_refused(&mut self, gpa: u64, linear: u64, write: bool) -> Stop {
        let access = Access {
            write,
            execute: false,
            walk: false,
            wide: self.has_wide_entries(),
        };
        self.violation(gpa, access, Some(linear), 0)
    }

    /// Linear addresses have 32 bits outside of 64-bit mode.
    #[inline(always)]
    pub(crate) fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    fn piece(&mut self, seg: usize, linear: u64, len: usize, access: Linear) -> R<Piece> {
        if self.long_mode() && !self.canonical(linear) {
            return Err(self.not_canonical(seg));
        }
        if self.watched && !access.system {
            let what = if access.write {
                Watched::Write
            } else {
                Watched::Read
            };
            self.watch(linear, len, what);
        }
        let walked = self.walk(linear, access)?;
        let question = Access {
            write: access.write,
            execute: false,
            walk: false,
            wide: self.has_wide_entries(),
        };
        let place = self.place(walked.gpa, question, Some(linear))?;
        if let Place::Host { host, writable } = place {
            if access.write && !writable {
                // The host lends the frame for reading only; writes are its business.
                let len = len.min(4096 - (linear as usize & 0xfff));
                return Ok(Piece {
                    place: Place::Device,
                    gpa: walked.gpa,
                    len,
                });
            }
            let set = if access.system {
                tlb::CHECKED
            } else {
                self.set
            };
            let write = walked.write && writable && !self.pages.has_code(walked.gpa);
            self.tlb.fill(set, linear, walked.gpa, host, write);
            if walked.page_size > 4096 {
                self.tlb.note_large(linear, walked.page_size);
            }
        }
        let len = len.min(4096 - (linear as usize & 0xfff));
        Ok(Piece {
            place,
            gpa: walked.gpa,
            len,
        })
    }

    /// The place of the first bytes of an access, and their guest-physical address.
    pub(crate) fn first_piece(
        &mut self,
        seg: usize,
        linear: u64,
        len: usize,
        access: Linear,
    ) -> R<(Place, u64)> {
        let piece = self.piece(seg, self.wrap(linear), len, access)?;
        Ok((piece.place, piece.gpa))
    }

    /// Checks that `len` bytes can be written, as read-modify-write string instructions and
    /// stack pushes before a far transfer need.
    pub(crate) fn probe_write(&mut self, seg: usize, linear: u64, len: usize) -> R<()> {
        self.end_is_canonical(seg, linear, len)?;
        let first = self.piece(seg, self.wrap(linear), len, WRITE)?;
        if first.len < len {
            let at = self.wrap(linear.wrapping_add(first.len as u64));
            self.piece(seg, at, len - first.len, WRITE)?;
        }
        Ok(())
    }

    /// Reads a table of the processor: supervisor, no segment.
    pub(crate) fn system_read(&mut self, linear: u64, size: usize) -> R<u64> {
        let mut data = [0; 8];
        let at = self.wrap(linear);
        self.read_linear(0, at, &mut data[..size], SYSTEM_READ)?;
        Ok(u64::from_le_bytes(data))
    }

    /// Writes a table of the processor.
    pub(crate) fn system_write(&mut self, linear: u64, size: usize, value: u64) -> R<()> {
        let at = self.wrap(linear);
        self.write_linear(0, at, &value.to_le_bytes()[..size], SYSTEM_WRITE)
    }

    /// Linear address of `offset` in a segment, with the checks of the current mode.
    pub(crate) fn linear(&mut self, seg: usize, offset: u64, size: u64, write: bool) -> R<u64> {
        if self.bits == 64 {
            return Ok(offset.wrapping_add(self.base[seg]));
        }
        let s = self.seg[seg];
        let vector = if seg == SS {
            Exception::SS
        } else {
            Exception::GP
        };
        if self.protected() && !self.vm86() {
            let usable = s.usable() && if write { s.writable() } else { s.readable() };
            if !usable {
                return Err(self.fault(Exception::with_code(vector, 0)));
            }
        }
        let offset = offset & 0xffff_ffff;
        if !s.contains(offset, size) {
            return Err(self.fault(Exception::with_code(vector, 0)));
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Reads `size` bytes (1, 2, 4, 8) of a segment.
    pub(crate) fn read(&mut self, seg: usize, offset: u64, size: u32) -> R<u64> {
        let at = self.linear(seg, offset, size.into(), false)?;
        self.load_sized(seg, at, size)
    }

    /// Reads what will be written; see [`Core::load_update`].
    pub(crate) fn read_update(&mut self, seg: usize, offset: u64, size: u32) -> R<u64> {
        let at = self.linear(seg, offset, size.into(), true)?;
        if let Some(value) = self.load_locked(seg, at, size as usize)? {
            return Ok(value as u64);
        }
        match size {
            1 => self.load_update::<1>(seg, at),
            2 => self.load_update::<2>(seg, at),
            4 => self.load_update::<4>(seg, at),
            _ => self.load_update::<8>(seg, at),
        }
    }

    /// Writes `size` bytes (1, 2, 4, 8) of a segment.
    pub(crate) fn write(&mut self, seg: usize, offset: u64, size: u32, value: u64) -> R<()> {
        let at = self.linear(seg, offset, size.into(), true)?;
        match self.store_locked(at, size as usize, value.into()) {
            Some(done) => done,
            None => self.store_sized(seg, at, size, value),
        }
    }

    pub(crate) fn load_sized(&mut self, seg: usize, linear: u64, size: u32) -> R<u64> {
        match size {
            1 => self.load::<1>(seg, linear),
            2 => self.load::<2>(seg, linear),
            4 => self.load::<4>(seg, linear),
            _ => self.load::<8>(seg, linear),
        }
    }

    pub(crate) fn store_sized(&mut self, seg: usize, linear: u64, size: u32, value: u64) -> R<()> {
        match size {
            1 => self.store::<1>(seg, linear, value),
            2 => self.store::<2>(seg, linear, value),
            4 => self.store::<4>(seg, linear, value),
            _ => self.store::<8>(seg, linear, value),
        }
    }

    /// Pushes `size` bytes; RSP changes only if the store succeeds.
    pub(crate) fn push(&mut self, size: u32, value: u64) -> R<()> {
        let mask = self.stack_mask();
        let sp = self.r[4].wrapping_sub(size.into()) & mask;
        self.write(SS, sp, size, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, size: u32) -> R<u64> {
        let mask = self.stack_mask();
        let value = self.read(SS, self.r[4] & mask, size)?;
        self.set_sp(self.r[4].wrapping_add(size.into()));
        Ok(value)
    }

    /// Writes the part of RSP that the stack's size uses.
    pub(crate) fn set_sp(&mut self, sp: u64) {
        self.r[4] = match self.stack_mask() {
            0xffff => self.r[4] & !0xffff | sp & 0xffff,
            mask => sp & mask,
        };
    }
}
