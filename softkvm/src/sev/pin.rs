//! Memory of the caller's that is pinned for a guest.

use kvm_ops_uapi::checks::Check;

use super::command::Call;
use crate::Process;
use crate::refusal::{Result, ensure};
use crate::vm::State;

const PAGE: u64 = 4096;
/// The most pages that are pinned at once (INT_MAX).
const MOST: u64 = i32::MAX as u64;

/// What is done with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Read,
    Write,
}

/// Checks a range as the kernel does before it pins one: not empty, without a wrap and no larger than the machine's memory; within
/// the caller's limit, beside the pages that the VM's regions have pinned; mapped.
pub(super) fn require(
    process: &dyn Process,
    locked: u64,
    (address, len): (u64, u64),
    purpose: Use,
    (range, pinned): (Check, Check),
) -> Result<()> {
    let end = address.checked_add(len).filter(|_| len != 0).ok_or(range)?;
    let pages = (end - 1) / PAGE - address / PAGE + 1;
    let limits = process.pin_limits();
    ensure(pages <= limits.total.min(MOST), range)?;
    ensure(locked.saturating_add(pages) <= limits.locked, pinned)?;
    let there = match purpose {
        Use::Read => process.is_mapped(address, len),
        Use::Write => process.is_writable(address, len),
    };
    ensure(there, pinned)
}

/// The same for the memory of a command.
pub(super) fn for_command(
    state: &State,
    call: &Call<'_>,
    range: (u64, u64),
    purpose: Use,
    checks: (Check, Check),
) -> Result<()> {
    require(
        call.process,
        state.sev.locked_pages(),
        range,
        purpose,
        checks,
    )
}
