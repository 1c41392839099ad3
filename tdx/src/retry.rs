//! Contention and retry as data: which status of which leaf is tried again, how often, and what
//! happens when that is used up.
//!
//! The table is [`RULES`]; the first row that fits decides. docs/tdx.md shows it.

use kvm_ops::Error;

use crate::seamcall::Leaf;
use crate::status::{Class, CompletionStatus};

/// The reaction to a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the call did what was wanted, or it was done already.
    Done,
    /// Call again at once, so many times.
    Retry(u32),
    /// Call again so many times, after a wait that doubles each time up to [`LONGEST_WAIT`].
    BackOff(u32),
    /// Kick every vCPU out of the TD, keep them out, call once more.
    KickAndRetry,
    /// Go on where the call was interrupted (RCX = 1), so many times.
    Resume(u32),
    /// Start the interrupted work again, so many times.
    Restart(u32),
    /// Nothing helps.
    GiveUp,
}

/// The caller's error after the last try, and the fate of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// [`Error::Busy`]: nothing changed, the call may come again.
    Busy,
    /// [`Error::Again`]: nothing changed, the call may come again.
    Again,
    /// [`Error::Firmware`] with the status: the module is not ready for this call yet. Nothing
    /// changed.
    Refused,
    /// [`Error::Firmware`] with the status: module and back end disagree, or the TD is broken.
    /// A running VM is poisoned.
    Poison,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The condition. Compared by class, without the detail.
    pub class: Class,
    /// The leaves that it is about; none means all others.
    pub leaves: &'static [Leaf],
    /// The reaction.
    pub action: Action,
    /// The verdict after the last try.
    pub verdict: Verdict,
    /// The reason.
    pub why: &'static str,
}

/// The longest wait between two tries, in turns of [`SeamPort::relax`](kvm_ops::SeamPort::relax).
pub const LONGEST_WAIT: u32 = 1 << 18;

macro_rules! rules {
    ($($class:ident [$($leaf:ident),*] $action:expr, $verdict:ident: $why:literal;)*) => {
        &[$(Rule {
            class: Class::$class,
            leaves: &[$(Leaf::$leaf),*],
            action: $action,
            verdict: Verdict::$verdict,
            why: $why,
        }),*]
    };
}

use Action::{BackOff, Done, GiveUp, KickAndRetry, Restart, Resume, Retry};

/// The table. RDRAND and write-back bounds are Linux's (`RDRAND_RETRY_LOOPS`, `tdx.c`).
pub const RULES: &[Rule] = rules! {
    RND_NO_ENTROPY [] Retry(10), Again:
        "RDRAND or RDSEED ran dry; the SDM asks for ten tries";
    KEY_GENERATION_FAILED [MngKeyConfig] Retry(10), Again:
        "PCONFIG ran out of entropy";
    OPERAND_BUSY [MemSeptAdd, MemPageAug] GiveUp, Busy:
        "a fault: the entry goes back to what it was, and the guest faults again if it must";
    OPERAND_BUSY [
        MemRangeBlock, MemRangeUnblock, MemTrack, MemPageRemove,
        MemSeptRemove, MemPageDemote, MemPagePromote,
        ExportStateImmutable, ExportPause, ExportTrack, ExportAbort, ExportUnblockw, ImportEnd
    ] KickAndRetry, Busy:
        "a vCPU of the TD has the lock, or another flush: other changes are excluded";
    PREVIOUS_TLB_EPOCH_BUSY [MemTrack] KickAndRetry, Busy:
        "a vCPU is still in the epoch before this one";
    OPERAND_BUSY [] BackOff(32), Busy:
        "the KOT, the key engine, a package's write-back or a page's metadata, which other TDs use too";
    SYS_BUSY [] BackOff(32), Busy:
        "the module's global lock";
    INTERRUPTED_RESUMABLE [PhymemCacheWb] Resume(10_000), Again:
        "an interrupt came; every call makes progress";
    INTERRUPTED_RESUMABLE [
        ExportBlockw, ExportRestore, ExportMem, ExportStateImmutable, ExportStateTd, ExportStateVp,
        ImportMem, ImportStateImmutable, ImportStateTd, ImportStateVp
    ] Resume(10_000), Again:
        "an interrupt came; the lists say where the call goes on";
    WBCACHE_RESUME_ERROR [PhymemCacheWb] Restart(100), Again:
        "another TD's write-back on the package ended the interrupted one";
    INTERRUPTED_RESTARTABLE [MemPageDemote, MemPagePromote] Restart(10_000), Again:
        "an interrupt came; nothing was done";
    NO_HKID_READY_TO_WBCACHE [PhymemCacheWb] Done, Poison:
        "another TD's write-back took this KeyID with it";
    KEY_CONFIGURED [MngKeyConfig] Done, Poison:
        "the package has the key";
    VCPU_NOT_ASSOCIATED [VpFlush] Done, Poison:
        "the vCPU is on no processor, as wanted";
    GPA_RANGE_ALREADY_BLOCKED [MemRangeBlock] Done, Poison:
        "blocked, as wanted";
    EPT_ENTRY_STATE_INCORRECT [ExportUnblockw] Done, Poison:
        "not blocked for writing, as wanted";
    FLUSHVP_NOT_DONE [MngVpflushdone] GiveUp, Refused:
        "a vCPU is still associated; the flushes may be repeated";
    WBCACHE_NOT_COMPLETE [MngKeyFreeid] GiveUp, Refused:
        "a package is not written back; the write-back may be repeated";
    OPERAND_INVALID [MngInit] GiveUp, Refused:
        "a parameter that the module does not take; the detail names it";
};

/// The action and the verdict for a status. A status without a row succeeded if its error bit is
/// clear; with the error bit no remedy is known, which a migration hands back and everything else
/// poisons the VM for.
pub fn rule(leaf: Leaf, status: CompletionStatus) -> (Action, Verdict) {
    let found = RULES.iter().find(|rule| {
        rule.class == status.class() && (rule.leaves.is_empty() || rule.leaves.contains(&leaf))
    });
    match found {
        Some(rule) => (rule.action, rule.verdict),
        None if status.is_error() && leaf.only_migrates() => (Action::GiveUp, Verdict::Refused),
        None if status.is_error() => (Action::GiveUp, Verdict::Poison),
        None => (Action::Done, Verdict::Poison),
    }
}

impl Verdict {
    /// The advice to the embedder that goes with the error.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Busy => "nothing changed: call again when the other user of the lock is done",
            Self::Again => "nothing changed: call again later",
            Self::Refused => "nothing changed: the status names the condition to meet first",
            Self::Poison => "the TD is poisoned: destroy it",
        }
    }

    /// The error that the caller gets.
    pub const fn error(self, status: CompletionStatus) -> Error {
        match self {
            Self::Busy => Error::Busy,
            Self::Again => Error::Again,
            Self::Refused | Self::Poison => Error::Firmware(status.get()),
        }
    }
}
