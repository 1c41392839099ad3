//! Instructions without a dedicated handler: chosen by mnemonic when a block is built, and run from
//! the decoded form.

mod arith;
mod avx;
mod control;
pub(crate) mod data;
mod flow;
#[cfg(test)]
mod forms;
mod mmx;
mod string;
mod tables;
mod vector;
mod x87;
pub(crate) mod xstate;

use iced_x86::{Instruction, Mnemonic as M, Register};

use crate::state::{Core, R};

/// Runs one decoded instruction. Those that end a block find RIP at the next instruction.
pub(crate) type Exec = fn(&mut Core, &Instruction) -> R<()>;

/// Handler of an instruction.
#[derive(Clone, Copy)]
pub(crate) struct Selected {
    pub(crate) exec: Exec,
    /// Nothing may follow in the block.
    pub(crate) ends: bool,
    /// It ends a block, and no event can be due after it that was not before it.
    pub(crate) quiet: bool,
}

/// Chooses the way to run an instruction; what is not implemented is #UD and logged.
pub(crate) fn select(i: &Instruction) -> Selected {
    implementation(i).unwrap_or(Selected {
        exec: |c, i| Err(c.missing(i.code())),
        ends: true,
        quiet: false,
    })
}

fn implementation(i: &Instruction) -> Option<Selected> {
    let selected = |exec, ends| {
        let quiet = ends && is_quiet(i);
        Some(Selected { exec, ends, quiet })
    };
    let end = |exec| selected(exec, true);
    let body = |exec| selected(exec, false);
    if i.is_invalid() {
        return end(|c, _| Err(c.ud()));
    }
    if let Some(exec) = flow::select_end(i).or_else(|| control::select_end(i)) {
        return end(exec);
    }
    let m = i.mnemonic();
    if let Some(exec) = string::select(i) {
        let repeats = i.has_rep_prefix() || i.has_repne_prefix();
        return selected(exec, repeats || is_port_string(m));
    }
    match m {
        M::Ud0 | M::Ud1 | M::Ud2 => return end(|c, _| Err(c.ud())),
        M::Bound => return body(data::bound),
        _ => {}
    }
    let exec = flow::select(m)
        .or_else(|| arith::select(m))
        .or_else(|| data::select(m))
        .or_else(|| control::select(m))
        .or_else(|| xstate::select(m))
        .or_else(|| x87::select(m))
        .or_else(|| vector::select(i))
        .or_else(|| avx::select(i))
        .or_else(|| mmx::select(i))?;
    // A new segment may change what follows.
    selected(exec, loads_segment(i))
}

fn is_port_string(m: M) -> bool {
    matches!(
        m,
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
    )
}

/// True for near branches, strings in memory, reads of the time-stamp counter, and writes of the bases of FS and GS.
fn is_quiet(i: &Instruction) -> bool {
    let string = string::select(i).is_some() && !is_port_string(i.mnemonic());
    string
        || i.is_jmp_near_indirect()
        || i.is_jmp_short_or_near()
        || i.is_call_near_indirect()
        || i.is_call_near()
        || i.is_jcc_short_or_near()
        || matches!(i.mnemonic(), M::Ret | M::Rdtsc | M::Rdtscp)
        || matches!(i.mnemonic(), M::Swapgs | M::Wrfsbase | M::Wrgsbase)
}

fn loads_segment(i: &Instruction) -> bool {
    let m = i.mnemonic();
    matches!(m, M::Mov | M::Pop) && i.op0_register().is_segment_register()
        || matches!(m, M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss)
        || matches!(m, M::Swapgs | M::Wrfsbase | M::Wrgsbase)
        || i.op0_register() == Register::SS
}
