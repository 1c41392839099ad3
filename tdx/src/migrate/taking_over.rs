//! The start token at its target: who has the guest.

use embedded_io::{Read, Write};
use kvm_ops::Host;
use kvm_ops_wire::{Flow, MigrateError, Phase, Progress, ProtocolError};

use super::bundle::Bundle;
use super::receiver::Receiver;
use super::record::{self, Kind, Wire};

type Result<T> = core::result::Result<T, MigrateError>;

impl<H: Host> Receiver<'_, H> {
    /// The start token came: the guest is this end's or runs here, or goes back with the abort token.
    pub(super) fn start<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        token: &Bundle,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        if !matches!(self.phase, Phase::Prepared | Phase::Committed) || !token.is_start_token() {
            return Err(ProtocolError::Unexpected(Kind::Start as u8).into());
        }
        let owned = self.own(token);
        if owned.is_ok() && self.phase == Phase::PostCopy {
            // The guest may run before the source hears of it. It is too late to cancel.
            let _ = watch(&self.progress());
            wire.send(Kind::Running, self.next, &[])?;
            wire.flush()?;
            let _ = watch(&self.progress());
            return Ok(());
        }
        if owned.is_ok() {
            wire.send(Kind::Done, self.next, &[])?;
            return Ok(wire.flush()?);
        }
        self.give_back()?;
        self.send_returned(wire)?;
        owned
    }

    /// Sends the abort token, if there is one.
    pub(super) fn send_returned<L: Read + Write>(&self, wire: &mut Wire<'_, L>) -> Result<()> {
        let Some(token) = &self.returned else {
            return Ok(());
        };
        wire.send(Kind::Returned, self.next, &[&record::bundle(token)])?;
        Ok(wire.flush()?)
    }

    fn own(&mut self, token: &Bundle) -> Result<()> {
        if self.phase == Phase::Prepared {
            MigrateError::at("TDH.IMPORT.TRACK", self.target.take(token))?;
            self.phase = Phase::Committed;
        }
        if self.following.agreed {
            return self.commit();
        }
        MigrateError::at("TDH.IMPORT.END", self.target.own())?;
        self.phase = Phase::Done;
        Ok(())
    }
}
