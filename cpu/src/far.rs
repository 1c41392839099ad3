//! Far jumps, calls and returns, IRET, and the fast system calls.

use crate::call_gate::{NARROW, WIDE};
use crate::descriptor::Descriptor;
use crate::fault::Exception;
use crate::flags;
use crate::segment::{CS, SS, Segment};
use crate::state::{Core, EFER_SCE, R};
use crate::task::Source;

/// A flat segment of a system call.
fn flat(selector: u16, code: bool, dpl: u8, long: bool) -> Segment {
    let kind = if code { 0x9b } else { 0x93 };
    let size = if long { 1 << 13 } else { 1 << 14 };
    let rights = kind | u32::from(dpl) << 5 | size | 1 << 15;
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    }
}

impl Core {
    fn real_far(&mut self, selector: u16, offset: u64) -> R<()> {
        if offset > u64::from(self.seg[CS].limit) {
            return Err(self.gp(0));
        }
        self.seg[CS].selector = selector;
        self.seg[CS].base = u64::from(selector) << 4;
        if self.vm86() {
            self.seg[CS].limit = 0xffff;
        } else {
            self.seg[CS].rights = 0x9b;
        }
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    /// Far JMP, or CALL with `push` bytes an element. RIP is already that of the next instruction.
    pub(crate) fn far(&mut self, selector: u16, offset: u64, push: Option<u32>) -> R<()> {
        let (sp, task) = (self.r[4], self.tr.selector);
        let result = self.far_inner(selector, offset, push);
        // A new task has its own stack.
        if result.is_err() && self.tr.selector == task {
            self.r[4] = sp;
        }
        result
    }

    fn far_inner(&mut self, selector: u16, offset: u64, push: Option<u32>) -> R<()> {
        let target = if self.paragraphs() {
            None
        } else {
            if selector & !3 == 0 {
                return Err(self.gp(0));
            }
            let d = self.descriptor(selector, Exception::GP, 0)?;
            match d.kind() {
                0x18..=0x1f => Some(self.code_segment(selector, d)?),
                1 | 5 | 9 if !self.long_mode() => {
                    return self.far_task(selector, d, push.is_some());
                }
                NARROW if !self.long_mode() => return self.far_gate(selector, d, push.is_some()),
                WIDE => return self.far_gate(selector, d, push.is_some()),
                _ => return Err(self.selector_fault(Exception::GP, selector, 0)),
            }
        };
        if let Some(size) = push {
            self.push(size, self.seg[CS].selector.into())?;
            self.push(size, self.rip)?;
        }
        match target {
            Some(s) => self.enter_code(s, offset),
            None => self.real_far(selector, offset),
        }
    }

    /// Far JMP or CALL to a task state segment or a task gate.
    fn far_task(&mut self, selector: u16, d: Descriptor, call: bool) -> R<()> {
        if d.dpl() < self.cpl.max(selector as u8 & 3) {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        if !d.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        let target = match d.kind() {
            5 => (d.low >> 16) as u16,
            _ => selector,
        };
        let source = if call { Source::Call } else { Source::Jump };
        self.switch_task(target, source, self.rip, None)
    }

    /// Far RET with `size` bytes an element and `extra` bytes to drop.
    pub(crate) fn far_return(&mut self, size: u32, extra: u64) -> R<()> {
        let sp = self.r[4];
        let result = self.far_return_inner(size, extra);
        if result.is_err() {
            self.r[4] = sp;
        }
        result
    }

    fn far_return_inner(&mut self, size: u32, extra: u64) -> R<()> {
        let rip = self.pop(size)?;
        let selector = self.pop(size)? as u16;
        if self.paragraphs() {
            self.real_far(selector, rip)?;
            self.set_sp(self.r[4].wrapping_add(extra));
            return Ok(());
        }
        let (code, outer) = self.return_segment(selector)?;
        if !outer {
            self.enter_code(code, rip)?;
            self.set_sp(self.r[4].wrapping_add(extra));
            return Ok(());
        }
        self.set_sp(self.r[4].wrapping_add(extra));
        let new_sp = self.pop(size)?;
        let stack = self.pop(size)? as u16;
        self.return_outer(code, rip, stack, new_sp)?;
        self.set_sp(self.r[4].wrapping_add(extra));
        Ok(())
    }

    /// Checks the code segment of a return; true if it is to an outer privilege.
    fn return_segment(&mut self, selector: u16) -> R<(Segment, bool)> {
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        let d = self.descriptor(selector, Exception::GP, 0)?;
        let s = Segment::from_descriptor(selector, d.low);
        let rpl = selector as u8 & 3;
        let dpl_ok = if s.conforming() {
            s.dpl() <= rpl
        } else {
            s.dpl() == rpl
        };
        let both = self.long_mode() && s.long() && s.big();
        if !s.is_code() || rpl < self.cpl || !dpl_ok || both {
            return Err(self.selector_fault(Exception::GP, selector, 0));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        self.mark_accessed(d)?;
        Ok((
            Segment {
                rights: s.rights | 1,
                ..s
            },
            rpl > self.cpl,
        ))
    }

    fn return_outer(&mut self, code: Segment, rip: u64, stack: u16, sp: u64) -> R<()> {
        let cpl = code.selector as u8 & 3;
        let long = self.long_mode() && code.long();
        let seg = if stack & !3 == 0 && long && cpl < 3 && stack as u8 & 3 == cpl {
            let null = Segment::null(stack);
            Segment {
                rights: null.rights | u32::from(cpl) << 5,
                ..null
            }
        } else {
            self.stack_segment(stack, cpl, Exception::GP, 0)?
        };
        let inside = if long {
            self.canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if !inside {
            return Err(self.gp(0));
        }
        self.seg[CS] = code;
        self.seg[SS] = seg;
        self.rip = rip;
        self.update_mode();
        self.r[4] = match self.stack_mask() {
            0xffff => self.r[4] & !0xffff | sp & 0xffff,
            mask => sp & mask,
        };
        self.drop_privileged_segments();
        Ok(())
    }

    /// IRET, IRETD, IRETQ.
    pub(crate) fn iret(&mut self, size: u32) -> R<()> {
        let (sp, task) = (self.r[4], self.tr.selector);
        let result = self.iret_inner(size);
        if result.is_ok() {
            self.nmi_blocked = false;
        } else if self.tr.selector == task {
            // A new task has its own stack.
            self.r[4] = sp;
        }
        result
    }

    fn iret_inner(&mut self, size: u32) -> R<()> {
        self.require_flags_in_vm86(size)?;
        if !self.paragraphs() && self.system_flags & flags::NT != 0 {
            if self.long_mode() {
                return Err(self.gp(0));
            }
            let back = self.system_read(self.tr.base, 2)? as u16;
            return self.switch_task(back, Source::Iret, self.rip, None);
        }
        let rip = self.pop(size)?;
        let selector = self.pop(size)? as u16;
        let image = self.pop(size)?;
        if self.paragraphs() {
            let virtual_flags = self.check_virtual_flags(image)?;
            let iopl = if self.vm86() { flags::IOPL } else { 0 };
            let kept = iopl | flags::VM | flags::VIF | flags::VIP;
            self.real_far(selector, rip)?;
            match virtual_flags {
                Some(image) => self.load_virtual_flags(image),
                None => self.load_flags(image, size, !kept),
            }
            return Ok(());
        }
        if image & flags::VM != 0 && self.cpl == 0 && !self.long_mode() && size == 4 {
            return self.iret_to_vm86(rip, selector, image);
        }
        let (code, outer) = self.return_segment(selector)?;
        let may_if = self.cpl <= self.iopl();
        let mut changed = !flags::VM;
        if self.cpl != 0 {
            changed &= !(flags::IOPL | flags::VIF | flags::VIP);
        }
        if !may_if {
            changed &= !flags::IF;
        }
        if outer || self.bits == 64 {
            let new_sp = self.pop(size)?;
            let stack = self.pop(size)? as u16;
            self.return_outer(code, rip, stack, new_sp)?;
        } else {
            self.enter_code(code, rip)?;
        }
        self.load_flags(image, size, changed);
        Ok(())
    }

    fn iret_to_vm86(&mut self, rip: u64, selector: u16, image: u64) -> R<()> {
        let mut words = [0; 6];
        for word in &mut words {
            *word = self.pop(4)?;
        }
        self.set_rflags(image);
        let [sp, ss, es, ds, fs, gs] = words;
        for (seg, value) in [
            (0, es),
            (1, selector.into()),
            (2, ss),
            (3, ds),
            (4, fs),
            (5, gs),
        ] {
            let real = Segment::real(value as u16, false);
            self.seg[seg] = Segment {
                rights: 0xf3,
                ..real
            };
        }
        self.r[4] = sp & 0xffff_ffff;
        self.rip = rip & 0xffff;
        self.update_mode();
        Ok(())
    }

    /// Writes the flags of `image` that are in `changed`; with 2 bytes only the low half.
    pub(crate) fn load_flags(&mut self, image: u64, size: u32, changed: u64) {
        let changed = if size == 2 { changed & 0xffff } else { changed };
        let value = self.rflags() & !changed | image & changed;
        let value = value & !(1 << 3 | 1 << 5 | 1 << 15);
        self.set_rflags(value);
        self.update_mode();
    }

    /// SYSCALL; RIP is that of the next instruction. Outside of 64-bit mode it is AMD's alone.
    pub(crate) fn syscall(&mut self) -> R<()> {
        if self.efer & EFER_SCE == 0 || self.bits != 64 && !self.cpuid.is_amd() {
            return Err(self.ud());
        }
        let long = self.long_mode();
        let star = self.msrs.star;
        let before = self.system_flags;
        self.r[1] = self.rip;
        let mut cleared = flags::RF;
        self.rip = if long {
            self.r[11] = self.rflags() & !flags::RF;
            cleared |= self.msrs.fmask;
            if self.bits == 64 {
                self.msrs.lstar
            } else {
                self.msrs.cstar
            }
        } else {
            cleared |= flags::IF | flags::VM;
            star & 0xffff_ffff
        };
        let value = self.rflags() & !cleared;
        self.set_rflags(value);
        let selector = (star >> 32) as u16 & !3;
        self.seg[CS] = flat(selector, true, 0, long);
        self.seg[SS] = flat(selector.wrapping_add(8), false, 0, false);
        self.update_mode();
        self.step_at_end(before);
        Ok(())
    }

    /// SYSRET with 4 or 8 bytes of RCX.
    pub(crate) fn sysret(&mut self, size: u32) -> R<()> {
        let known = self.bits == 64 || self.protected() && self.cpuid.is_amd();
        if self.efer & EFER_SCE == 0 || !known {
            return Err(self.ud());
        }
        if self.cpl != 0 {
            return Err(self.gp(0));
        }
        let before = self.system_flags;
        let base = (self.msrs.star >> 48) as u16;
        let rip = if size == 8 {
            self.r[1]
        } else {
            self.r[1] & 0xffff_ffff
        };
        if !self.canonical(rip) {
            return Err(self.gp(0));
        }
        let flags = match self.long_mode() {
            true => self.r[11] & !(flags::RF | flags::VM),
            false => self.rflags() | flags::IF,
        };
        self.set_rflags(flags);
        let selector = if size == 8 {
            base.wrapping_add(16)
        } else {
            base
        };
        self.seg[CS] = flat(selector | 3, true, 3, size == 8);
        self.seg[SS] = flat(base.wrapping_add(8) | 3, false, 3, false);
        self.rip = rip;
        self.update_mode();
        self.step_at_end(before);
        Ok(())
    }

    /// SYSENTER. AMD's processors have it outside of long mode only.
    pub(crate) fn sysenter(&mut self) -> R<()> {
        if self.long_mode() && self.cpuid.is_amd() {
            return Err(self.ud());
        }
        let selector = self.msrs.sysenter_cs as u16 & !3;
        if !self.protected() || selector == 0 {
            return Err(self.gp(0));
        }
        let long = self.long_mode();
        self.system_flags &= !(flags::VM | flags::IF | flags::RF);
        self.seg[CS] = flat(selector, true, 0, long);
        self.seg[SS] = flat(selector.wrapping_add(8), false, 0, false);
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.rip = self.msrs.sysenter_eip & mask;
        self.r[4] = self.msrs.sysenter_esp & mask;
        self.update_mode();
        Ok(())
    }

    /// SYSEXIT with 4- or 8-byte operands; as SYSENTER on AMD's processors.
    pub(crate) fn sysexit(&mut self, size: u32) -> R<()> {
        if self.long_mode() && self.cpuid.is_amd() {
            return Err(self.ud());
        }
        let base = self.msrs.sysenter_cs as u16 & !3;
        if !self.protected() || self.cpl != 0 || base == 0 {
            return Err(self.gp(0));
        }
        let mask = if size == 8 { u64::MAX } else { 0xffff_ffff };
        let (rip, sp) = (self.r[2] & mask, self.r[1] & mask);
        if size == 8 && !(self.canonical(rip) && self.canonical(sp)) {
            return Err(self.gp(0));
        }
        let selector = base.wrapping_add(if size == 8 { 32 } else { 16 });
        self.seg[CS] = flat(selector | 3, true, 3, size == 8);
        self.seg[SS] = flat(selector.wrapping_add(8) | 3, false, 3, false);
        self.rip = rip;
        self.r[4] = sp;
        self.update_mode();
        Ok(())
    }
}
