//! The first stage of address translation: 32-bit, PAE, 4-level and 5-level paging.

use crate::fault::Exception;
use crate::flags;
use crate::state::{
    CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PKS, CR4_PSE, CR4_SMAP, CR4_SMEP, Core,
    EFER_NXE, R, Stop,
};

/// A linear access that is translated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Linear {
    pub(crate) write: bool,
    pub(crate) execute: bool,
    /// The processor's own access to a table: supervisor whatever the CPL is.
    pub(crate) system: bool,
}

pub(crate) const READ: Linear = Linear {
    write: false,
    execute: false,
    system: false,
};
pub(crate) const WRITE: Linear = Linear {
    write: true,
    execute: false,
    system: false,
};
pub(crate) const SYSTEM_READ: Linear = Linear {
    write: false,
    execute: false,
    system: true,
};
pub(crate) const SYSTEM_WRITE: Linear = Linear {
    write: true,
    execute: false,
    system: true,
};
pub(crate) const FETCH: Linear = Linear {
    write: false,
    execute: true,
    system: false,
};

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Result of a walk.
pub(crate) struct Walked {
    pub(crate) gpa: u64,
    /// Writes are allowed and the dirty bit is set: the page may have a write tag.
    pub(crate) write: bool,
    pub(crate) page_size: u64,
}

#[derive(Clone, Copy)]
struct Entry {
    at: u64,
    value: u64,
}

struct Path {
    entries: [Entry; 5],
    len: usize,
    /// AND of all W and U bits, OR of all NX.
    rights: u64,
    page_size: u64,
    entry_size: u32,
}

impl Core {
    fn page_fault(&mut self, code: u32, linear: u64, access: Linear) -> Stop {
        let user = self.cpl == 3 && !access.system;
        let fetch = access.execute && (self.efer & EFER_NXE != 0 || self.cr4 & CR4_SMEP != 0);
        let code =
            code | u32::from(access.write) << 1 | u32::from(user) << 2 | u32::from(fetch) << 4;
        self.fault(Exception::page_fault(code, linear))
    }

    /// Translates a linear address, sets accessed and dirty bits.
    pub(crate) fn walk(&mut self, linear: u64, access: Linear) -> R<Walked> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Walked {
                gpa: linear & 0xffff_ffff,
                write: true,
                page_size: 4096,
            });
        }
        let (path, leaf, write) = loop {
            let path = self.descend(linear, access)?;
            let leaf = path.entries[path.len - 1].value;
            let write = self.permitted(&path, leaf, linear, access)?;
            // An entry that another processor changed meanwhile is read again.
            if self.mark(&path, access.write, linear)? {
                break (path, leaf, write);
            }
        };
        let offset = linear & (path.page_size - 1);
        let mut frame = leaf & FRAME_MASK & !(path.page_size - 1);
        if path.entry_size == 4 {
            frame = leaf & 0xffff_f000 & !(path.page_size - 1);
            if path.page_size > 4096 {
                frame |= (leaf >> 13 & 0xff) << 32;
            }
        }
        let write = write && (access.write || leaf & D != 0);
        Ok(Walked {
            gpa: frame | offset,
            write,
            page_size: path.page_size,
        })
    }

    fn descend(&mut self, linear: u64, access: Linear) -> R<Path> {
        let pae = self.cr4 & CR4_PAE != 0;
        let (levels, entry_size, index_bits): (u32, u32, u32) = if self.long_mode() {
            (if self.cr4 & CR4_LA57 != 0 { 5 } else { 4 }, 8, 9)
        } else if pae {
            (3, 8, 9)
        } else {
            (2, 4, 10)
        };
        let mut table = match (self.long_mode(), pae) {
            (true, _) => self.cr3 & FRAME_MASK,
            (false, true) => self.cr3 & 0xffff_ffe0,
            (false, false) => self.cr3 & 0xffff_f000,
        };
        let mut path = Path {
            entries: [Entry { at: 0, value: 0 }; 5],
            len: 0,
            rights: W | U,
            page_size: 4096,
            entry_size,
        };
        for level in (0..levels).rev() {
            let shift = 12 + level * index_bits;
            let index = linear >> shift & ((1 << index_bits) - 1);
            let at = table + index * u64::from(entry_size);
            let value = self.read_entry(at, entry_size, linear)?;
            if value & P == 0 {
                return Err(self.page_fault(0, linear, access));
            }
            let root_of_pae = levels == 3 && level == 2;
            let large = value & PS != 0
                && match levels {
                    2 => level == 1 && self.cr4 & CR4_PSE != 0,
                    3 => level == 1,
                    _ => level == 1 || level == 2,
                };
            if self.reserved(value, level, levels, large, shift, root_of_pae) {
                return Err(self.page_fault(1 | 8, linear, access));
            }
            path.entries[path.len] = Entry { at, value };
            path.len += 1;
            if !root_of_pae {
                path.rights =
                    path.rights & (value | !(W | U)) | value & NX & entry_mask(entry_size);
            }
            if large {
                path.page_size = 1 << shift;
                break;
            }
            table = value & FRAME_MASK & entry_mask(entry_size);
        }
        Ok(path)
    }

    fn reserved(
        &self,
        value: u64,
        level: u32,
        levels: u32,
        large: bool,
        shift: u32,
        root_of_pae: bool,
    ) -> bool {
        if levels == 2 {
            // PSE-36: bit 21 of a 4 MiB page.
            return large && value & 1 << 21 != 0;
        }
        let above = FRAME_MASK & !((1 << self.phys_bits) - 1);
        let mut mask = above;
        if self.efer & EFER_NXE == 0 || root_of_pae {
            mask |= NX;
        }
        if levels == 3 {
            mask |= 0x7ff0_0000_0000_0000;
        }
        if root_of_pae {
            mask |= 0x1e6;
        } else if level >= 3 {
            mask |= PS;
        }
        if large {
            mask |= ((1 << shift) - 1) & !0x1fff;
        }
        value & mask != 0
    }

    /// Checks rights; true if a write would be allowed too.
    fn permitted(&mut self, path: &Path, leaf: u64, linear: u64, access: Linear) -> R<bool> {
        let user = self.cpl == 3 && !access.system;
        let user_page = path.rights & U != 0;
        let mut write_ok = path.rights & W != 0 || !user && self.cr0 & CR0_WP == 0;
        let mut ok = user_page || !user;
        if access.execute {
            ok &= path.rights & NX == 0;
            ok &= user || !user_page || self.cr4 & CR4_SMEP == 0;
        } else if !user && user_page && self.cr4 & CR4_SMAP != 0 {
            ok &= !access.system && self.system_flags & flags::AC != 0;
        }
        if !ok || access.write && !write_ok {
            return Err(self.page_fault(1, linear, access));
        }
        if self.cr4 & CR4_PKE != 0 && self.long_mode() && user_page && !access.execute {
            let key = leaf >> 59 & 15;
            let bits = self.pkru >> (key * 2) & 3;
            let write_denied = bits & 2 != 0 && (user || self.cr0 & CR0_WP != 0);
            if bits & 1 != 0 || access.write && write_denied {
                return Err(self.page_fault(1 | 1 << 5, linear, access));
            }
            write_ok &= !write_denied;
        }
        if self.cr4 & CR4_PKS != 0 && self.long_mode() && !user_page && !access.execute {
            let bits = self.pkrs >> ((leaf >> 59 & 15) * 2) & 3;
            let write_denied = bits & 2 != 0 && self.cr0 & CR0_WP != 0;
            if bits & 1 != 0 || access.write && write_denied {
                return Err(self.page_fault(1 | 1 << 5, linear, access));
            }
            write_ok &= !write_denied;
        }
        Ok(write_ok)
    }

    /// Sets the accessed bit of all entries, and the dirty bit of the leaf for writes. False if an entry is not what
    /// the path says any more.
    fn mark(&mut self, path: &Path, write: bool, linear: u64) -> R<bool> {
        for (i, e) in path.entries[..path.len].iter().enumerate() {
            if path.entry_size == 8 && !self.long_mode() && i == 0 {
                continue;
            }
            let leaf = i + 1 == path.len;
            let new = e.value | A | if leaf && write { D } else { 0 };
            if new != e.value && !self.update_entry(e.at, path.entry_size, e.value, new, linear)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// True for an address that registers with a base can hold: those take the width that the processor
    /// has, whatever CR4.LA57 is (SDM volume 1, 3.3.7.1, and volume 3, 4.5.3).
    pub(crate) fn canonical_base(&self, linear: u64) -> bool {
        let unused = if self.cpuid.has(7, 2, 16) { 7 } else { 16 };
        ((linear << unused) as i64 >> unused) as u64 == linear
    }

    /// True if addresses come from paging entries of 8 bytes.
    pub(crate) fn has_wide_entries(&self) -> bool {
        self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0
    }

    /// True if the bits above the linear address width repeat the top one.
    pub(crate) fn canonical(&self, linear: u64) -> bool {
        let unused = if self.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
        ((linear << unused) as i64 >> unused) as u64 == linear
    }
}

const fn entry_mask(size: u32) -> u64 {
    if size == 4 { 0xffff_f000 } else { u64::MAX }
}
