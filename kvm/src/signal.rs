//! The signal that makes a thread leave `KVM_RUN`.
//!
//! Signal dispositions belong to the process, so this is the one piece of global state of the
//! crate. It picks an unused real-time signal and installs a handler that does nothing; it never
//! replaces an application's handler.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use kvm_ops::{Error, OpName, Result};

/// Does nothing: running any handler interrupts `KVM_RUN`.
extern "C" fn on_kick(_: libc::c_int) {}

/// The signal in use, 0 before the first vCPU.
static SIGNAL: Mutex<libc::c_int> = Mutex::new(0);

thread_local! {
    /// The signal that this thread is known to let through.
    static UNBLOCKED: Cell<libc::c_int> = const { Cell::new(0) };
}

/// The signal to kick with. Installs the handler the first time, and picks another signal if an
/// application has since put its own handler in our place.
///
/// # Errors
/// [`Error::HostLacks`] if the application handles or ignores every real-time signal.
pub(crate) fn kick_signal() -> Result<libc::c_int> {
    let mut signal = SIGNAL.lock().unwrap_or_else(PoisonError::into_inner);
    if *signal != 0 && handler(*signal) == Some(ours()) {
        return Ok(*signal);
    }
    for candidate in libc::SIGRTMIN()..=libc::SIGRTMAX() {
        if handler(candidate) == Some(libc::SIG_DFL) && install(candidate) {
            tracing::debug!(signal = candidate, "kick signal installed");
            *signal = candidate;
            return Ok(candidate);
        }
    }
    static NAME: OpName = OpName("a free real-time signal for kicking vCPUs");
    Err(Error::HostLacks(&NAME))
}

fn ours() -> libc::sighandler_t {
    on_kick as extern "C" fn(libc::c_int) as usize
}

/// The handler of a signal; `None` for a signal that does not exist.
fn handler(signal: libc::c_int) -> Option<libc::sighandler_t> {
    let mut old = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call only writes the present one to `old`.
    let done = unsafe { libc::sigaction(signal, ptr::null(), old.as_mut_ptr()) };
    // SAFETY: the call succeeded, so `old` is written.
    (done == 0).then(|| unsafe { old.assume_init() }.sa_sigaction)
}

/// Installs the handler. Returns `false`, and restores the other one, if another thread installed one
/// in between.
fn install(signal: libc::c_int) -> bool {
    // SAFETY: all zeros is a valid `sigaction`: no flags, an empty mask, the default handler.
    let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    new.sa_sigaction = ours();
    // A late kick, when the thread is outside of KVM_RUN, must not make its system calls fail
    // (KVM_RUN itself is never restarted), and may interrupt a thread with a small stack.
    new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    let mut old = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: both pointers are to `sigaction`s that live through the call, and the handler is
    // async-signal-safe because it does nothing.
    let done = unsafe { libc::sigaction(signal, &new, old.as_mut_ptr()) };
    if done != 0 {
        return false;
    }
    // SAFETY: the call succeeded, so `old` is written.
    let old = unsafe { old.assume_init() };
    if old.sa_sigaction == libc::SIG_DFL {
        return true;
    }
    // SAFETY: `old` is the action that the kernel just returned.
    unsafe { libc::sigaction(signal, &old, ptr::null_mut()) };
    false
}

/// Unblocks the signal for this thread: a blocked signal would not interrupt `KVM_RUN`. It makes a
/// system call only the first time on each thread.
pub(crate) fn unblock(signal: libc::c_int) {
    if UNBLOCKED.get() == signal {
        return;
    }
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` writes the whole set, `sigaddset` then changes one bit of it, and
    // `pthread_sigmask` changes the mask of the calling thread only.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut());
    }
    UNBLOCKED.set(signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_is_free_before_ours_after_and_the_same_again() {
        let signal = kick_signal().unwrap();
        assert!((libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&signal));
        assert_eq!(handler(signal), Some(ours()));
        assert_eq!(kick_signal().unwrap(), signal);
    }

    #[test]
    fn a_signal_that_does_not_exist_has_no_handler() {
        assert_eq!(handler(0), None);
        assert_eq!(handler(4096), None);
    }
}
