//! Micro-ops and their dispatch.
//!
//! A block is a slice of ops. Each op's handler runs its instruction and calls the next op's
//! handler in tail position, which optimised builds turn into a jump; nothing depends on that,
//! since a block has at most [`BLOCK_OPS`] ops and the loop between blocks calls the first.
//! [`Dispatch::Loop`] runs the same semantics with handlers that return after one op.

use crate::exec::Exec;
use crate::pair::Kind;
use crate::state::{BLOCK, Core, R};

/// Most ops in a block: the bound of the stack in builds that do not make jumps of tail calls.
pub(crate) const BLOCK_OPS: usize = 64;

/// Ways in which a handler returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Out {
    /// Only with [`Dispatch::Loop`]: the next op of the block follows.
    Next,
    /// The block ended with its branch taken, to a fixed target.
    Taken,
    /// The block ended and the next instruction follows.
    Fall,
    /// The block ended and RIP can be anything.
    Indirect,
    /// The instruction did not complete.
    Stop,
}

/// The way from one op to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dispatch {
    /// Handlers call the next one in tail position.
    #[default]
    Tail,
    /// Handlers return to a loop: slower, for cross-checks.
    Loop,
}

pub(crate) type Run = fn(&mut Core, &[Op]) -> Out;

/// One micro-op: 32 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Op {
    pub(crate) run: Run,
    /// Immediate, target of a branch, or index of the decoded instruction.
    pub(crate) imm: u64,
    pub(crate) disp: i32,
    pub(crate) dst: u8,
    pub(crate) src: u8,
    pub(crate) base: u8,
    pub(crate) index: u8,
    pub(crate) scale: u8,
    /// Segment register whose base is added.
    pub(crate) seg: u8,
    /// Instructions from this one to the end of the block.
    pub(crate) left: u8,
    /// Instruction length in bytes.
    pub(crate) len: u8,
    /// Offset from the block's first byte.
    pub(crate) offset: u16,
    /// For pairs.
    pub(crate) kind: Kind,
}

const _: () = assert!(size_of::<Op>() == 32);

/// An instruction that does not end a block.
///
/// Unless `SLOW`, what stops may have no reason yet, and must have changed nothing: the handler does it again with
/// `SLOW`, in a function apart. So a handler calls no function on its way, and saves no registers.
pub(crate) trait Sem: 'static {
    /// False if every reason to stop is known at once.
    const AGAIN: bool = true;

    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()>;
}

/// An instruction that ends a block.
pub(crate) trait End: 'static {
    /// As in [`Sem`].
    const AGAIN: bool = true;

    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out>;
}

/// The handlers of one instruction, for both ways of dispatch.
#[derive(Clone, Copy)]
pub(crate) struct Handlers {
    tail: Run,
    once: Run,
    pub(crate) kind: Kind,
}

impl Handlers {
    pub(crate) fn of<S: Sem>() -> Self {
        Self {
            tail: tail::<S>,
            once: once::<S>,
            kind: Kind::of::<S>(),
        }
    }

    pub(crate) fn end<E: End>() -> Self {
        Self {
            tail: end::<E>,
            once: end::<E>,
            kind: Kind::of::<E>(),
        }
    }

    pub(crate) fn get(self, dispatch: Dispatch) -> Run {
        match dispatch {
            Dispatch::Tail => self.tail,
            Dispatch::Loop => self.once,
        }
    }
}

fn tail<S: Sem>(c: &mut Core, ops: &[Op]) -> Out {
    let [op, rest @ ..] = ops else {
        return Out::Stop;
    };
    if S::exec::<false>(c, op).is_err() {
        return if S::AGAIN {
            tail_slow::<S>(c, ops)
        } else {
            stopped(c, op)
        };
    }
    match rest {
        [next, ..] => (next.run)(c, rest),
        [] => Out::Stop,
    }
}

#[cold]
#[inline(never)]
pub(crate) fn tail_slow<S: Sem>(c: &mut Core, ops: &[Op]) -> Out {
    let [op, rest @ ..] = ops else {
        return Out::Stop;
    };
    if S::exec::<true>(c, op).is_err() {
        return stopped(c, op);
    }
    match rest {
        [next, ..] => (next.run)(c, rest),
        [] => Out::Stop,
    }
}

fn once<S: Sem>(c: &mut Core, ops: &[Op]) -> Out {
    let [op, ..] = ops else { return Out::Stop };
    if S::exec::<true>(c, op).is_err() {
        return stopped(c, op);
    }
    Out::Next
}

fn end<E: End>(c: &mut Core, ops: &[Op]) -> Out {
    let [op, ..] = ops else { return Out::Stop };
    match E::exec::<false>(c, op) {
        Ok(out) => out,
        Err(_) if E::AGAIN => end_slow::<E>(c, ops),
        Err(_) => stopped(c, op),
    }
}

#[cold]
#[inline(never)]
pub(crate) fn end_slow<E: End>(c: &mut Core, ops: &[Op]) -> Out {
    let [op, ..] = ops else { return Out::Stop };
    match E::exec::<true>(c, op) {
        Ok(out) => out,
        Err(_) => stopped(c, op),
    }
}

/// RIP of an op's instruction. Outside of 64-bit mode RIP has 32 bits, which no block leaves.
pub(crate) fn start(c: &Core, op: &Op) -> u64 {
    c.r[BLOCK].wrapping_add(op.offset.into())
}

/// Restores the state before `op`: RIP, and the budget of the instructions that did not run.
#[cold]
#[inline(never)]
fn stopped(c: &mut Core, op: &Op) -> Out {
    c.rip = start(c, op);
    c.budget += i64::from(op.left);
    Out::Stop
}

/// Runs all ops of a block.
#[inline(always)]
pub(crate) fn run(c: &mut Core, ops: &[Op]) -> Out {
    let mut rest = ops;
    loop {
        let [op, after @ ..] = rest else {
            return Out::Stop;
        };
        match (op.run)(c, rest) {
            Out::Next => rest = after,
            out => return out,
        }
    }
}

/// An instruction run from its decoded form.
pub(crate) struct Decoded;

impl Sem for Decoded {
    const AGAIN: bool = false;

    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (exec, i): (Exec, _) = c.insns[op.imm as usize];
        c.len = op.len;
        exec(c, &i)
    }
}

/// The same for a locked one beside other processors that run.
pub(crate) struct Locked;

impl Sem for Locked {
    const AGAIN: bool = false;

    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<()> {
        let (exec, i): (Exec, _) = c.insns[op.imm as usize];
        c.len = op.len;
        c.run_locked(exec, &i)
    }
}

/// The same for one that ends the block. `QUIET` if no event can be due after it that was not before.
pub(crate) struct DecodedEnd<const QUIET: bool>;

impl<const QUIET: bool> End for DecodedEnd<QUIET> {
    const AGAIN: bool = false;

    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        let (exec, i): (Exec, _) = c.insns[op.imm as usize];
        c.len = op.len;
        c.rip = i.next_ip();
        if !QUIET {
            c.attention = true;
        }
        exec(c, &i)?;
        if c.again {
            c.again = false;
            c.rip = start(c, op);
        }
        Ok(Out::Indirect)
    }
}

/// The end of a block that was cut: RIP is the next instruction.
pub(crate) struct Fall;

impl End for Fall {
    fn exec<const SLOW: bool>(c: &mut Core, op: &Op) -> R<Out> {
        c.rip = op.imm;
        Ok(Out::Fall)
    }
}
