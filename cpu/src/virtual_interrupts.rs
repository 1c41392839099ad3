//! The virtual interrupt flag: CR4.VME in virtual-8086 mode, CR4.PVI at CPL 3 of protected mode (Intel SDM volume 3, 22.3
//! and 22.4). Code whose IOPL does not let it change IF changes VIF in its place.

use crate::flags;
use crate::segment::CS;
use crate::state::{CR4_PVI, CR4_VME, Core, R};

/// Bytes of the bitmap below the I/O map of a task state segment: one bit for each vector of INT n.
const REDIRECTION_BYTES: u64 = 32;
/// The smallest limit of a 32-bit task state segment, and the place of the offset of its I/O map.
const TSS_LIMIT: u32 = 0x67;
const IO_MAP_AT: u64 = 0x66;

impl Core {
    /// IOPL keeps virtual-8086 mode from changing IF.
    fn vm86_without_if(&self) -> bool {
        self.vm86() && self.iopl() < 3
    }

    /// Virtual-8086 mode has VIF in place of IF.
    fn vm86_has_vif(&self) -> bool {
        self.vm86_without_if() && self.cr4 & CR4_VME != 0
    }

    /// CLI and STI.
    pub(crate) fn set_interrupt_flag(&mut self, on: bool) -> R<()> {
        if !self.protected() || self.cpl <= self.iopl() {
            match on {
                true => {
                    self.shadow |= self.system_flags & flags::IF == 0;
                    self.system_flags |= flags::IF;
                }
                false => self.system_flags &= !flags::IF,
            }
            return Ok(());
        }
        let needed = if self.vm86() { CR4_VME } else { CR4_PVI };
        let waits = on && self.system_flags & flags::VIP != 0;
        if self.cpl != 3 || self.cr4 & needed == 0 || waits {
            return Err(self.gp(0));
        }
        match on {
            true => self.system_flags |= flags::VIF,
            false => self.system_flags &= !flags::VIF,
        }
        Ok(())
    }

    /// What PUSHF of that size pushes: in virtual-8086 mode with VIF, that in place of IF, and an IOPL of 3.
    pub(crate) fn flags_to_push(&mut self, size: u32) -> R<u64> {
        let value = self.rflags() & !(flags::VM | flags::RF);
        if !self.vm86_without_if() {
            return Ok(value);
        }
        if !self.vm86_has_vif() || size != 2 {
            return Err(self.gp(0));
        }
        Ok(self.with_virtual_flag(value))
    }

    fn with_virtual_flag(&self, value: u64) -> u64 {
        let on = match self.system_flags & flags::VIF {
            0 => 0,
            _ => flags::IF,
        };
        value & !flags::IF | on | flags::IOPL
    }

    /// POPF and IRET in virtual-8086 mode are let do their work.
    pub(crate) fn require_flags_in_vm86(&mut self, size: u32) -> R<()> {
        if self.vm86_without_if() && (!self.vm86_has_vif() || size != 2) {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// The check of an image of flags that POPF or IRET has read, in virtual-8086 mode with VIF. `Some` if the image
    /// is for [`load_virtual_flags`](Self::load_virtual_flags).
    pub(crate) fn check_virtual_flags(&mut self, image: u64) -> R<Option<u64>> {
        if !self.vm86_has_vif() {
            return Ok(None);
        }
        let waits = image & flags::IF != 0 && self.system_flags & flags::VIP != 0;
        if waits || image & flags::TF != 0 {
            return Err(self.gp(0));
        }
        Ok(Some(image))
    }

    /// Loads such an image: IF goes to VIF, and IF and IOPL stay.
    pub(crate) fn load_virtual_flags(&mut self, image: u64) {
        self.load_flags(image, 2, !(flags::IF | flags::IOPL));
        match image & flags::IF {
            0 => self.system_flags &= !flags::VIF,
            _ => self.system_flags |= flags::VIF,
        }
    }

    /// INT n in virtual-8086 mode: with VME, the 8086 program's own handler where the task's bitmap has a 0. True if
    /// the interrupt is there now.
    pub(crate) fn redirect_interrupt(&mut self, vector: u8) -> R<bool> {
        if self.cr4 & CR4_VME != 0 && !self.has_monitor_handler(vector)? {
            self.enter_8086_handler(vector)?;
            return Ok(true);
        }
        match self.iopl() < 3 {
            true => Err(self.gp(0)),
            false => Ok(false),
        }
    }

    /// The bit of the task's bitmap.
    fn has_monitor_handler(&mut self, vector: u8) -> R<bool> {
        let limit = self.tr.limit;
        if !self.tr.usable() || self.tr.kind() & 8 == 0 || limit < TSS_LIMIT {
            return Err(self.gp(0));
        }
        let map = self.system_read(self.tr.base.wrapping_add(IO_MAP_AT), 2)?;
        let at = (map + u64::from(vector / 8)).checked_sub(REDIRECTION_BYTES);
        let Some(at) = at.filter(|at| *at <= u64::from(limit)) else {
            return Err(self.gp(0));
        };
        let bits = self.system_read(self.tr.base.wrapping_add(at), 1)?;
        Ok(bits >> (vector & 7) & 1 != 0)
    }

    /// As INT n of real mode, by the table at linear address 0.
    fn enter_8086_handler(&mut self, vector: u8) -> R<()> {
        let entry = self.system_read(u64::from(vector) * 4, 4)?;
        let mut image = self.rflags();
        if self.vm86_without_if() {
            image = self.with_virtual_flag(image);
        }
        let sp = self.r[4];
        for value in [image, self.seg[CS].selector.into(), self.rip] {
            if let Err(stop) = self.push(2, value) {
                self.r[4] = sp;
                return Err(stop);
            }
        }
        let cleared = match self.vm86_without_if() {
            true => flags::VIF,
            false => flags::IF,
        };
        self.system_flags &= !(cleared | flags::TF | flags::RF);
        let selector = (entry >> 16) as u16;
        self.seg[CS].selector = selector;
        self.seg[CS].base = u64::from(selector) << 4;
        self.rip = entry & 0xffff;
        self.update_mode();
        Ok(())
    }
}
