//! String instructions, with their repetition.

use iced_x86::{Instruction, OpKind, Register};

use crate::alu;
use crate::exec::Exec;
use crate::exit::{Cause, PortAccess};
use crate::flags::{self, zero};
use crate::operand::segment_number;
use crate::segment::ES;
use crate::state::{Core, Pending, R};

/// Elements after which a repeated instruction gives events a chance.
const CHUNK: u64 = 4096;

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    use iced_x86::Code as C;
    Some(match i.code() {
        C::Movsb_m8_m8 | C::Movsw_m16_m16 | C::Movsd_m32_m32 | C::Movsq_m64_m64 => movs,
        C::Cmpsb_m8_m8 | C::Cmpsw_m16_m16 | C::Cmpsd_m32_m32 | C::Cmpsq_m64_m64 => cmps,
        C::Scasb_AL_m8 | C::Scasw_AX_m16 | C::Scasd_EAX_m32 | C::Scasq_RAX_m64 => scas,
        C::Stosb_m8_AL | C::Stosw_m16_AX | C::Stosd_m32_EAX | C::Stosq_m64_RAX => stos,
        C::Lodsb_AL_m8 | C::Lodsw_AX_m16 | C::Lodsd_EAX_m32 | C::Lodsq_RAX_m64 => lods,
        C::Insb_m8_DX | C::Insw_m16_DX | C::Insd_m32_DX => ins,
        C::Outsb_DX_m8 | C::Outsw_DX_m16 | C::Outsd_DX_m32 => outs,
        _ => return None,
    })
}

/// The registers of a string instruction.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    size: u32,
    /// Bytes of RSI, RDI and RCX that count.
    address: u32,
    segment: usize,
}

impl Form {
    fn of(i: &Instruction) -> Self {
        let kinds = [i.op0_kind(), i.op1_kind()];
        let address = if kinds.iter().any(|k| {
            matches!(
                k,
                OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI
            )
        }) {
            8
        } else if kinds.iter().any(|k| {
            matches!(
                k,
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
            )
        }) {
            4
        } else {
            2
        };
        let segment = match i.memory_segment() {
            Register::None => 3,
            r => segment_number(r),
        };
        Self {
            size: i.memory_size().size() as u32,
            address,
            segment,
        }
    }
}

impl Core {
    pub(crate) fn step_index(&mut self, n: usize, f: Form) {
        let size = u64::from(f.size);
        let delta = if self.system_flags & flags::DF != 0 {
            size.wrapping_neg()
        } else {
            size
        };
        let value = zero(self.r[n].wrapping_add(delta), f.address);
        self.set_gpr(n, f.address, value);
    }

    /// Runs `one` once, or RCX times. Each element is complete before the next one begins, so a
    /// fault leaves the registers at the element that faulted.
    fn repeat(
        &mut self,
        i: &Instruction,
        f: Form,
        compares: bool,
        one: impl FnMut(&mut Self) -> R<()>,
    ) -> R<()> {
        self.repeat_many(i, f, compares, |_, _| 0, one)
    }

    /// The same; `many` does up to so many elements at once, if it can, and returns their number.
    fn repeat_many(
        &mut self,
        i: &Instruction,
        f: Form,
        compares: bool,
        mut many: impl FnMut(&mut Self, u64) -> u64,
        mut one: impl FnMut(&mut Self) -> R<()>,
    ) -> R<()> {
        let (rep, repne) = (i.has_rep_prefix(), i.has_repne_prefix());
        if !rep && !repne {
            return one(self);
        }
        // A debug trap comes after each element.
        let trapped = self.watched || self.steps();
        let mut left = if trapped { 1 } else { CHUNK };
        while left > 0 {
            let count = zero(self.r[1], f.address);
            if count == 0 {
                return Ok(());
            }
            let mut done = many(self, count.min(left));
            if done == 0 {
                one(self)?;
                done = 1;
            }
            self.set_gpr(1, f.address, count - done);
            if done == count || compares && self.f.zf() == repne {
                return Ok(());
            }
            left -= done;
        }
        // Continue with the same instruction, after a look at events and budget.
        self.pending = Pending::None;
        self.again = true;
        Ok(())
    }
}

fn movs(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    let many = |c: &mut Core, most| c.move_many(f, most);
    c.repeat_many(i, f, false, many, |c| {
        let v = c.read(f.segment, zero(c.r[6], f.address), f.size)?;
        c.write(ES, zero(c.r[7], f.address), f.size, v)?;
        c.step_index(6, f);
        c.step_index(7, f);
        Ok(())
    })
}

fn cmps(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    c.repeat(i, f, true, |c| {
        let a = c.read(f.segment, zero(c.r[6], f.address), f.size)?;
        let b = c.read(ES, zero(c.r[7], f.address), f.size)?;
        alu::binary(&mut c.f, alu::CMP, a, b, f.size);
        c.step_index(6, f);
        c.step_index(7, f);
        Ok(())
    })
}

fn scas(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    c.repeat(i, f, true, |c| {
        let b = c.read(ES, zero(c.r[7], f.address), f.size)?;
        let a = zero(c.r[0], f.size);
        alu::binary(&mut c.f, alu::CMP, a, b, f.size);
        c.step_index(7, f);
        Ok(())
    })
}

fn stos(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    let many = |c: &mut Core, most| c.store_many(f, most);
    c.repeat_many(i, f, false, many, |c| {
        c.write(ES, zero(c.r[7], f.address), f.size, c.r[0])?;
        c.step_index(7, f);
        Ok(())
    })
}

fn lods(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    c.repeat(i, f, false, |c| {
        let v = c.read(f.segment, zero(c.r[6], f.address), f.size)?;
        c.set_gpr(0, f.size, v);
        c.step_index(6, f);
        Ok(())
    })
}

fn string_port(c: &Core, i: &Instruction, f: Form, input: bool) -> PortAccess {
    PortAccess {
        port: c.r[2] as u16,
        size: f.size as u8,
        input,
        string: true,
        repeat: i.has_rep_prefix() || i.has_repne_prefix(),
        immediate: false,
        address_size: f.address as u8,
        segment: if input { ES as u8 } else { f.segment as u8 },
        value: 0,
    }
}

impl Core {
    /// Leaves for a string access that the bus does not carry out. The exit has the linear
    /// address of the element.
    fn string_exit(&mut self, i: &Instruction, io: PortAccess, linear: u64) -> crate::state::Stop {
        let stop = self.exit(Cause::Io(io), i.len() as u8);
        if let Pending::Exit(e) = &mut self.pending {
            e.linear = Some(linear);
        }
        stop
    }
}

fn ins(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    c.repeat(i, f, false, |c| {
        let io = string_port(c, i, f, true);
        c.port_allowed(io.port, io.size)?;
        let offset = zero(c.r[7], f.address);
        let at = c.linear(ES, offset, f.size.into(), true)?;
        c.probe_write(ES, at, f.size as usize)?;
        let answer = if c.controls.io {
            None
        } else {
            c.bus.port_in(io.port, io.size)
        };
        let Some(value) = answer else {
            return Err(c.string_exit(i, io, at));
        };
        c.write(ES, offset, f.size, value.into())?;
        c.step_index(7, f);
        Ok(())
    })
}

fn outs(c: &mut Core, i: &Instruction) -> R<()> {
    let f = Form::of(i);
    c.repeat(i, f, false, |c| {
        let mut io = string_port(c, i, f, false);
        c.port_allowed(io.port, io.size)?;
        let offset = zero(c.r[6], f.address);
        let at = c.linear(f.segment, offset, f.size.into(), false)?;
        io.value = c.load_sized(f.segment, at, f.size)? as u32;
        let done = !c.controls.io && c.bus.port_out(io.port, io.size, io.value).is_some();
        if !done {
            return Err(c.string_exit(i, io, at));
        }
        c.step_index(6, f);
        Ok(())
    })
}

impl Core {
    /// True if elements of 64-bit mode go upwards.
    fn goes_up(&self, f: Form) -> bool {
        self.bits == 64 && f.address == 8 && self.system_flags & flags::DF == 0
    }

    /// Up to `most` elements of REP STOS inside of a page that has a write tag. Returns how many it stored.
    fn store_many(&mut self, f: Form, most: u64) -> u64 {
        if !self.goes_up(f) {
            return 0;
        }
        let (to, value) = (self.r[7], self.r[0]);
        let done = self.tlb.store_many(self.set, to, value, f.size, most);
        self.r[7] = to.wrapping_add(done * u64::from(f.size));
        done
    }

    /// The same for REP MOVS between two pages.
    fn move_many(&mut self, f: Form, most: u64) -> u64 {
        if !self.goes_up(f) {
            return 0;
        }
        let from = self.r[6].wrapping_add(self.base[f.segment]);
        let done = self.tlb.move_many(self.set, from, self.r[7], f.size, most);
        let bytes = done * u64::from(f.size);
        self.r[6] = self.r[6].wrapping_add(bytes);
        self.r[7] = self.r[7].wrapping_add(bytes);
        done
    }
}
