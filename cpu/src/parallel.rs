//! A processor beside others of its machine that run at the same time ([`Cpu::set_parallel`]).
//!
//! * A locked instruction reads its operand, computes, and exchanges the operand if it still holds what was read;
//!   if it does not, the instruction begins again, as nothing else has changed by then. What the host cannot
//!   exchange at once (a misaligned operand, 16 bytes on a host without CMPXCHG16B, or what only the bus reaches) is
//!   done while no other processor runs ([`Stopped::Alone`]).
//! * The first code of a frame is kept while no other processor runs, so that all of them give up their write tags
//!   of the frame before they run again. A store to a frame with code looks after it, too, whether it hit code:
//!   another processor may have decoded some meanwhile, and did so before the store or finds the difference itself.
//! * Instructions that are more than an ordinary step (those that set [`Core::attention`], among them all that
//!   serialize) are full barriers, and look for code that was dropped.

use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, Stopped};
use crate::exec::Exec;
use crate::host;
use crate::paging::WRITE;
use crate::physical::Place;
use crate::state::{Core, Pending, R, Stop};

/// The state of a locked instruction.
#[derive(Clone, Copy, Debug, Default)]
enum Lock {
    /// No locked instruction runs.
    #[default]
    None,
    /// One runs, and has not read its operand.
    Armed,
    /// It has read its operand there.
    Read(Operand),
    /// The operand was another one when it should be written.
    Lost,
}

/// An operand of up to 16 bytes as a locked instruction read it.
#[derive(Clone, Copy, Debug)]
struct Operand {
    host: NonNull<u8>,
    linear: u64,
    gpa: u64,
    size: usize,
    value: u128,
}

// SAFETY: the pointer is used in the instruction that got it only, and no processor changes its thread in an
// instruction; at other times it is a number.
unsafe impl Send for Operand {}

#[derive(Debug, Default)]
pub(crate) struct Parallel {
    /// Other processors run at the same time.
    pub(crate) on: bool,
    /// None of them runs now.
    pub(crate) alone: bool,
    /// A frame whose first code shall be kept.
    code: Option<u64>,
    /// A locked instruction that has to be alone.
    locked: bool,
    lock: Lock,
    /// The host has CMPXCHG16B.
    wide: bool,
}

impl Parallel {
    pub(crate) fn asks(&self) -> bool {
        self.code.is_some()
    }
}

/// True for instructions with LOCK, and for XCHG with memory, which locks without it.
pub(crate) fn is_locked(i: &Instruction) -> bool {
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg && memory
}

impl Core {
    /// Runs a locked instruction until its operand was not changed between its load and its store.
    pub(crate) fn run_locked(&mut self, exec: Exec, i: &Instruction) -> R<()> {
        loop {
            self.parallel.lock = Lock::Armed;
            let result = exec(self, i);
            match core::mem::take(&mut self.parallel.lock) {
                Lock::Lost => {}
                _ => return result,
            }
        }
    }

    /// Reads the operand of a locked instruction. `None` if none runs, or if the operand is read like others: in the
    /// local APIC, or with no other processor at work.
    #[inline]
    pub(crate) fn load_locked(&mut self, seg: usize, linear: u64, size: usize) -> R<Option<u128>> {
        match self.parallel.lock {
            Lock::Armed if !self.parallel.alone => self.load_operand(seg, linear, size),
            _ => Ok(None),
        }
    }

    fn load_operand(&mut self, seg: usize, linear: u64, size: usize) -> R<Option<u128>> {
        self.aligned(linear, size)?;
        let mut gpa = 0;
        let mut place = self.tlb.span(self.set, linear, true).map(|(host, _)| host);
        if place.is_none() {
            match self.first_piece(seg, linear, size, WRITE)? {
                (Place::Host { host, writable }, at) if writable => {
                    if self.pages.overlaps(at, size) {
                        self.pending = Pending::CodeWrite(at);
                        return Err(Stop);
                    }
                    gpa = at;
                    place = Some(host.as_ptr().wrapping_add(at as usize & 0xfff));
                }
                (Place::Apic, _) => return Ok(None),
                // No pointer: the bus reads and writes it.
                _ => {}
            }
        }
        let host = place.and_then(NonNull::new);
        let host = host
            .filter(|host| host.addr().get().is_multiple_of(size))
            .filter(|_| size <= 8 || self.parallel.wide);
        let Some(host) = host else {
            self.parallel.locked = true;
            self.pending = Pending::Alone;
            return Err(Stop);
        };
        // SAFETY: the operand is aligned to its size, a power of two of at most 16, and its frame to 8 bytes, so it is in the page that was just looked up,
        // whose frame is readable and writable (`Frame::new`).
        let value = unsafe {
            match size {
                16 => host::load_pair(host.as_ptr()),
                _ => host::load_sized(host.as_ptr(), size).into(),
            }
        };
        self.parallel.lock = Lock::Read(Operand {
            host,
            linear,
            gpa,
            size,
            value,
        });
        Ok(Some(value))
    }

    /// Writes the operand of a locked instruction. `None` if [`load_locked`](Self::load_locked) did not read it.
    #[inline]
    pub(crate) fn store_locked(&mut self, linear: u64, size: usize, value: u128) -> Option<R<()>> {
        match self.parallel.lock {
            Lock::Read(operand) if (operand.linear, operand.size) == (linear, size) => {
                Some(self.store_operand(&operand, value))
            }
            _ => None,
        }
    }

    fn store_operand(&mut self, operand: &Operand, value: u128) -> R<()> {
        let (host, old) = (operand.host.as_ptr(), operand.value);
        // SAFETY: `load_operand` found the place in this instruction, readable and writable, and checked its
        // alignment; it has no pair of 8 bytes without CMPXCHG16B.
        let done = unsafe {
            match operand.size {
                16 => host::exchange_pair(host, old, value),
                size => host::exchange(host, size, old as u64, value as u64),
            }
        };
        if !done {
            self.parallel.lock = Lock::Lost;
            return Err(Stop);
        }
        if operand.gpa != 0 {
            self.stored(operand.gpa, operand.size);
        }
        Ok(())
    }

    /// Looks whether a store, which did not hit code when it began, hit code that another processor has decoded
    /// meanwhile.
    pub(crate) fn stored(&mut self, gpa: u64, len: usize) {
        if self.parallel.on {
            // The other one marks the code, then reads it: either it reads what was stored, or its mark is seen.
            fence(Ordering::SeqCst);
            if self.pages.overlaps(gpa, len) {
                self.pages.forget(gpa);
            }
        }
    }

    /// Marks code that was decoded. False if it may not be kept: another processor may be writing it, or the mark
    /// would be the frame's first one; the processor asks to be alone then.
    pub(crate) fn keep_code(&mut self, gpa: u64, linear: u64, code: &[u8]) -> R<bool> {
        if !self.parallel.on || self.parallel.alone {
            if self.pages.protect(gpa, code.len()) {
                self.tlb.protect(gpa);
            }
            return Ok(true);
        }
        if !self.pages.extend(gpa, code.len()) {
            self.parallel.code = Some(gpa);
            self.attention = true;
            return Ok(false);
        }
        // See `stored`.
        fence(Ordering::SeqCst);
        self.code_is(gpa, linear, code)
    }

    /// A full barrier between the accesses before and after.
    pub(crate) fn barrier(&self) {
        if self.parallel.on {
            fence(Ordering::SeqCst);
        }
    }

    /// The clock, after the time of the host has passed on it if the bus has one.
    pub(crate) fn now(&mut self) -> u64 {
        if self.parallel.on
            && let Some(now) = self.bus.clock()
        {
            self.skipped = self.skipped.wrapping_add(now.saturating_sub(self.clock()));
            // Processors that look one after the other see time in that order.
            return now;
        }
        self.clock()
    }
}

impl Cpu {
    /// Chooses whether other processors of the machine run at the same time as this one, each on its own thread.
    ///
    /// Locked instructions are atomic then, accesses keep the order of x86 between processors, and the time is
    /// that of [`Bus::clock`](crate::Bus::clock). The caller sees to it that
    ///
    /// * all processors of the machine are told the same before they run;
    /// * no processor runs while [`run_alone`](Self::run_alone) does, which it calls after [`Stopped::Alone`].
    ///
    /// Decoded code is dropped.
    pub fn set_parallel(&mut self, parallel: bool) {
        self.core.parallel = Parallel {
            on: parallel,
            wide: host::has_pairs(),
            ..Parallel::default()
        };
        self.core.tlb.parallel = parallel;
        self.drop_blocks();
    }

    /// Does what [`Stopped::Alone`] asked for. No other processor of the machine runs meanwhile.
    pub fn run_alone(&mut self) -> Stopped {
        self.enter();
        let core = &mut self.core;
        if let Some(gpa) = core.parallel.code.take()
            && core.pages.protect(gpa, 1)
        {
            core.tlb.protect(gpa);
        }
        self.saw_protected();
        if !core::mem::take(&mut self.core.parallel.locked) {
            return Stopped::Budget;
        }
        self.core.parallel.alone = true;
        let stopped = self.finish_instruction();
        self.core.parallel.alone = false;
        self.core.barrier();
        stopped
    }
}
