//! Ready: how far a target is, and the challenge of the link.

use crate::{Challenge, Fields, MigrateError, ProtocolError};

/// How far a target is, as its Ready says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TargetState {
    /// It takes records.
    Receiving = 1,
    /// It has everything, and awaits what makes the guest its own.
    Prepared = 2,
    /// The guest is its own.
    Owner = 3,
    /// It runs the guest, and takes the pages that follow.
    Running = 4,
}

impl TargetState {
    /// Returns the payload of a Ready.
    #[must_use]
    pub fn ready(self, challenge: &Challenge) -> [u8; 25] {
        let mut out = [self as u8; 25];
        out[1..].copy_from_slice(challenge);
        out
    }

    /// Reads the payload of a Ready.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::Field`] for another state, and the error of [`Fields`] for a payload that is
    /// too short.
    pub fn parse_ready(payload: &[u8]) -> Result<(Self, Challenge), MigrateError> {
        let mut fields = Fields::of(payload);
        let state = match fields.u8()? {
            1 => Self::Receiving,
            2 => Self::Prepared,
            3 => Self::Owner,
            4 => Self::Running,
            _ => return Err(ProtocolError::Field("state of the target").into()),
        };
        Ok((state, fields.array()?))
    }
}
