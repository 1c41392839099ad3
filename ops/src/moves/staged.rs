//! The staged form of a move: a one-time token buys the guest.
//!
//! KVM_SEV_LOCAL_SEND and KVM_SEV_LOCAL_RECEIVE as they were once proposed for Linux, for programs
//! that cannot hand each other anything but bytes.

use alloc::sync::{Arc, Weak};
use core::any::Any;
use core::fmt;

use super::staging::{MoveToken, StagingTable, gone};
use super::sync::Lock;
use super::{Claim, Claimed};
use crate::{Diagnosis, Error, Field, Life, Result};

/// What a VM keeps about moves of its guest.
pub struct MoveState {
    claim: Claim,
    /// The table and the token under which the guest is staged.
    staged: Lock<Option<(Arc<StagingTable>, MoveToken)>>,
}

impl MoveState {
    /// A VM that no move involves.
    pub fn new() -> Self {
        Self {
            claim: Claim::new(),
            staged: Lock::new(None),
        }
    }

    /// The flag that a move of the guest sets, from here or to here.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }

    /// True while the guest is staged.
    pub fn is_staged(&self) -> bool {
        self.staged.lock().is_some()
    }

    fn is_staged_as(&self, token: &MoveToken) -> bool {
        let staged = self.staged.lock();
        staged.as_ref().is_some_and(|(_, own)| own.is(token))
    }
}

impl Default for MoveState {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MoveState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MoveState")
            .field("claim", &self.claim)
            .field("staged", &self.is_staged())
            .finish()
    }
}

/// A VM whose guest can move to another VM of its host: the part that the VM shares with its vCPUs.
pub trait Movable: Any + Send + Sync {
    /// The VM's life. A staged guest is away from it ([`Life::go_away`]).
    fn life(&self) -> &Life;

    /// The VM's state of moves.
    fn move_state(&self) -> &MoveState;

    /// Stops the guest's vCPUs and keeps them out until [`reopen`](Self::reopen). Called by the holder
    /// of the claim.
    ///
    /// # Errors
    /// [`Error::Busy`] while an exit waits for an answer that could not move. The vCPUs run on.
    fn halt(&self) -> Result<()>;

    /// Undoes [`halt`](Self::halt).
    fn reopen(&self);

    /// Called when the guest becomes staged, or no longer is.
    fn staged(&self, _staged: bool) {}
}

/// Claims the receiver, then the source. Only the holder of both claims takes locks of two VMs, so
/// their order is free.
///
/// # Errors
/// [`Error::Busy`] while another move involves one of the two; [`Error::Invalid`] with [`Field::Vm`]
/// if the two are one.
pub fn claim_both<'a, V: Movable>(
    to: &'a Arc<V>,
    from: &'a Arc<V>,
) -> Result<(Claimed<'a>, Claimed<'a>)> {
    if Arc::ptr_eq(to, from) {
        return Err(Error::Invalid(Field::Vm, to.life().id().0));
    }
    let (to, from) = (to.move_state(), from.move_state());
    Ok((to.claim.claim()?, from.claim.claim()?))
}

/// Stages the guest of a VM that passes `check`: the token moves it to another VM, once.
///
/// # Errors
/// Nothing was staged. [`Error::Busy`] while a move involves the VM, and that of
/// [`Movable::halt`]; [`Error::Exists`] for a guest
/// that is staged already; the errors of `check`, `random` and `deliver`; [`Error::Again`] for random
/// numbers that are none.
pub fn stage<V: Movable>(
    source: &Arc<V>,
    table: &Arc<StagingTable>,
    random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let state = source.move_state();
    let _claimed = state.claim.claim()?;
    if state.is_staged() {
        return Err(Error::Exists(Field::Token, source.life().id().0));
    }
    check()?;
    let token = MoveToken::draw(random)?;
    deliver(&token)?;
    source.halt()?;
    *state.staged.lock() = Some((Arc::clone(table), token));
    source.staged(true);
    source.life().go_away();
    let entry: Weak<V> = Arc::downgrade(source);
    table.stage(token, entry).inspect_err(|_| {
        unstage(&**source);
        source.reopen();
    })
}

/// Takes the token of a staged guest back; the guest may run again.
///
/// # Errors
/// [`Error::Busy`] while somebody trades it; [`Error::NotFound`] if the guest is not staged.
pub fn cancel<V: Movable>(source: &V) -> Result<()> {
    let _claimed = source.move_state().claim.claim()?;
    if !unstage(source) {
        return Err(Error::NotFound(Field::Token, source.life().id().0));
    }
    source.reopen();
    Ok(())
}

/// Withdraws a VM's token: first in the VM, then in the table, so that a trade that fails at this
/// moment does not put the token back. The vCPUs stay stopped. The caller holds the VM's claim.
/// Returns whether the guest was staged.
pub fn unstage<V: Movable>(source: &V) -> bool {
    let Some((table, token)) = source.move_state().staged.lock().take() else {
        return false;
    };
    source.staged(false);
    source.life().come_back();
    table.withdraw(&token);
    true
}

/// Trades a token: finds its source, claims both VMs, and lets the back end hand the guest over.
/// The source is not staged afterwards, and stays away from its life.
///
/// # Errors
/// The token stays good after the errors of `hand_over` and [`Error::Busy`];
/// [`Error::NotFound`] for a token that is none.
pub fn receive<V: Movable, T>(
    to: &Arc<V>,
    table: &StagingTable,
    token: &MoveToken,
    hand_over: impl FnOnce(&Arc<V>) -> Result<T>,
) -> Result<T> {
    let entry = table.take(token)?;
    let received = trade(to, &entry, token, hand_over);
    if received.is_err() {
        table.put_back(*token, entry, |entry| still_staged(entry, token));
    }
    received
}

fn trade<V: Movable, T>(
    to: &Arc<V>,
    entry: &Weak<dyn Movable>,
    token: &MoveToken,
    hand_over: impl FnOnce(&Arc<V>) -> Result<T>,
) -> Result<T> {
    let source: Arc<dyn Any + Send + Sync> = entry.upgrade().ok_or(gone())?;
    // A VM of another technology may have staged its guest in the same table.
    let other = Error::Invalid(Field::Vm, to.life().id().0);
    let from: Arc<V> = Arc::downcast(source).map_err(|_| other)?;
    let _claims = claim_both(to, &from)?;
    if !from.move_state().is_staged_as(token) {
        return Err(gone());
    }
    let received = hand_over(&from)?;
    *from.move_state().staged.lock() = None;
    Ok(received)
}

fn still_staged(entry: &Weak<dyn Movable>, token: &MoveToken) -> bool {
    let source = entry.upgrade();
    source.is_some_and(|source| source.move_state().is_staged_as(token))
}

/// Leaves only the teardown of a VM whose guest is with another VM now, and remembers that.
pub fn mark_moved(life: &Life) {
    mark_gone(
        life,
        "its guest moved to another VM",
        "destroy it, and go on with the other VM",
    );
}

/// Leaves only the teardown of a VM whose guest is on another host now, and remembers that.
pub fn mark_left(life: &Life) {
    mark_gone(life, "its guest left for another host", "destroy it");
}

fn mark_gone(life: &Life, cause: &'static str, advice: &'static str) {
    let reason = Diagnosis::of(life.tech(), life.id(), Error::Poisoned);
    life.poison_by(reason.because(cause).advise(advice).gone());
}
