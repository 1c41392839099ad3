//! Far calls and jumps through call gates (Intel SDM volume 2, CALL and JMP; volume 3, 6.8.3 to 6.8.6).

use crate::descriptor::Descriptor;
use crate::fault::Exception;
use crate::segment::{CS, SS, Segment};
use crate::state::{Core, R};

/// Type of a gate of 16-bit code; [`WIDE`] has offsets and elements of 32 bits, or 64 in long mode.
pub(crate) const NARROW: u8 = 4;
pub(crate) const WIDE: u8 = 12;

impl Core {
    /// Far JMP or CALL to a call gate. RIP is already that of the next instruction.
    pub(crate) fn far_gate(&mut self, selector: u16, gate: Descriptor, call: bool) -> R<()> {
        if gate.dpl() < self.cpl.max(selector as u8 & 3) {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        if !gate.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        let (offset, size) = if self.long_mode() {
            let high = self.upper_half(selector, gate)?;
            (wide_offset(gate.low) | high << 32, 8)
        } else if gate.kind() == WIDE {
            (wide_offset(gate.low), 4)
        } else {
            (gate.low & 0xffff, 2)
        };
        let target = (gate.low >> 16) as u16;
        let code = self.gate_code(target, call)?;
        if call && !code.conforming() && code.dpl() < self.cpl {
            let parameters = if size == 8 { 0 } else { gate.low >> 32 & 0x1f };
            return self.call_inner(code, offset, size, parameters);
        }
        let code = Segment {
            selector: target & !3 | u16::from(self.cpl),
            ..code
        };
        if call {
            self.push(size, self.seg[CS].selector.into())?;
            self.push(size, self.rip)?;
        }
        self.enter_code(code, offset)
    }

    /// The code segment that a gate names.
    fn gate_code(&mut self, selector: u16, call: bool) -> R<Segment> {
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        let d = self.descriptor(selector, Exception::GP, 0)?;
        let s = Segment::from_descriptor(selector, d.low);
        let level = if call || s.conforming() {
            s.dpl() <= self.cpl
        } else {
            s.dpl() == self.cpl
        };
        let bad_size = self.long_mode() && (!s.long() || s.big());
        if !s.is_code() || !level || bad_size {
            return Err(self.selector_fault(Exception::GP, selector, 0));
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

    /// A call to an inner privilege: a stack from the task state segment, with `parameters` elements of the caller's.
    fn call_inner(&mut self, code: Segment, offset: u64, size: u32, parameters: u64) -> R<()> {
        let cpl = code.dpl();
        let mut frame = self.inner_stack(cpl, 0)?;
        let inside = if self.long_mode() {
            self.canonical(offset)
        } else {
            offset <= u64::from(code.limit)
        };
        if !inside {
            return Err(self.gp(0));
        }
        frame.push(self, size, self.seg[SS].selector.into())?;
        frame.push(self, size, self.r[4])?;
        for n in (0..parameters).rev() {
            let at = self.r[4].wrapping_add(n * u64::from(size)) & self.stack_mask();
            let value = self.read(SS, at, size)?;
            frame.push(self, size, value)?;
        }
        frame.push(self, size, self.seg[CS].selector.into())?;
        frame.push(self, size, self.rip)?;
        self.enter_frame(&frame);
        self.seg[CS] = Segment {
            selector: code.selector & !3 | u16::from(cpl),
            ..code
        };
        self.rip = offset;
        self.update_mode();
        Ok(())
    }
}

fn wide_offset(low: u64) -> u64 {
    low & 0xffff | low >> 32 & 0xffff_0000
}
