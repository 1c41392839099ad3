//! The staged form of a move: a one-time token buys the context.

use alloc::sync::Arc;

use kvm_ops::moves::{self, GuestName, Movable, MoveState, MoveToken, StagingTable};
use kvm_ops::{Error, Field, Host, Life, Result, Step, Tech};

use super::group::Role;
use super::transfer::{take_over, unfit};
use crate::rules::{EINVAL, ENOTTY, errno};
use crate::shared::Shared;

impl<H: Host> Movable for Shared<H> {
    fn life(&self) -> &Life {
        &self.life
    }

    fn move_state(&self) -> &MoveState {
        &self.moving
    }

    fn halt(&self) -> Result<()> {
        // The gate of a suspended guest stays closed until it is resumed.
        if self.memory().swap.is_suspended() {
            return Err(Error::Busy);
        }
        self.stop();
        Ok(())
    }

    fn reopen(&self) {
        self.gate.open();
    }

    fn staged(&self, staged: bool) {
        self.membership().role = if staged { Role::Staged } else { Role::Owner };
    }
}

/// [`Backend::local_send`](kvm_ops::Backend::local_send).
pub(crate) fn local_send<H: Host>(
    source: &Arc<Shared<H>>,
    table: &Arc<StagingTable>,
    random: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    deliver: &mut dyn FnMut(&MoveToken) -> Result<()>,
) -> Result<()> {
    moves::stage(source, table, random, deliver, || may_send(source))
}

fn may_send<H: Host>(source: &Shared<H>) -> Result<()> {
    match &source.membership().role {
        Role::Owner => {}
        Role::Staged => return Err(Error::Exists(Field::Token, source.id().0)),
        Role::Mirror => return Err(errno(EINVAL)),
        Role::Given(_) | Role::Moved => return Err(Error::Poisoned),
    }
    let step = source.step();
    if step == Step::Poisoned {
        return Err(Error::Poisoned);
    }
    match source.context().as_ref() {
        None => Err(errno(ENOTTY)),
        Some(context) if context.guest.is_none() => Err(Error::WrongState(step)),
        // Encrypted registers move only when all of them are.
        Some(_) if source.tech() == Tech::SevSnp => step.require(Step::Runnable),
        Some(_) => Ok(()),
    }
}

/// [`Backend::local_receive`](kvm_ops::Backend::local_receive).
pub(crate) fn local_receive<H: Host>(
    to: &Arc<Shared<H>>,
    table: &StagingTable,
    token: &MoveToken,
    deliver: &mut dyn FnMut(GuestName) -> Result<()>,
) -> Result<GuestName> {
    moves::receive(to, table, token, |from| {
        let mut name = None;
        take_over(to, from, |context| {
            let found = context.name().ok_or(unfit(from))?;
            name = Some(found);
            deliver(found)
        })?;
        from.membership().role = Role::Given(Arc::downgrade(to));
        name.ok_or(unfit(from))
    })
}
