//! Delivery of exceptions and interrupts through the interrupt table.

use crate::exit::Cause;
use crate::fault::{Event, EventKind, Exception};
use crate::flags;
use crate::paging::{Linear, SYSTEM_WRITE, WRITE};
use crate::segment::{CS, SS, Segment};
use crate::state::{Core, Pending, R};
use crate::task::Source;

/// The stack that a frame is pushed to.
pub(crate) struct Frame {
    seg: Segment,
    sp: u64,
    mask: u64,
    flat: bool,
    access: Linear,
    /// Error code of #SS if the frame does not fit.
    code: u32,
}

impl Frame {
    pub(crate) fn push(&mut self, core: &mut Core, size: u32, value: u64) -> R<()> {
        let sp = self.sp.wrapping_sub(size.into()) & self.mask;
        let at = if self.flat {
            sp
        } else {
            if !self.seg.contains(sp, size.into()) {
                return Err(core.fault(Exception::with_code(Exception::SS, self.code)));
            }
            self.seg.base.wrapping_add(sp) & 0xffff_ffff
        };
        core.write_linear(SS, at, &value.to_le_bytes()[..size as usize], self.access)?;
        self.sp = sp;
        Ok(())
    }
}

/// A gate of the interrupt table.
struct Gate {
    selector: u16,
    offset: u64,
    kind: u8,
    ist: u8,
}

impl Core {
    /// Delivers an event; exceptions on the way are combined with it. `Err` leaves an exit in
    /// [`Core::pending`].
    pub(crate) fn deliver(&mut self, event: Event) -> R<()> {
        let mut event = event;
        loop {
            if event.kind == EventKind::Exception
                && self.controls.exceptions >> event.vector & 1 != 0
            {
                return Err(self.exit(Cause::Exception(event), 0));
            }
            if let Some(address) = event.address {
                self.cr2 = address;
            }
            if event.kind == EventKind::Nmi {
                self.nmi_blocked = true;
            }
            if event.is_debug() {
                self.debug_delivered();
            }
            self.vectoring = Some(event);
            let result = self.deliver_once(event);
            let first = (event.kind == EventKind::Exception).then_some(event.vector);
            if result.is_ok() {
                self.vectoring = None;
                return Ok(());
            }
            let Pending::Fault(second) = self.pending else {
                if let Pending::CodeWrite(gpa) = self.pending {
                    self.pages.forget(gpa);
                    self.pending = Pending::None;
                    continue;
                }
                // An exit: the host delivers the event again, from the exit's `vectoring`.
                self.vectoring = None;
                return result;
            };
            self.pending = Pending::None;
            match Exception::combine(first, second) {
                Some(e) => event = Event::exception(e),
                None => {
                    self.vectoring = None;
                    self.shutdown = true;
                    return Err(self.exit(Cause::TripleFault, 0));
                }
            }
        }
    }

    fn deliver_once(&mut self, event: Event) -> R<()> {
        let next = match event.is_software() {
            true => self.rip.wrapping_add(event.len.into()),
            false => self.rip,
        };
        if self.protected() {
            self.deliver_protected(event, next)
        } else {
            self.deliver_real(event, next)
        }
    }

    fn deliver_real(&mut self, event: Event, next: u64) -> R<()> {
        let at = u64::from(event.vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(self.gp(u32::from(event.vector) << 3 | 2));
        }
        let entry = self.system_read(self.idtr.base.wrapping_add(at), 4)?;
        let flags = self.rflags();
        let sp = self.r[4];
        for value in [flags, self.seg[CS].selector.into(), next] {
            if let Err(stop) = self.push(2, value) {
                self.r[4] = sp;
                return Err(stop);
            }
        }
        self.system_flags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
        let selector = (entry >> 16) as u16;
        self.seg[CS].selector = selector;
        self.seg[CS].base = u64::from(selector) << 4;
        self.rip = entry & 0xffff;
        self.update_mode();
        Ok(())
    }

    fn gate(&mut self, event: Event) -> R<Gate> {
        let ext = u32::from(!matches!(
            event.kind,
            EventKind::Software | EventKind::SoftwareException
        ));
        let code = u32::from(event.vector) << 3 | 2 | ext;
        let size = if self.long_mode() { 16 } else { 8 };
        let index = u64::from(event.vector) * size;
        if index + size - 1 > u64::from(self.idtr.limit) {
            return Err(self.gp(code));
        }
        let at = self.idtr.base.wrapping_add(index);
        let low = self.system_read(at, 8)?;
        let high = if size == 16 {
            self.system_read(at.wrapping_add(8), 8)?
        } else {
            0
        };
        let kind = (low >> 40 & 0x1f) as u8;
        let known = matches!(kind, 0xe | 0xf) || size == 8 && matches!(kind, 5..=7);
        let dpl = (low >> 45 & 3) as u8;
        let software = matches!(
            event.kind,
            EventKind::Software | EventKind::SoftwareException
        );
        if !known || software && dpl < self.cpl {
            return Err(self.gp(code));
        }
        if low >> 47 & 1 == 0 {
            return Err(self.fault(Exception::with_code(Exception::NP, code)));
        }
        let selector = (low >> 16) as u16;
        let mut offset = low & 0xffff | high << 32;
        if kind & 8 != 0 {
            offset |= low >> 32 & 0xffff_0000;
        }
        let ist = if size == 16 { (low >> 32 & 7) as u8 } else { 0 };
        Ok(Gate {
            selector,
            offset,
            kind,
            ist,
        })
    }

    fn deliver_protected(&mut self, event: Event, next: u64) -> R<()> {
        let ext = u32::from(!matches!(
            event.kind,
            EventKind::Software | EventKind::SoftwareException
        ));
        let long = self.long_mode();
        let gate = self.gate(event)?;
        if gate.kind == 5 {
            self.len = event.len;
            return self.switch_task(gate.selector, Source::Gate, next, event.code);
        }
        if gate.selector & !3 == 0 {
            return Err(self.gp(ext));
        }
        let d = self.descriptor(gate.selector, Exception::GP, ext)?;
        let code = Segment::from_descriptor(gate.selector, d.low);
        let bad_size = long && (!code.long() || code.big());
        if !code.is_code() || code.dpl() > self.cpl || bad_size {
            return Err(self.selector_fault(Exception::GP, gate.selector, ext));
        }
        if !code.present() {
            return Err(self.selector_fault(Exception::NP, gate.selector, ext));
        }
        let cpl = if code.conforming() {
            self.cpl
        } else {
            code.dpl()
        };
        if self.vm86() && cpl != 0 {
            return Err(self.selector_fault(Exception::GP, gate.selector, ext));
        }
        self.mark_accessed(d)?;
        let mut frame = self.event_stack(cpl, gate.ist, ext)?;
        self.push_frame(&mut frame, event, next, cpl, gate.kind)?;
        if long && !self.canonical(gate.offset) || !long && gate.offset > u64::from(code.limit) {
            return Err(self.gp(ext));
        }
        self.finish(gate, code, cpl, &frame);
        Ok(())
    }

    /// The stack for a handler at privilege `cpl`.
    fn event_stack(&mut self, cpl: u8, ist: u8, ext: u32) -> R<Frame> {
        let long = self.long_mode();
        let mut frame = if long && ist != 0 {
            let sp = self.tss(0x24 + u64::from(ist - 1) * 8, 8, ext)?;
            self.flat_stack(cpl, sp, ext)?
        } else if cpl != self.cpl {
            self.inner_stack(cpl, ext)?
        } else if long {
            self.flat_stack(cpl, self.r[4] & self.stack_mask(), ext)?
        } else {
            self.segment_stack(self.seg[SS], cpl, self.r[4], ext)
        };
        if long {
            frame.sp &= !15;
        }
        Ok(frame)
    }

    /// The stack of an inner privilege, which the task state segment names.
    pub(crate) fn inner_stack(&mut self, cpl: u8, ext: u32) -> R<Frame> {
        if self.long_mode() {
            let sp = self.tss(4 + u64::from(cpl) * 8, 8, ext)?;
            return self.flat_stack(cpl, sp, ext);
        }
        let wide = self.tr.kind() & 8 != 0;
        let (sp, selector) = if wide {
            let at = 4 + u64::from(cpl) * 8;
            (self.tss(at, 4, ext)?, self.tss(at + 4, 2, ext)? as u16)
        } else {
            let at = 2 + u64::from(cpl) * 4;
            (self.tss(at, 2, ext)?, self.tss(at + 2, 2, ext)? as u16)
        };
        let seg = self.stack_segment(selector, cpl, Exception::TS, ext)?;
        let code = u32::from(selector & !3) | ext;
        Ok(self.segment_stack(seg, cpl, sp, code))
    }

    /// A stack of long mode. An inner one has a null segment.
    fn flat_stack(&mut self, cpl: u8, sp: u64, ext: u32) -> R<Frame> {
        if !self.canonical(sp) {
            return Err(self.fault(Exception::with_code(Exception::SS, ext)));
        }
        let seg = if cpl != self.cpl {
            let null = Segment::null(cpl.into());
            Segment {
                rights: null.rights | u32::from(cpl) << 5,
                ..null
            }
        } else {
            self.seg[SS]
        };
        Ok(Frame {
            seg,
            sp,
            mask: u64::MAX,
            flat: true,
            access: stack_access(cpl),
            code: ext,
        })
    }

    fn segment_stack(&self, seg: Segment, cpl: u8, sp: u64, code: u32) -> Frame {
        let mask = if seg.big() { 0xffff_ffff } else { 0xffff };
        Frame {
            seg,
            sp: sp & mask,
            mask,
            flat: false,
            access: stack_access(cpl),
            code,
        }
    }

    /// Makes the stack of a frame that of the processor.
    pub(crate) fn enter_frame(&mut self, frame: &Frame) {
        self.seg[SS] = frame.seg;
        self.r[4] = match frame.mask {
            0xffff => self.r[4] & !0xffff | frame.sp,
            _ => frame.sp,
        };
    }

    /// Reads a field of the task state segment.
    fn tss(&mut self, at: u64, size: usize, ext: u32) -> R<u64> {
        if at + size as u64 - 1 > u64::from(self.tr.limit) {
            return Err(self.selector_fault(Exception::TS, self.tr.selector, ext));
        }
        self.system_read(self.tr.base.wrapping_add(at), size)
    }

    fn push_frame(&mut self, f: &mut Frame, e: Event, next: u64, cpl: u8, kind: u8) -> R<()> {
        let long = self.long_mode();
        let size = if long {
            8
        } else if kind & 8 != 0 {
            4
        } else {
            2
        };
        let mut flags = self.rflags();
        if e.kind == EventKind::Exception && e.vector != Exception::DB && e.vector != Exception::DF
        {
            flags |= flags::RF;
        }
        if self.vm86() {
            for seg in [5, 4, 3, 0] {
                f.push(self, size, self.seg[seg].selector.into())?;
            }
        }
        if long || cpl != self.cpl {
            f.push(self, size, self.seg[SS].selector.into())?;
            f.push(self, size, self.r[4])?;
        }
        f.push(self, size, flags)?;
        f.push(self, size, self.seg[CS].selector.into())?;
        f.push(self, size, next)?;
        if let Some(code) = e.code {
            f.push(self, size, code.into())?;
        }
        Ok(())
    }

    fn finish(&mut self, gate: Gate, code: Segment, cpl: u8, frame: &Frame) {
        let from_vm86 = self.vm86();
        if from_vm86 {
            for seg in [0, 3, 4, 5] {
                self.seg[seg] = Segment::null(0);
            }
        }
        self.system_flags &= !(flags::TF | flags::NT | flags::RF | flags::VM);
        if gate.kind & 1 == 0 {
            self.system_flags &= !flags::IF;
        }
        self.enter_frame(frame);
        let selector = code.selector & !3 | u16::from(cpl);
        self.seg[CS] = Segment {
            selector,
            rights: code.rights | 1,
            ..code
        };
        self.rip = gate.offset;
        self.update_mode();
    }
}

/// Frames for inner privileges are written as the processor's own data.
fn stack_access(cpl: u8) -> Linear {
    if cpl < 3 { SYSTEM_WRITE } else { WRITE }
}
