//! The processor as its users see it, and the loop between blocks.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use hashbrown::HashMap;

use crate::build::{Block, Limits, Link};
use crate::bus::Bus;
use crate::cpuid::CpuidTable;
use crate::exit::{Cause, Controls, Exit};
use crate::fault::Event;
use crate::flags;
use crate::op::{BLOCK_OPS, Dispatch, Out, run};
use crate::pages::CodePages;
use crate::segment::CS;
use crate::state::{BLOCK, Core, Pending, R};

/// Reason for which [`Cpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// All instructions of the budget were executed.
    Budget,
    /// The processor is halted and no event is due. [`Cpu::deadline`] says when its timer fires.
    Halted,
    /// PAUSE: another processor of the machine should have a turn.
    Paused,
    /// The processor waits for a start-up interrupt.
    WaitsForStart,
    /// Only with [`Cpu::set_parallel`]: [`Cpu::run_alone`] has to be called before the next run, at a time at which no
    /// other processor of the machine runs.
    Alone,
    /// An exit. RIP is at the instruction.
    Exit(Exit),
}

const JUMPS: usize = 4096;
/// Decoded instructions after which everything is dropped, so that memory stays bounded.
const MOST_DECODED: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    stamp: u64,
    block: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    gpa: u64,
    rip: u64,
    bits: u8,
    limit: u32,
    /// Of one instruction: after STI and MOV SS, and for single steps.
    single: bool,
}

/// Decoded blocks.
struct Blocks {
    list: Vec<Block>,
    map: HashMap<Key, u32>,
    jumps: Box<[Jump]>,
    /// Grows when blocks are dropped: links of older epochs are not followed.
    epoch: u64,
    /// Grows when blocks have to be compared with memory.
    trust: u64,
    seen_written: u64,
    seen_protected: u64,
}

impl Blocks {
    fn new() -> Self {
        let none = Jump {
            rip: 0,
            stamp: u64::MAX,
            block: 0,
        };
        Self {
            list: Vec::new(),
            map: HashMap::new(),
            jumps: vec![none; JUMPS].into_boxed_slice(),
            epoch: 1,
            trust: 0,
            seen_written: 0,
            seen_protected: 0,
        }
    }
}

/// Place of an address in the table of jumps.
#[inline(always)]
fn slot(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize % JUMPS
}

/// The state on which it depends what an address leads to.
#[inline(always)]
fn stamp(core: &Core) -> u64 {
    core.epoch << 3 | u64::from(core.bits >> 5) << 1 | u64::from(core.cpl == 3)
}

/// Runs one block at the cost of its instructions. RF is cleared if it was set before and the block completed.
fn run_counted(core: &mut Core, block: &Block) -> Out {
    core.budget -= i64::from(block.count);
    core.r[BLOCK] = core.rip;
    let resumed = core.system_flags & flags::RF != 0;
    let out = run(core, &block.ops);
    if resumed && out != Out::Stop {
        core.system_flags &= !flags::RF;
    }
    out
}

impl Blocks {
    /// The block that RIP led to last, in the same state.
    #[inline(always)]
    fn jump(&self, core: &Core) -> Option<u32> {
        let jump = &self.jumps[slot(core.rip)];
        (jump.rip == core.rip && jump.stamp == stamp(core)).then_some(jump.block)
    }

    /// The block that follows `from`, by a link or a jump that is known.
    #[inline(always)]
    fn next(&self, core: &Core, from: &Block, out: Out) -> Option<u32> {
        let Some(link) = from.link(out) else {
            return self.jump(core);
        };
        let link = link.get();
        (link.epoch == self.epoch).then_some(link.block)
    }

    /// Runs a block, and those that follow as long as they are known and nothing has to be looked at. Returns how
    /// the last one ended, and its number.
    fn chain(&self, core: &mut Core, first: u32) -> (Out, u32) {
        let mut index = first;
        let mut block = &self.list[first as usize];
        loop {
            core.budget -= i64::from(block.count);
            core.r[BLOCK] = core.rip;
            let out = run(core, &block.ops);
            if out == Out::Stop || core.attention {
                return (out, index);
            }
            let Some(next) = self.next(core, block, out) else {
                return (out, index);
            };
            let Some(following) = self.list.get(next as usize) else {
                return (out, index);
            };
            if core.budget < i64::from(following.count) {
                return (out, index);
            }
            (index, block) = (next, following);
        }
    }
}

/// One x86-64 processor.
///
/// It owns its [`Bus`]; several processors of one machine have a bus each, to the same memory,
/// and share one [`CodePages`]. See the crate's page for an example.
pub struct Cpu {
    pub(crate) core: Core,
    blocks: Blocks,
    dispatch: Dispatch,
}

impl Cpu {
    /// A processor after RESET: real mode at FFFF_FFF0H.
    pub fn new(bus: Box<dyn Bus>, pages: Arc<CodePages>, cpuid: CpuidTable) -> Self {
        let core = Core::new(bus, pages, cpuid);
        Self {
            core,
            blocks: Blocks::new(),
            dispatch: Dispatch::Tail,
        }
    }

    /// Chooses how handlers reach the next one. Both ways compute the same.
    pub fn set_dispatch(&mut self, dispatch: Dispatch) {
        self.dispatch = dispatch;
        self.drop_blocks();
    }

    /// The instructions that exit.
    pub fn controls_mut(&mut self) -> &mut Controls {
        &mut self.core.controls
    }

    /// Runs up to `budget` instructions.
    ///
    /// Time passes with instructions: one tick of the TSC each. A repeated string instruction
    /// counts once for each 4096 elements it is interrupted after.
    pub fn run(&mut self, budget: u64) -> Stopped {
        self.enter();
        let mut left = budget.min(i64::MAX as u64) as i64;
        loop {
            if let Some(stopped) = self.idle() {
                return stopped;
            }
            let core = &mut self.core;
            let now = core.clock();
            core.apic.tick(now);
            core.attention = true;
            let until = core
                .apic
                .expires()
                .map_or(u64::MAX, |at| at.saturating_sub(now).max(1));
            let slice = left.min(until.min(i64::MAX as u64) as i64);
            if slice <= 0 {
                return Stopped::Budget;
            }
            core.granted = core.granted.wrapping_add(slice as u64);
            core.budget += slice;
            let stopped = self.slice();
            let core = &mut self.core;
            let unused = core.budget;
            core.granted = core.granted.wrapping_sub(unused as u64);
            core.budget = 0;
            left -= slice - unused;
            if let Some(stopped) = stopped {
                return stopped;
            }
        }
    }

    /// Completes the instruction at RIP, and takes no event before it: the second half of an exit
    /// whose answer the bus has now. Counts as one instruction.
    pub fn finish_instruction(&mut self) -> Stopped {
        // An interprocessor interrupt of the first half gives the turn away behind the second half.
        let yielded = core::mem::take(&mut self.core.yielded);
        self.core.shadow = true;
        let stopped = self.run(1);
        self.core.yielded |= yielded;
        self.core.attention |= yielded;
        stopped
    }

    /// Says that a host may have written memory without [`CodePages::written`]: decoded code is
    /// compared with memory before it is run again.
    pub fn recheck_code(&mut self) {
        self.blocks.trust += 1;
        self.blocks.epoch += 1;
        self.core.epoch += 1;
    }

    /// Flushes the core if the bus or the protected pages changed since the last run.
    pub(crate) fn enter(&mut self) {
        let core = &mut self.core;
        let generation = core.bus.generation();
        let protected = core.pages.protected_count();
        let changed = generation != core.bus_generation;
        if changed || protected != self.blocks.seen_protected {
            self.blocks.seen_protected = protected;
            core.flush_linear();
        }
        if changed {
            core.bus_generation = generation;
            // What the bus lent does not depend on protected pages.
            core.frames.flush();
            self.recheck_code();
        }
    }

    /// Wakes a halted processor that has an event; returns the stop of one that cannot execute.
    fn idle(&mut self) -> Option<Stopped> {
        let core = &mut self.core;
        if core.shutdown {
            return Some(self.leave(Cause::TripleFault));
        }
        if core.waiting {
            return Some(Stopped::WaitsForStart);
        }
        if core.halted {
            if core.nmi_window_open() {
                return Some(self.leave(Cause::NmiWindow));
            }
            let now = core.clock();
            core.apic.tick(now);
            if !core.wakes() {
                return Some(Stopped::Halted);
            }
            core.halted = false;
        }
        None
    }

    /// Leaves between two instructions.
    fn leave(&mut self, cause: Cause) -> Stopped {
        self.core.attention = true;
        let _ = self.core.exit(cause, 0);
        self.take_exit()
    }

    fn take_exit(&mut self) -> Stopped {
        match core::mem::replace(&mut self.core.pending, Pending::None) {
            Pending::Exit(exit) => Stopped::Exit(exit),
            _ => Stopped::Budget,
        }
    }

    /// Runs until the slice's budget is used or something has to be reported.
    fn slice(&mut self) -> Option<Stopped> {
        let mut next: Option<u32> = None;
        loop {
            let written = self.core.pages.written_count();
            if written != self.blocks.seen_written {
                self.blocks.seen_written = written;
                self.blocks.epoch += 1;
                self.core.epoch += 1;
                next = None;
            }
            let mut cut = BLOCK_OPS as u8;
            let mut step = false;
            let special = flags::TF | flags::RF;
            if self.core.attention || self.core.shadow || self.core.system_flags & special != 0 {
                next = None;
                if let Some(stopped) = self.events() {
                    return stopped;
                }
                step = self.core.steps();
                if step || self.core.shadow || self.core.system_flags & flags::RF != 0 {
                    cut = 1;
                }
                if self.core.watched || self.core.debugger.step {
                    cut = 1;
                    self.core.attention = true;
                }
            }
            if self.core.budget <= 0 {
                return None;
            }
            cut = cut.min(self.core.budget.min(255) as u8);
            let out = if self.core.watched && self.core.at_breakpoint() {
                Out::Stop
            } else {
                match self.step(next, cut) {
                    Ok((out, from)) => {
                        next = self.follow(out, from);
                        out
                    }
                    Err(_) => Out::Stop,
                }
            };
            if out != Out::Stop {
                if step || self.core.watched {
                    self.core.completed(step);
                }
                continue;
            }
            next = None;
            if let Some(stopped) = self.stopped() {
                return Some(stopped);
            }
        }
    }

    /// Delivers pending events. `Some` ends the slice.
    fn events(&mut self) -> Option<Option<Stopped>> {
        let core = &mut self.core;
        core.attention = false;
        if core.debug != 0 && !core.quiet {
            // A debug trap ends HLT.
            core.halted = false;
        }
        if core.halted || core.waiting || core.shutdown {
            return Some(None);
        }
        core.barrier();
        if core::mem::take(&mut core.yielded) {
            return Some(Some(Stopped::Paused));
        }
        if core.shadow || core.debug != 0 {
            core.attention = true;
            return None;
        }
        if core.parallel.asks() {
            core.attention = true;
            return Some(Some(Stopped::Alone));
        }
        // A timer that was armed after the slice began ends it.
        let left = core
            .apic
            .expires()
            .map(|at| at.saturating_sub(core.clock()));
        if left.is_some_and(|left| left < core.budget.max(0) as u64) {
            return Some(None);
        }
        if core.debugger.hold_events {
            return None;
        }
        let enabled = core.system_flags & flags::IF != 0;
        let event = if core.nmi_pending && !core.nmi_blocked {
            core.nmi_pending = core::mem::take(&mut core.nmi_second);
            Event::nmi()
        } else if core.nmi_window_open() {
            return Some(Some(self.leave(Cause::NmiWindow)));
        } else if enabled && core.controls.interrupt_window {
            return Some(Some(self.leave(Cause::InterruptWindow)));
        } else if enabled {
            let vector = core.apic.pending()?;
            core.apic.accept(vector);
            Event::interrupt(vector)
        } else {
            return None;
        };
        core.attention = true;
        match core.deliver(event) {
            Ok(()) => None,
            Err(_) => Some(Some(self.take_exit())),
        }
    }

    /// Runs from RIP, where the block `next` begins if it is known. With [`BLOCK_OPS`] as `cut` blocks follow one
    /// another until something has to be looked at; otherwise one block of at most `cut` instructions runs. Returns
    /// how the last block ended and its number, if it is kept.
    fn step(&mut self, next: Option<u32>, cut: u8) -> R<(Out, Option<u32>)> {
        let core = &mut self.core;
        if core.debug != 0 && core.debug_trap() {
            return Err(crate::state::Stop);
        }
        core.quiet = false;
        let shadow = core::mem::take(&mut core.shadow);
        let alone = core::mem::take(&mut core.alone);
        let whole = cut == BLOCK_OPS as u8 && !alone;
        let single = cut == 1 && !alone;
        let index = match next.filter(|_| !single) {
            Some(n) => n,
            None => match self.find(!alone, single) {
                Ok(Some(n)) => n,
                Ok(None) => return self.run_once(if alone { 1 } else { cut }),
                Err(stop) => {
                    self.core.shadow = shadow && matches!(self.core.pending, Pending::Exit(_));
                    return Err(stop);
                }
            },
        };
        let count = self.blocks.list[index as usize].count;
        if alone || !whole && count > cut {
            return self.run_once(if alone { 1 } else { cut });
        }
        if !whole {
            let out = run_counted(&mut self.core, &self.blocks.list[index as usize]);
            return Ok((out, Some(index)));
        }
        let (out, last) = self.blocks.chain(&mut self.core, index);
        Ok((out, Some(last)))
    }

    /// Builds a block of at most `count` instructions, runs it and forgets it.
    fn run_once(&mut self, count: u8) -> R<(Out, Option<u32>)> {
        let core = &mut self.core;
        let mark = core.insns.len();
        let linear = core.code_linear(core.rip);
        let gpa = core.fetch_address(linear)?;
        let limits = Limits {
            instructions: count.max(1),
            keep: false,
            dispatch: self.dispatch,
        };
        let block = core.build(gpa, limits)?;
        let out = run_counted(core, &block);
        core.insns.truncate(mark);
        Ok((out, None))
    }

    /// Finds or builds the block at RIP; `None` if it can not be kept.
    fn find(&mut self, keep: bool, single: bool) -> R<Option<u32>> {
        let core = &mut self.core;
        if !single && let Some(block) = self.blocks.jump(core) {
            return Ok(Some(block));
        }
        let linear = core.code_linear(core.rip);
        let gpa = core.fetch_address(linear)?;
        let limit = if core.bits == 64 {
            u32::MAX
        } else {
            core.seg[CS].limit
        };
        let key = Key {
            gpa,
            rip: core.rip,
            bits: core.bits,
            limit,
            single,
        };
        let known = self.blocks.map.get(&key).copied();
        let current = match known {
            Some(n) if self.is_current(n, gpa, linear)? => Some(n),
            _ => None,
        };
        let index = match current {
            Some(n) => n,
            None if !keep => return Ok(None),
            None => {
                if self.core.insns.len() > MOST_DECODED || self.blocks.list.len() > MOST_DECODED {
                    self.drop_blocks();
                }
                let limits = Limits {
                    instructions: if single { 1 } else { BLOCK_OPS as u8 },
                    keep: true,
                    dispatch: self.dispatch,
                };
                let mark = self.core.insns.len();
                let mut block = self.core.build(gpa, limits)?;
                if !block.keep {
                    self.core.insns.truncate(mark);
                    return Ok(None);
                }
                block.trust = self.blocks.trust;
                self.keep(key, known, block)
            }
        };
        self.blocks.seen_protected = self.core.pages.protected_count();
        if !single {
            self.blocks.jumps[slot(self.core.rip)] = Jump {
                rip: self.core.rip,
                stamp: stamp(&self.core),
                block: index,
            };
        }
        Ok(Some(index))
    }

    /// True if a block is what the page holds: none of its bytes was written since.
    fn is_current(&mut self, index: u32, gpa: u64, linear: u64) -> R<bool> {
        let trust = self.blocks.trust;
        let Some(block) = self.blocks.list.get_mut(index as usize) else {
            return Ok(false);
        };
        if block.version != self.core.pages.version(gpa) {
            return Ok(false);
        }
        if block.trust != trust {
            if !self.core.code_is(gpa, linear, &block.code)? {
                return Ok(false);
            }
            block.trust = trust;
        }
        Ok(true)
    }

    fn keep(&mut self, key: Key, known: Option<u32>, block: Block) -> u32 {
        let stale = known.filter(|n| (*n as usize) < self.blocks.list.len());
        match stale {
            Some(n) => {
                self.blocks.list[n as usize] = block;
                n
            }
            None => {
                let n = self.blocks.list.len() as u32;
                self.blocks.list.push(block);
                self.blocks.map.insert(key, n);
                n
            }
        }
    }

    /// The block after `from`, if a link leads there.
    fn follow(&mut self, out: Out, from: Option<u32>) -> Option<u32> {
        let from = from?;
        let block = &self.blocks.list[from as usize];
        let link = block.link(out)?.get();
        if link.epoch == self.blocks.epoch {
            return Some(link.block);
        }
        // Links stay inside of a page, where they are right whatever the page tables say.
        if (block.rip ^ self.core.rip) >> 12 != 0 {
            return None;
        }
        let page = block.gpa >> 12;
        let found = self.find(true, false).ok().flatten();
        if found.is_none() {
            // The same question is asked again by the loop, which handles the fault.
            self.core.pending = Pending::None;
        }
        let target = found?;
        let epoch = self.blocks.epoch;
        let to = &self.blocks.list[target as usize];
        if to.gpa >> 12 == page
            && let Some(block) = self.blocks.list.get(from as usize)
            && let Some(link) = block.link(out)
        {
            link.set(Link {
                epoch,
                block: target,
            });
        }
        Some(target)
    }

    /// Handles an instruction that did not complete. `Some` leaves the processor.
    fn stopped(&mut self) -> Option<Stopped> {
        let core = &mut self.core;
        core.again = false;
        let pending = core::mem::replace(&mut core.pending, Pending::None);
        if !matches!(pending, Pending::Exit(_)) {
            // After an exit the host may complete the instruction.
            core.hit = 0;
        }
        let event = match pending {
            Pending::Exit(exit) => return Some(Stopped::Exit(exit)),
            Pending::Alone => {
                core.attention = true;
                return Some(Stopped::Alone);
            }
            Pending::Fault(e) => Event::exception(e),
            Pending::Software(event) => event,
            Pending::CodeWrite(gpa) => {
                core.pages.forget(gpa);
                core.alone = true;
                return None;
            }
            Pending::None => return None,
        };
        // A delivery costs an instruction, so that a loop of faults ends with its budget.
        core.budget -= 1;
        core.attention = true;
        if core.debugger.takes(&event) {
            let _ = core.exit(crate::exit::Cause::Exception(event), 0);
            return Some(self.take_exit());
        }
        match core.deliver(event) {
            Ok(()) => None,
            Err(_) => Some(self.take_exit()),
        }
    }

    /// The processor has dropped the write tags of all frames that have code.
    pub(crate) fn saw_protected(&mut self) {
        self.blocks.seen_protected = self.core.pages.protected_count();
    }

    pub(crate) fn drop_blocks(&mut self) {
        self.blocks.list.clear();
        self.blocks.map.clear();
        self.blocks.epoch += 1;
        self.core.insns.clear();
        self.core.epoch += 1;
    }
}

impl Core {
    /// An NMI came.
    pub(crate) fn receive_nmi(&mut self) {
        self.nmi_second |= self.nmi_pending && !self.nmi_blocked;
        self.nmi_pending = true;
        self.attention = true;
    }

    /// True if the host waits for a time at which the processor can take an NMI, and this is one.
    fn nmi_window_open(&self) -> bool {
        self.controls.nmi_window && !self.nmi_pending && !self.nmi_blocked
    }

    /// True if a halted processor has a reason to go on.
    fn wakes(&self) -> bool {
        let interrupt = self.system_flags & flags::IF != 0 && self.apic.pending().is_some();
        self.nmi_pending && !self.nmi_blocked || interrupt
    }
}
