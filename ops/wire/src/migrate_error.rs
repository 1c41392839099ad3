//! The reasons why a migration stops.

use core::fmt;

use embedded_io::ErrorKind;
use kvm_ops::Error;

use crate::error::{FrameError, WireError};

/// The reason why a migration stopped. None of them but [`MigrateError::Lost`] loses the guest: see
/// [`MigrateError::can_go_on`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MigrateError {
    /// An operation failed here: an SP command, or one that the VM refused.
    #[error("{operation} failed")]
    Failed {
        /// The command or operation.
        operation: &'static str,
        /// The error, with the firmware's status if there is one.
        #[source]
        error: Error,
    },
    /// The link failed.
    #[error("the link failed: {0:?}")]
    Link(ErrorKind),
    /// The link ended inside a frame, or where one was due.
    #[error("the link ended early")]
    Truncated,
    /// The bytes that came are no frame.
    #[error("the bytes are no frame of a migration")]
    Frame(#[from] FrameError),
    /// The peer sent a record that does not fit.
    #[error("the peer does not keep to the protocol")]
    Protocol(#[from] ProtocolError),
    /// The peer refused.
    #[error("the peer refused")]
    Refused(#[source] Refusal),
    /// The caller cancelled; the guest runs on at its source.
    #[error("cancelled")]
    Cancelled,
    /// The call does not fit the phase of the migration.
    #[error("not allowed in this phase of a migration")]
    WrongPhase,
    /// The guest ran at the target before its pages had come, and they cannot follow.
    #[error("the guest is lost: pages of it cannot follow it")]
    Lost(#[source] Refusal),
}

impl MigrateError {
    /// True if the link broke, and neither end is at fault: another may take its place in every session.
    pub const fn is_of_the_link(&self) -> bool {
        matches!(self, Self::Link(_) | Self::Truncated)
    }

    /// True if an end that loses nothing by it may try the same session over a new link: one that sends SEV
    /// guests, or one that gave its guest up and asks who has it. The sender of a TD that still has it goes on
    /// only after an error [of the link](Self::is_of_the_link), because the module takes no bundle twice. An end
    /// that does not go on cancels, and the guest runs on at its source.
    pub const fn can_go_on(&self) -> bool {
        match self {
            Self::Link(_) | Self::Truncated | Self::Frame(_) => true,
            Self::Protocol(error) => !matches!(
                error,
                ProtocolError::Incomplete { .. }
                    | ProtocolError::TooManyRecords
                    | ProtocolError::NoPostCopy
            ),
            Self::Failed { error, .. } => error.is_transient(),
            Self::Refused(refusal) => refusal.can_go_on(),
            Self::Cancelled | Self::WrongPhase | Self::Lost(_) => false,
        }
    }
}

/// The reason why a record does not fit.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A record of this kind is not due now.
    #[error("record kind {0:#x} is not due")]
    Unexpected(u8),
    /// A record out of sequence.
    #[error("record {got} came where {due} was due")]
    Index {
        /// The number that was due.
        due: u64,
        /// The number that came.
        got: u64,
    },
    /// A field of the payload is out of range.
    #[error("{0} is out of range")]
    Field(&'static str),
    /// A frame number outside of the guest's memory.
    #[error("frame {0:#x} is outside of the guest")]
    OutsideOfGuest(u64),
    /// Another session than the one that is under way.
    #[error("not the session that is under way")]
    Session,
    /// The sender says that the guest is complete, and it is not.
    #[error("{frames} frames and {vcpus} vCPUs never came")]
    Incomplete {
        /// Frames of the guest's memory that never came.
        frames: u64,
        /// vCPUs whose state never came.
        vcpus: u32,
    },
    /// The session has more records than the receiver allows.
    #[error("more records than the session may have")]
    TooManyRecords,
    /// The guest's pages would follow it, and this end takes no such guest.
    #[error("the guest would come before its pages, which this end does not take")]
    NoPostCopy,
}

/// The peer's refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}, status {status:#x}")]
pub struct Refusal {
    /// The class of the reason.
    pub reason: Reason,
    /// The firmware's status or the errno that belongs to it; 0 for none.
    pub status: u64,
}

/// Status of the firmware for a packet that is not authentic (SEV API, BAD_MEASUREMENT).
const BAD_MEASUREMENT: u64 = 0x0b;

impl Refusal {
    /// True if the same session may go on.
    pub const fn can_go_on(&self) -> bool {
        match self.reason {
            // Damaged records are sent again.
            Reason::Damaged | Reason::Busy => true,
            Reason::Firmware => self.status == BAD_MEASUREMENT,
            _ => false,
        }
    }
}

/// The classes of reasons for a refusal, as they travel.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Reason {
    /// The records were damaged, out of order, or unknown.
    Damaged = 1,
    /// The guest does not fit the VM that waits for it.
    Shape = 2,
    /// The firmware refused; the status is its.
    Firmware = 3,
    /// The VM or its host refused; the status is the errno.
    Host = 4,
    /// Another migration is under way.
    Busy = 5,
    /// No such session.
    Session = 6,
    /// The guest is not complete, or the session is longer than the receiver allows.
    Limits = 7,
    /// The target takes no guest before its pages.
    PostCopy = 8,
}

impl Reason {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Damaged, "records were damaged or out of order"),
        (
            Self::Shape,
            "the guest does not fit the VM that waits for it",
        ),
        (Self::Firmware, "firmware refused"),
        (Self::Host, "the VM or its host refused"),
        (Self::Busy, "another migration is under way"),
        (Self::Session, "no such session"),
        (
            Self::Limits,
            "the guest is incomplete or the session too long",
        ),
        (Self::PostCopy, "the target takes no guest before its pages"),
    ];

    /// The reason of that number.
    pub fn from_wire(raw: u16) -> Option<Self> {
        let known = Self::ALL.iter().find(|(reason, _)| *reason as u16 == raw);
        known.map(|(reason, _)| *reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::ALL.iter().find(|(reason, _)| reason == self);
        f.write_str(known.map_or("refused", |(_, text)| text))
    }
}

impl From<WireError> for MigrateError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Link(kind) => Self::Link(kind),
            WireError::Truncated => Self::Truncated,
            WireError::Frame(error) => Self::Frame(error),
        }
    }
}

impl MigrateError {
    /// Names the operation that failed.
    ///
    /// # Errors
    /// [`Self::Failed`] for an error.
    pub fn at<T>(operation: &'static str, result: kvm_ops::Result<T>) -> Result<T, Self> {
        result.map_err(|error| Self::Failed { operation, error })
    }
}
