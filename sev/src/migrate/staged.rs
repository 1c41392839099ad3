//! The staged form of a move: a one-time token buys the context.
//!
//! KVM_SEV_LOCAL_SEND and KVM_SEV_LOCAL_RECEIVE as they were once proposed for Linux, for programs
//! that cannot hand each other anything but bytes.

use alloc::sync::{Arc, Weak};
use core::fmt;

use kvm_ops::{Error, Field, Host, Result, Step, Tech};

use super::StagingTable;
use super::group::Role;
use super::staging::MoveToken;
use super::transfer::{claim_both, halt, reopen, take_over, unfit};
use crate::SevVm;
use crate::rules::{EINVAL, ENOTTY, errno};
use crate::shared::Shared;

/// The entry of a [`StagingTable`]: a way to find the source while it lives.
pub struct Staged<H: Host>(Weak<Shared<H>>);

impl<H: Host> fmt::Debug for Staged<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Staged")
    }
}

impl<H: Host> Staged<H> {
    fn still(&self, token: &MoveToken) -> bool {
        let source = self.0.upgrade();
        source.is_some_and(|source| is_staged(&source, token))
    }
}

/// True for a source that is staged under that token.
fn is_staged<H: Host>(source: &Shared<H>, token: &MoveToken) -> bool {
    matches!(&source.membership().role, Role::Staged { token: own, .. } if own.is(token))
}

impl<H: Host> SevVm<H> {
    /// Stages the VM's context: the token moves it to any VM of this machine, once. From now on the
    /// VM does not run and takes debug commands only (17, 18), also after the context was taken, as
    /// long as its new VM lives.
    ///
    /// `random` fills the token from the host's random numbers; `deliver` hands it on. If one of them
    /// fails, nothing was staged.
    ///
    /// # Errors
    /// ENOTTY for a VM without a context; [`Error::WrongState`] before LAUNCH_START;
    /// [`Error::Exists`] for a VM that is staged already; EINVAL for a mirror; unsupported for SNP;
    /// [`Error::Again`] if `random` gives no random numbers; the errors of `random` and `deliver`.
    pub fn local_send(
        &mut self,
        table: &Arc<StagingTable<Staged<H>>>,
        random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
        deliver: impl FnOnce(&MoveToken) -> Result<()>,
    ) -> Result<()> {
        let source = &self.shared;
        let _claimed = source.claim.claim()?;
        match &source.membership().role {
            Role::Owner => {}
            Role::Staged { .. } => return Err(Error::Exists(Field::Token, source.id().0)),
            Role::Mirror => return Err(errno(EINVAL)),
            Role::Given(_) | Role::Moved => return Err(Error::Poisoned),
        }
        let step = source.step();
        if step == Step::Poisoned {
            return Err(Error::Poisoned);
        }
        match source.context().as_ref() {
            None => return Err(errno(ENOTTY)),
            Some(_) if source.tech() == Tech::SevSnp => {
                return kvm_ops::not_offered!("local_send of an SNP guest");
            }
            Some(context) if context.guest.is_none() => return Err(Error::WrongState(step)),
            Some(_) => {}
        }
        let token = MoveToken::draw(random)?;
        deliver(&token)?;
        halt(source);
        source.membership().role = Role::Staged {
            table: Arc::clone(table),
            token,
        };
        source.set_away(true);
        table
            .stage(token, Staged(Arc::downgrade(source)))
            .inspect_err(|_| {
                source.membership().role = Role::Owner;
                source.set_away(false);
                reopen(source);
            })
    }

    /// Takes the token back; the VM runs on.
    ///
    /// # Errors
    /// [`Error::Busy`] while somebody trades it; [`Error::NotFound`] if the VM is not staged.
    pub fn local_cancel(&mut self) -> Result<()> {
        let source = &self.shared;
        let _claimed = source.claim.claim()?;
        if !unstage(source) {
            return Err(Error::NotFound(Field::Token, source.id().0));
        }
        reopen(source);
        Ok(())
    }

    /// Trades a token for its context. The VM is launched then and goes on where the source was.
    /// `deliver` gets the guest's handle; if it fails, nothing has happened, and the token stays good.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a token that is not good: never staged here, traded, withdrawn, or
    /// of a VM that is gone. [`Error::Invalid`] for a VM of another technology or machine, one
    /// whose launch has begun, one with regions or pages, or, for SEV-ES, with another number of
    /// vCPUs: the token stays good. [`Error::Busy`] while either VM is on the move.
    pub fn local_receive(
        &mut self,
        table: &StagingTable<Staged<H>>,
        token: &MoveToken,
        deliver: impl FnOnce(u32) -> Result<()>,
    ) -> Result<u32> {
        let staged = table.take(token)?;
        let received = receive(&self.shared, &staged, token, deliver);
        if received.is_err() {
            table.put_back(*token, staged, |staged| staged.still(token));
        }
        received
    }
}

fn receive<H: Host>(
    to: &Arc<Shared<H>>,
    staged: &Staged<H>,
    token: &MoveToken,
    deliver: impl FnOnce(u32) -> Result<()>,
) -> Result<u32> {
    let gone = Error::NotFound(Field::Token, 0);
    let from = staged.0.upgrade().ok_or(gone)?;
    let _claims = claim_both(to, &from)?;
    if !is_staged(&from, token) {
        return Err(gone);
    }
    let mut handle = None;
    take_over(to, &from, |context| {
        let number = context.handle().ok_or(unfit(&from))?;
        handle = Some(number);
        deliver(number)
    })?;
    from.membership().role = Role::Given(Arc::downgrade(to));
    handle.ok_or(unfit(&from))
}

/// Withdraws the VM's token: first in the VM, then in the table, so that a trade that fails at this
/// moment does not put the token back. Returns whether the VM was staged.
pub(super) fn unstage<H: Host>(source: &Shared<H>) -> bool {
    let mut membership = source.membership();
    let Role::Staged { table, token } = &membership.role else {
        return false;
    };
    let (table, token) = (Arc::clone(table), *token);
    membership.role = Role::Owner;
    drop(membership);
    source.set_away(false);
    table.withdraw(&token);
    true
}
