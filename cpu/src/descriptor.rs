//! Loading of segment registers from descriptor tables.

use crate::fault::Exception;
use crate::segment::{CS, SS, Segment};
use crate::state::{Core, R, Stop};

/// A descriptor with its linear address.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) at: u64,
    pub(crate) low: u64,
}

impl Descriptor {
    /// Type and S bit.
    pub(crate) fn kind(self) -> u8 {
        (self.low >> 40 & 0x1f) as u8
    }

    pub(crate) fn present(self) -> bool {
        self.low >> 47 & 1 != 0
    }

    pub(crate) fn dpl(self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
}

impl Core {
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: u8, selector: u16, ext: u32) -> Stop {
        let code = u32::from(selector & !3) | ext;
        self.fault(Exception::with_code(vector, code))
    }

    /// Reads a descriptor; #GP(selector) if it is outside of its table.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> R<Descriptor> {
        let index = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.usable() {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            return Err(self.selector_fault(vector, selector, ext));
        };
        if index + 7 > limit {
            return Err(self.selector_fault(vector, selector, ext));
        }
        let at = base.wrapping_add(index);
        let low = self.system_read(at, 8)?;
        Ok(Descriptor { at, low })
    }

    /// Sets the accessed bit of a code or data descriptor.
    pub(crate) fn mark_accessed(&mut self, d: Descriptor) -> R<()> {
        if d.low & 1 << 40 == 0 {
            let byte = (d.low >> 40) as u8 | 1;
            self.system_write(d.at.wrapping_add(5), 1, byte.into())?;
        }
        Ok(())
    }

    /// MOV, POP and LDS-like loads of ES, SS, DS, FS and GS.
    pub(crate) fn load_segment(&mut self, seg: usize, selector: u16) -> R<()> {
        if self.paragraphs() {
            let s = &mut self.seg[seg];
            s.selector = selector;
            s.base = u64::from(selector) << 4;
            s.rights = if self.system_flags & crate::flags::VM != 0 {
                0xf3
            } else {
                0x93
            };
            self.update_mode();
            return Ok(());
        }
        let loaded = if seg == SS {
            self.stack_segment(selector, self.cpl, Exception::GP, 0)?
        } else if selector & !3 == 0 {
            Segment::null(selector)
        } else {
            self.data_segment(selector, Exception::GP)?
        };
        self.seg[seg] = loaded;
        self.update_mode();
        Ok(())
    }

    /// A segment for ES, DS, FS or GS. `vector` is #GP for loads, #TS for task switches.
    pub(crate) fn data_segment(&mut self, selector: u16, vector: u8) -> R<Segment> {
        let d = self.descriptor(selector, vector, 0)?;
        let s = Segment::from_descriptor(selector, d.low);
        let rpl = (selector & 3) as u8;
        let checked = !(s.is_code() && s.conforming());
        if !s.readable() || checked && s.dpl() < self.cpl.max(rpl) {
            return Err(self.selector_fault(vector, selector, 0));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        self.mark_accessed(d)?;
        Ok(Segment {
            rights: s.rights | 1,
            ..s
        })
    }

    /// A stack segment for privilege `cpl`. `vector` is #GP for loads, #TS for inner stacks.
    pub(crate) fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: u8,
        ext: u32,
    ) -> R<Segment> {
        if selector & !3 == 0 {
            if self.bits == 64 && cpl < 3 && selector as u8 & 3 == cpl && vector == Exception::GP {
                let null = Segment::null(selector);
                return Ok(Segment {
                    rights: null.rights | u32::from(cpl) << 5,
                    ..null
                });
            }
            return Err(self.selector_fault(vector, 0, ext));
        }
        let d = self.descriptor(selector, vector, ext)?;
        let s = Segment::from_descriptor(selector, d.low);
        if selector as u8 & 3 != cpl || s.dpl() != cpl || !s.writable() {
            return Err(self.selector_fault(vector, selector, ext));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::SS, selector, ext));
        }
        self.mark_accessed(d)?;
        Ok(Segment {
            rights: s.rights | 1,
            ..s
        })
    }

    /// Checks a code segment for a far jump or call without a change of privilege.
    pub(crate) fn code_segment(&mut self, selector: u16, d: Descriptor) -> R<Segment> {
        let s = Segment::from_descriptor(selector, d.low);
        let rpl = selector as u8 & 3;
        let allowed = if s.conforming() {
            s.dpl() <= self.cpl
        } else {
            rpl <= self.cpl && s.dpl() == self.cpl
        };
        let both = self.long_mode() && s.long() && s.big();
        if !s.is_code() || !allowed || both {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        self.mark_accessed(d)?;
        let selector = selector & !3 | u16::from(self.cpl);
        Ok(Segment {
            selector,
            rights: s.rights | 1,
            ..s
        })
    }

    /// Puts a code segment and RIP into place; the target must be inside of the segment.
    pub(crate) fn enter_code(&mut self, s: Segment, rip: u64) -> R<()> {
        let long = self.long_mode() && s.long();
        let inside = if long {
            self.canonical(rip)
        } else {
            rip <= u64::from(s.limit)
        };
        if !inside {
            return Err(self.gp(0));
        }
        self.seg[CS] = s;
        self.rip = rip;
        self.update_mode();
        Ok(())
    }

    /// The second 8 bytes of a system descriptor of long mode; #GP(selector) if they are outside of the table or have a type.
    pub(crate) fn upper_half(&mut self, selector: u16, d: Descriptor) -> R<u64> {
        let limit = match selector & 4 {
            0 => u64::from(self.gdtr.limit),
            _ => u64::from(self.ldtr.limit),
        };
        if u64::from(selector & !7) + 15 > limit {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        let high = self.system_read(d.at.wrapping_add(8), 8)?;
        if high >> 40 & 0x1f != 0 {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        Ok(high)
    }

    /// A descriptor of 16 bytes in long mode, 8 otherwise: TSS, LDT and gates.
    fn system_segment(&mut self, selector: u16) -> R<(Descriptor, Segment)> {
        if selector & 4 != 0 {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        let d = self.descriptor(selector, Exception::GP, 0)?;
        let mut s = Segment::from_descriptor(selector, d.low);
        if self.long_mode() {
            s.base |= self.upper_half(selector, d)? << 32;
            if !self.canonical_base(s.base) {
                return Err(self.selector_fault(Exception::GP, selector, 0));
            }
        }
        Ok((d, s))
    }

    /// LLDT.
    pub(crate) fn load_ldt(&mut self, selector: u16) -> R<()> {
        if selector & !3 == 0 {
            self.ldtr = Segment::null(selector);
            return Ok(());
        }
        let (_, s) = self.system_segment(selector)?;
        if s.is_memory() || s.kind() != 2 {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        self.ldtr = s;
        Ok(())
    }

    /// LTR.
    pub(crate) fn load_tr(&mut self, selector: u16) -> R<()> {
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        let (d, s) = self.system_segment(selector)?;
        let available = s.kind() == 9 || s.kind() == 1 && !self.long_mode();
        if s.is_memory() || !available {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        let byte = (d.low >> 40) as u8 | 2;
        self.system_write(d.at.wrapping_add(5), 1, byte.into())?;
        self.tr = Segment {
            rights: s.rights | 2,
            ..s
        };
        Ok(())
    }

    /// Makes data segments unusable that a lower privilege may not hold.
    pub(crate) fn drop_privileged_segments(&mut self) {
        for seg in [0, 3, 4, 5] {
            let s = &self.seg[seg];
            let checked = !(s.is_code() && s.conforming());
            if s.usable() && s.is_memory() && checked && s.dpl() < self.cpl {
                // The base stays, and 64-bit code still adds that of FS and GS.
                self.seg[seg] = Segment {
                    base: s.base,
                    limit: s.limit,
                    ..Segment::null(0)
                };
            }
        }
        self.update_mode();
    }
}
