//! Hardware task switches (Intel SDM volume 3, chapter 8; outside of long mode).

use crate::breakpoint::BT;
use crate::descriptor::Descriptor;
use crate::exit::Cause;
use crate::fault::Exception;
use crate::flags;
use crate::segment::{CS, SS, Segment};
use crate::state::{CR0_PG, CR0_TS, Core, R};

/// Reason for a switch, in the order of VMX's qualification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Call = 0,
    Iret = 1,
    Jump = 2,
    /// A task gate in the interrupt table.
    Gate = 3,
}

/// Places in a task state segment of 16 or 32 bits.
struct Layout {
    /// Bytes of an element, of all of it, and of the part that a switch saves.
    size: usize,
    bytes: u64,
    ip: u64,
    flags: u64,
    gpr: u64,
    segments: u64,
    /// ES, CS, SS and DS, or those and FS and GS.
    count: u64,
    ldt: u64,
}

const WIDE: Layout = Layout {
    size: 4,
    bytes: 0x68,
    ip: 0x20,
    flags: 0x24,
    gpr: 0x28,
    segments: 0x48,
    count: 6,
    ldt: 0x60,
};
const NARROW: Layout = Layout {
    size: 2,
    bytes: 0x2c,
    ip: 0xe,
    flags: 0x10,
    gpr: 0x12,
    segments: 0x22,
    count: 4,
    ldt: 0x2a,
};
const CR3: u64 = 0x1c;
const TRAP: u64 = 0x64;

const BUSY: u8 = 2;

fn layout(kind: u8) -> &'static Layout {
    if kind & 8 != 0 { &WIDE } else { &NARROW }
}

/// The registers that a task state segment holds.
struct Task {
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    cr3: Option<u64>,
    trap: bool,
}

impl Core {
    /// Switches to the task of a selector, or exits. `next` is where the old task goes on, `code` the error code
    /// of the event that brings the switch.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        source: Source,
        next: u64,
        code: Option<u32>,
    ) -> R<()> {
        if self.controls.task_switches {
            let (source, len) = (source as u8, self.len);
            return Err(self.exit(Cause::TaskSwitch { selector, source }, len));
        }
        let (d, to) = self.new_task(selector, source)?;
        let from = self.tr;
        self.save_task(&from, source, next)?;
        let task = self.read_task(&to)?;
        if matches!(source, Source::Jump | Source::Iret) {
            self.set_busy(from.selector, false)?;
        }
        let nested = matches!(source, Source::Call | Source::Gate);
        if nested {
            self.system_write(to.base, 2, from.selector.into())?;
        }
        if source != Source::Iret {
            let byte = (d.low >> 40) as u8 | BUSY;
            self.system_write(d.at.wrapping_add(5), 1, byte.into())?;
        }
        self.tr = Segment {
            rights: to.rights | u32::from(BUSY),
            ..to
        };
        self.load_task(&task, nested)?;
        if let Some(code) = code {
            let size = layout(to.kind()).size as u32;
            self.push(size, code.into())?;
        }
        if task.trap {
            self.debug |= BT;
            self.attention = true;
        }
        Ok(())
    }

    /// The segment of the new task: available, or busy for IRET.
    fn new_task(&mut self, selector: u16, source: Source) -> R<(Descriptor, Segment)> {
        let back = source == Source::Iret;
        let vector = if back { Exception::TS } else { Exception::GP };
        if selector & 4 != 0 || selector & !3 == 0 {
            return Err(self.selector_fault(vector, selector, 0));
        }
        let d = self.descriptor(selector, vector, 0)?;
        let s = Segment::from_descriptor(selector, d.low);
        let wanted = if back { [3, 11] } else { [1, 9] };
        if s.is_memory() || !wanted.contains(&s.kind()) {
            return Err(self.selector_fault(vector, selector, 0));
        }
        if !s.present() {
            return Err(self.selector_fault(Exception::NP, selector, 0));
        }
        // The last word of a wide one is the map of ports, which no switch needs.
        let least = if s.kind() & 8 != 0 { 0x67 } else { 0x2b };
        if s.limit < least {
            return Err(self.selector_fault(Exception::TS, selector, 0));
        }
        Ok((d, s))
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> R<()> {
        let d = self.descriptor(selector, Exception::TS, 0)?;
        let byte = (d.low >> 40) as u8 & !BUSY | if busy { BUSY } else { 0 };
        self.system_write(d.at.wrapping_add(5), 1, byte.into())
    }

    /// Writes the registers of the running task to its segment.
    fn save_task(&mut self, to: &Segment, source: Source, next: u64) -> R<()> {
        let l = layout(to.kind());
        let mut flags = self.rflags();
        if source == Source::Iret {
            flags &= !flags::NT;
        }
        // All of it can be written, or nothing is.
        let last = l.segments + l.count * l.size as u64;
        let mut data = [0; 0x68];
        let used = &mut data[..last as usize];
        self.read_linear(0, self.wrap(to.base), used, crate::paging::SYSTEM_READ)?;
        let mut put = |at: u64, value: u64| {
            let at = at as usize;
            used[at..at + l.size].copy_from_slice(&value.to_le_bytes()[..l.size]);
        };
        put(l.ip, next);
        put(l.flags, flags);
        for n in 0..8 {
            put(l.gpr + n * l.size as u64, self.r[n as usize]);
        }
        for n in 0..l.count {
            let selector = self.seg[n as usize].selector;
            put(l.segments + n * l.size as u64, selector.into());
        }
        let first = l.ip as usize;
        let at = self.wrap(to.base.wrapping_add(l.ip));
        let bytes = data;
        let saved = &bytes[first..last as usize];
        self.write_linear(0, at, saved, crate::paging::SYSTEM_WRITE)
    }

    fn read_task(&mut self, from: &Segment) -> R<Task> {
        let l = layout(from.kind());
        let mut data = [0; 0x68];
        let used = &mut data[..l.bytes as usize];
        self.read_linear(0, self.wrap(from.base), used, crate::paging::SYSTEM_READ)?;
        let get = |at: u64| {
            let at = at as usize;
            let mut bytes = [0; 8];
            bytes[..l.size].copy_from_slice(&data[at..at + l.size]);
            u64::from_le_bytes(bytes)
        };
        let wide = l.size == 4;
        let size = l.size as u64;
        let mut gpr = [0; 8];
        for (n, value) in (0..).zip(&mut gpr) {
            let upper = if wide { 0 } else { 0xffff_0000 };
            *value = get(l.gpr + n * size) | upper;
        }
        let mut segments = [0; 6];
        for (n, selector) in (0..l.count).zip(&mut segments) {
            *selector = get(l.segments + n * size) as u16;
        }
        Ok(Task {
            ip: get(l.ip),
            flags: get(l.flags),
            gpr,
            segments,
            ldt: get(l.ldt) as u16,
            cr3: wide.then(|| get(CR3)),
            trap: wide && get(TRAP) & 1 != 0,
        })
    }

    /// Takes the registers of the new task. A fault from here on is the new task's.
    fn load_task(&mut self, task: &Task, nested: bool) -> R<()> {
        self.cr0 |= CR0_TS;
        if let Some(cr3) = task.cr3.filter(|_| self.cr0 & CR0_PG != 0) {
            self.cr3 = cr3;
            self.flush_linear();
        }
        self.rip = task.ip;
        self.r[..8].copy_from_slice(&task.gpr);
        let nt = if nested { flags::NT } else { 0 };
        self.set_rflags(task.flags | nt);
        // Breakpoints that only this task had.
        self.dr[7] &= !0x55;
        for (n, selector) in task.segments.into_iter().enumerate() {
            self.seg[n] = Segment::null(selector);
        }
        self.ldtr = Segment::null(task.ldt);
        self.update_watch();
        if self.vm86() {
            for (n, selector) in task.segments.into_iter().enumerate() {
                self.seg[n] = Segment {
                    rights: 0xf3,
                    ..Segment::real(selector, false)
                };
            }
            self.update_mode();
            return Ok(());
        }
        self.load_task_segments(task)
    }

    fn load_task_segments(&mut self, task: &Task) -> R<()> {
        let cpl = task.segments[CS] as u8 & 3;
        // Until SS is loaded nothing else tells the privilege.
        self.seg[SS].rights |= u32::from(cpl) << 5;
        self.update_mode();
        if task.ldt & !3 != 0 {
            let d = self.descriptor(task.ldt, Exception::TS, 0)?;
            let s = Segment::from_descriptor(task.ldt, d.low);
            if task.ldt & 4 != 0 || s.is_memory() || s.kind() != 2 || !s.present() {
                return Err(self.selector_fault(Exception::TS, task.ldt, 0));
            }
            self.ldtr = s;
        }
        let code = self.task_code(task.segments[CS])?;
        self.seg[CS] = code;
        self.seg[SS] = self.stack_segment(task.segments[SS], cpl, Exception::TS, 0)?;
        self.update_mode();
        for n in [0, 3, 4, 5] {
            let selector = task.segments[n];
            if selector & !3 != 0 {
                self.seg[n] = self.data_segment(selector, Exception::TS)?;
            }
        }
        self.update_mode();
        if self.rip > u64::from(self.seg[CS].limit) {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn task_code(&mut self, selector: u16) -> R<Segment> {
        if selector & !3 == 0 {
            return Err(self.selector_fault(Exception::TS, selector, 0));
        }
        let d = self.descriptor(selector, Exception::TS, 0)?;
        let s = Segment::from_descriptor(selector, d.low);
        let rpl = selector as u8 & 3;
        let level = if s.conforming() {
            s.dpl() <= rpl
        } else {
            s.dpl() == rpl
        };
        if !s.is_code() || !level {
            return Err(self.selector_fault(Exception::TS, selector, 0));
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
}
