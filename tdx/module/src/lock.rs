//! The architecture's try-locks.
//!
//! Every lock of the module is a try-lock: an attempt that cannot succeed at once fails, and the leaf
//! reports `OPERAND_BUSY`. There is no waiting anywhere, hence no deadlock.
//!
//! *Host priority*: some objects are locked by the host (SEAMCALL) and by the guest (TDCALL). A failed host attempt
//! leaves a mark; while the mark is set, a guest attempt fails even if the lock is free, so that a guest that loops
//! cannot keep the host out. A successful host acquisition removes the mark.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

use Ordering::{AcqRel, Acquire, Relaxed, Release};

/// Mode in which a lock is requested or held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// With others who share.
    Shared,
    /// Alone.
    Exclusive,
}

/// Side that requests a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    Host,
    Guest,
}

const EXCLUSIVE: u64 = 1;
const HOST_PRIORITY: u64 = 1 << 1;
const SHARER: u64 = 1 << 2;
const SHARERS: u64 = 0xFFFC;
const LOCK_BITS: u32 = 16;
const LOCK_MASK: u64 = 0xFFFF;

/// A shared/exclusive try-lock with host priority in the low 16 bits of a word, whose upper 48 bits are the
/// holder's to use. A PAMT entry keeps its type and owner there, which makes it one word.
#[derive(Debug, Default)]
pub(crate) struct Sharex(AtomicU64);

impl Sharex {
    pub(crate) fn with_payload(payload: u64) -> Self {
        Sharex(AtomicU64::new(payload << LOCK_BITS))
    }

    /// Returns true if a failure would be due to host priority alone: the lock is free but marked.
    pub(crate) fn is_free_but_marked(&self) -> bool {
        self.0.load(Acquire) & LOCK_MASK == HOST_PRIORITY
    }

    #[inline]
    pub(crate) fn try_lock(&self, mode: LockMode, side: Side) -> bool {
        let blocked_by = match mode {
            LockMode::Shared => EXCLUSIVE,
            LockMode::Exclusive => EXCLUSIVE | SHARERS,
        };
        let blocked_by = if side == Side::Guest {
            blocked_by | HOST_PRIORITY
        } else {
            blocked_by
        };
        let mut cur = self.0.load(Relaxed);
        loop {
            if cur & blocked_by != 0 || cur & SHARERS == SHARERS {
                // The mark must be set on the very value that made the attempt fail: had the lock become
                // free meanwhile, a mark set now would lock the guest out with no host waiting.
                if side == Side::Guest || cur & HOST_PRIORITY != 0 {
                    return false;
                }
                match self
                    .0
                    .compare_exchange_weak(cur, cur | HOST_PRIORITY, Relaxed, Relaxed)
                {
                    Ok(_) => return false,
                    Err(now) => cur = now,
                }
                continue;
            }
            let locked = match mode {
                LockMode::Shared => cur + SHARER,
                LockMode::Exclusive => cur | EXCLUSIVE,
            } & !HOST_PRIORITY;
            match self.0.compare_exchange_weak(cur, locked, Acquire, Relaxed) {
                Ok(_) => return true,
                Err(now) => cur = now,
            }
        }
    }

    #[inline]
    pub(crate) fn unlock(&self, mode: LockMode) {
        match mode {
            LockMode::Shared => self.0.fetch_sub(SHARER, Release),
            LockMode::Exclusive => self.0.fetch_and(!EXCLUSIVE, Release),
        };
    }

    /// Turns one's own shared hold into an exclusive one; possible only for the sole sharer.
    #[inline]
    pub(crate) fn try_promote(&self) -> bool {
        let mut cur = self.0.load(Relaxed);
        loop {
            let next = if cur & SHARERS == SHARER && cur & EXCLUSIVE == 0 {
                ((cur - SHARER) | EXCLUSIVE) & !HOST_PRIORITY
            } else if cur & HOST_PRIORITY != 0 {
                return false;
            } else {
                cur | HOST_PRIORITY
            };
            match self.0.compare_exchange_weak(cur, next, Acquire, Relaxed) {
                Ok(_) => return next & EXCLUSIVE != 0 && cur & EXCLUSIVE == 0,
                Err(now) => cur = now,
            }
        }
    }

    /// The upper 48 bits.
    #[inline]
    pub(crate) fn payload(&self) -> u64 {
        self.0.load(Acquire) >> LOCK_BITS
    }

    /// Replaces the upper 48 bits, leaving the lock as it is. The caller holds the lock exclusively, or
    /// otherwise knows itself to be the only writer.
    #[inline]
    pub(crate) fn set_payload(&self, payload: u64) {
        let mut cur = self.0.load(Relaxed);
        while let Err(now) = self.0.compare_exchange_weak(
            cur,
            cur & LOCK_MASK | payload << LOCK_BITS,
            AcqRel,
            Relaxed,
        ) {
            cur = now;
        }
    }

    /// Takes the lock for the life of the returned guard.
    #[inline]
    pub(crate) fn guard(&self, mode: LockMode, side: Side) -> Option<Guard<'_>> {
        // Lazily: a guard made and dropped would release what another holds.
        self.try_lock(mode, side)
            .then(|| Guard { lock: self, mode })
    }
}

/// A held [`Sharex`], released when dropped.
#[derive(Debug)]
pub(crate) struct Guard<'a> {
    lock: &'a Sharex,
    mode: LockMode,
}

impl<'a> Guard<'a> {
    /// Makes a shared hold exclusive; on failure the shared hold is given up.
    pub(crate) fn promote(mut self) -> Option<Guard<'a>> {
        if !self.lock.try_promote() {
            return None;
        }
        self.mode = LockMode::Exclusive;
        Some(self)
    }

    /// Keeps the lock held beyond the guard; [`Sharex::unlock`] with the same mode ends the hold.
    pub(crate) fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.lock.unlock(self.mode);
    }
}

/// A Secure-EPT entry: its lock bit and host-priority bit are bits 0 and 1 of the entry word, the rest is the
/// entry's content (see [`crate::sept`]).
#[derive(Debug, Default)]
pub(crate) struct EntryWord(AtomicU64);

impl EntryWord {
    pub(crate) const RESERVED: u64 = EXCLUSIVE | HOST_PRIORITY;

    /// The content, with the lock bits 0.
    #[inline]
    pub(crate) fn load(&self) -> u64 {
        self.0.load(Acquire) & !Self::RESERVED
    }

    /// Replaces the content, leaving the lock bits. Same duty as [`Sharex::set_payload`].
    #[inline]
    pub(crate) fn store(&self, content: u64) {
        let mut cur = self.0.load(Relaxed);
        while let Err(now) = self.0.compare_exchange_weak(
            cur,
            cur & Self::RESERVED | content & !Self::RESERVED,
            AcqRel,
            Relaxed,
        ) {
            cur = now;
        }
    }

    #[inline]
    pub(crate) fn try_lock(&self, side: Side) -> bool {
        let mut cur = self.0.load(Relaxed);
        loop {
            let next = match side {
                Side::Guest if cur & Self::RESERVED != 0 => return false,
                Side::Host if cur & Self::RESERVED == Self::RESERVED => return false,
                Side::Host if cur & EXCLUSIVE != 0 => cur | HOST_PRIORITY,
                _ => (cur | EXCLUSIVE) & !HOST_PRIORITY,
            };
            match self.0.compare_exchange_weak(cur, next, Acquire, Relaxed) {
                Ok(_) => return cur & EXCLUSIVE == 0,
                Err(now) => cur = now,
            }
        }
    }

    #[inline]
    pub(crate) fn unlock(&self) {
        self.0.fetch_and(!EXCLUSIVE, Release);
    }

    /// Free, but a host attempt has failed since the last host acquisition.
    pub(crate) fn is_free_but_marked(&self) -> bool {
        self.0.load(Acquire) & Self::RESERVED == HOST_PRIORITY
    }

    /// Empties an entry of a table that is no longer reachable, but that a late walker may still be trying to lock.
    /// Read-modify-write, and keeping the walker's lock bit: with a plain store in its place the loom model finds
    /// an order in which the walker's attempt brings the old content back.
    pub(crate) fn reset(&self) {
        if self.0.load(Acquire) != 0 {
            self.0.fetch_and(EXCLUSIVE, AcqRel);
        }
    }
}

#[cfg(all(test, loom))]
#[path = "lock_loom.rs"]
mod loom_tests;
