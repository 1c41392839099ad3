//! Signals of a thread that is in `KVM_RUN`.
//!
//! In the kernel a signal ends the call, and its handler runs when the thread is back in user space. Here
//! the call is in user space: signals are blocked while it lasts, the library asks whether one waits, and
//! its handler runs when they are unblocked.

use std::cell::Cell;

use crate::raw;

const SIG_BLOCK: u64 = 0;
const SIG_SETMASK: u64 = 2;
/// Bytes of a set of signals.
const SET: u64 = 8;

const fn bit(signal: libc::c_int) -> u64 {
    1 << (signal - 1)
}

/// Signals of instructions, which cannot wait.
const NEVER: u64 = bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGFPE)
    | bit(libc::SIGILL)
    | bit(libc::SIGTRAP);
/// The two of the C library's threads. They wait during a run, as one of them ends the thread where it is.
const LIBRARY: u64 = bit(32) | bit(33);

thread_local! {
    /// What the thread had blocked in front of the run.
    static BEFORE: Cell<Option<u64>> = const { Cell::new(None) };
    /// The run asked for signals before.
    static ASKED: Cell<bool> = const { Cell::new(false) };
}

/// Blocks signals. Returns what the thread had blocked.
fn block(all: u64) -> u64 {
    let mut old = 0u64;
    let (all, to) = (&raw const all as u64, &raw mut old as u64);
    // SAFETY: both sets have the length that is given, and live through the call.
    unsafe { raw::syscall(libc::SYS_rt_sigprocmask, [SIG_BLOCK, all, to, SET, 0, 0]) };
    old
}

fn restore(old: u64) {
    let from = &raw const old as u64;
    // SAFETY: the set has the length that is given, and lives through the call.
    unsafe { raw::syscall(libc::SYS_rt_sigprocmask, [SIG_SETMASK, from, 0, SET, 0, 0]) };
}

/// Begins a run: signals wait until it ends.
pub(crate) fn begin() {
    BEFORE.set(Some(block(!NEVER)));
    ASKED.set(false);
}

/// Ends a run. A signal that waited is handled in here, and the handler may end the thread, or leave by a jump: the caller has
/// nothing left to drop.
pub(crate) fn end() {
    let Some(old) = BEFORE.take() else { return };
    let from = &raw const old as u64;
    // SAFETY: as in `restore`; callers have nothing to drop.
    unsafe { raw::syscall_that_unwinds(libc::SYS_rt_sigprocmask, [SIG_SETMASK, from, 0, SET]) };
}

/// Does something with all signals blocked: a thread that is made has them blocked for ever.
pub(crate) fn without<T>(work: impl FnOnce() -> T) -> T {
    let old = block(!(NEVER | LIBRARY));
    let result = work();
    restore(old);
    result
}

/// True if the calling thread is in a run, and a signal waits that is not in the mask; without one, that the
/// thread had not blocked itself.
pub(crate) fn pending(mask: Option<u64>) -> bool {
    let Some(blocked) = BEFORE.get() else {
        return false;
    };
    // What came before the run had its handler. What came since comes to it at the next question, or to its handler
    // when a short run is over: so most exits cost no system call here.
    if !ASKED.replace(true) && mask.is_none() {
        return false;
    }
    let blocked = mask.unwrap_or(blocked);
    let mut set = 0u64;
    let to = &raw mut set as u64;
    // SAFETY: the set has the length that is given, and lives through the call.
    unsafe { raw::syscall(libc::SYS_rt_sigpending, [to, SET, 0, 0, 0, 0]) };
    set & !blocked != 0
}
