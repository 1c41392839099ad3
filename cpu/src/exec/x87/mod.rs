//! The instructions of the x87: registers as a stack, exceptions, and which number goes where.

mod arith;
mod compare;
mod environment;
mod function;
mod transfer;

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use crate::exec::Exec;
use crate::fault::Exception;
use crate::fpu::{Extended, Fpu};
use crate::state::{CR0_EM, CR0_MP, CR0_TS, Core, R};
use crate::x87::number::INDEFINITE;
use crate::x87::round::{Context, DENORMAL, INVALID, STACK, ZERO_DIVIDE};

/// Condition codes and TOP of the status word.
const C0: u16 = 1 << 8;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;
/// Exceptions that keep an operation from happening while they are not masked.
const BEFORE: u16 = INVALID | DENORMAL | ZERO_DIVIDE;

pub(super) fn select(m: M) -> Option<Exec> {
    arith::select(m)
        .or_else(|| compare::select(m))
        .or_else(|| transfer::select(m))
        .or_else(|| environment::select(m))
        .or_else(|| function::select(m))
}

impl Fpu {
    fn top(&self) -> usize {
        usize::from(self.status >> 11 & 7)
    }

    fn set_top(&mut self, top: usize) {
        self.status = self.status & !0x3800 | (top as u16 & 7) << 11;
    }

    /// Number of the register ST(`n`).
    fn physical(&self, n: usize) -> usize {
        (self.top() + n) & 7
    }

    fn is_empty(&self, n: usize) -> bool {
        self.tags >> self.physical(n) & 1 == 0
    }

    fn st(&self, n: usize) -> Extended {
        self.st[self.physical(n)]
    }

    fn set_st(&mut self, n: usize, value: Extended) {
        let at = self.physical(n);
        self.st[at] = value;
        self.tags |= 1 << at;
    }

    fn free(&mut self, n: usize) {
        self.tags &= !(1 << self.physical(n));
    }

    fn pop(&mut self) {
        self.free(0);
        self.set_top(self.top() + 1);
    }

    fn pops(&mut self, count: usize) {
        (0..count).for_each(|_| self.pop());
    }

    fn set_condition(&mut self, bits: u16, value: u16) {
        self.status = self.status & !bits | value & bits;
    }
}

/// Number of a register ST(n).
fn stack_register(r: Register) -> usize {
    r.number() & 7
}

impl Core {
    /// #NM with CR0.EM or CR0.TS.
    pub(crate) fn x87(&mut self) -> R<()> {
        if self.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(self.fault(Exception::plain(Exception::NM)));
        }
        Ok(())
    }

    /// #MF for an exception that is not masked.
    pub(crate) fn x87_pending(&mut self) -> R<()> {
        if self.fpu.status & 0x80 != 0 {
            return Err(self.fault(Exception::plain(Exception::MF)));
        }
        Ok(())
    }

    /// What an instruction that waits begins with.
    fn x87_wait(&mut self) -> R<()> {
        self.x87()?;
        self.x87_pending()
    }

    /// Remembers where the instruction and its operand are, and clears C1.
    fn x87_begin(&mut self, i: &Instruction) -> R<()> {
        self.x87_remember(i)?;
        self.fpu.status &= !C1;
        Ok(())
    }

    fn x87_remember(&mut self, i: &Instruction) -> R<()> {
        self.x87_wait()?;
        self.fpu.instruction = i.ip();
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
            self.fpu.operand = self.offset(i);
        }
        Ok(())
    }

    fn x87_context(&self) -> Context {
        Context::new(self.fpu.control)
    }

    /// Takes what an operation raised. True if its result is to be used.
    fn x87_raise(&mut self, x: &Context) -> bool {
        let used = x.raised & !x.masked & BEFORE == 0;
        let f = &mut self.fpu;
        f.status |= match used {
            true => x.raised,
            // There is no result that could raise more.
            false => x.raised & BEFORE,
        };
        if used && x.up {
            f.status |= C1;
        }
        f.summarize();
        used
    }

    /// A stack fault. True if it is masked, and the indefinite number is the result.
    fn stack_fault(&mut self, overflow: bool) -> bool {
        let f = &mut self.fpu;
        f.set_condition(C1, if overflow { C1 } else { 0 });
        f.status |= INVALID | STACK;
        f.summarize();
        f.control & INVALID != 0
    }

    /// Pushes a number.
    fn x87_push(&mut self, value: Extended) {
        let mut value = value;
        if !self.fpu.is_empty(7) {
            if !self.stack_fault(true) {
                return;
            }
            value = INDEFINITE;
        }
        let f = &mut self.fpu;
        f.set_top(f.top() + 7);
        f.set_st(0, value);
    }
}

pub(super) fn wait(c: &mut Core, _: &Instruction) -> R<()> {
    if c.cr0 & (CR0_TS | CR0_MP) == CR0_TS | CR0_MP {
        return Err(c.fault(Exception::plain(Exception::NM)));
    }
    c.x87_pending()
}
