//! Why a migration stopped.

use core::fmt;

use embedded_io::ErrorKind;
use kvm_ops::Error;

/// Why a migration stopped. None of them loses the guest: see [`MigrateError::can_go_on`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrateError {
    /// An operation failed here: an SP command, or one that the VM refused.
    Failed {
        /// The command or operation.
        operation: &'static str,
        /// How it failed, with the firmware's status where there is one.
        error: Error,
    },
    /// The link failed.
    Link(ErrorKind),
    /// The link ended in the middle of a frame, or where one was due.
    Truncated,
    /// The bytes that came are no frame.
    Frame(FrameError),
    /// The peer sent a record that does not fit.
    Protocol(ProtocolError),
    /// The peer refused and said why.
    Refused(Refusal),
    /// The caller cancelled; the guest runs on at its source.
    Cancelled,
    /// The call does not fit the phase of the migration.
    WrongPhase,
}

impl MigrateError {
    /// Whether the same session may go on over a new link. Otherwise the sender cancels, and the
    /// guest runs on at its source.
    pub const fn can_go_on(&self) -> bool {
        match self {
            Self::Link(_) | Self::Truncated | Self::Frame(_) => true,
            Self::Protocol(error) => !matches!(
                error,
                ProtocolError::Incomplete { .. } | ProtocolError::TooManyRecords
            ),
            Self::Failed { error, .. } => error.is_transient(),
            Self::Refused(refusal) => refusal.can_go_on(),
            Self::Cancelled | Self::WrongPhase => false,
        }
    }
}

/// Why bytes are no frame.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// It does not start with the magic number.
    Magic(u32),
    /// A version of the format that is not known here.
    Version(u8),
    /// A kind that is not known here.
    Kind(u8),
    /// Reserved bits are set.
    Reserved(u16),
    /// A length that its kind cannot have.
    Length {
        /// The kind.
        kind: u8,
        /// The length that it claims.
        claimed: u32,
    },
    /// The tag is wrong: the frame was damaged or forged, or the ends have different keys.
    Tag,
}

/// Why a record does not fit.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A record of this kind is not due now.
    Unexpected(u8),
    /// A record out of sequence.
    Index {
        /// The number that was due.
        due: u64,
        /// The number that came.
        got: u64,
    },
    /// A field of the payload is out of range.
    Field(&'static str),
    /// A frame number outside of the guest's memory.
    OutsideOfGuest(u64),
    /// Another session than the one that is under way.
    Session,
    /// The sender says that everything came, and it did not.
    Incomplete {
        /// Frames of the guest's memory that never came.
        frames: u64,
        /// vCPUs whose state never came.
        vcpus: u32,
    },
    /// The session has more records than [`ReceiveLimits`](crate::ReceiveLimits) allows.
    TooManyRecords,
}

/// Why the peer refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The class of the reason.
    pub reason: Reason,
    /// The firmware's status or the errno that belongs to it; 0 for none.
    pub status: u64,
}

impl Refusal {
    /// Whether the same session may go on.
    pub const fn can_go_on(&self) -> bool {
        // Damaged records are sent again.
        matches!(self.reason, Reason::Damaged | Reason::Busy)
            || (matches!(self.reason, Reason::Firmware) && self.status == BAD_MEASUREMENT)
    }
}

/// Status of the firmware for a packet that is not authentic (SEV API, BAD_MEASUREMENT).
const BAD_MEASUREMENT: u64 = 0x0b;

/// The classes of reasons for a refusal, as they travel.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Reason {
    /// The records were damaged, out of order, or not understood.
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
}

impl Reason {
    pub(crate) fn from_wire(raw: u16) -> Option<Self> {
        [
            Self::Damaged,
            Self::Shape,
            Self::Firmware,
            Self::Host,
            Self::Busy,
            Self::Session,
            Self::Limits,
        ]
        .into_iter()
        .find(|reason| *reason as u16 == raw)
    }
}

pub(crate) type Result<T> = core::result::Result<T, MigrateError>;

/// Names the operation that failed.
pub(crate) fn at<T>(operation: &'static str, result: kvm_ops::Result<T>) -> Result<T> {
    result.map_err(|error| MigrateError::Failed { operation, error })
}

impl From<FrameError> for MigrateError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

impl From<ProtocolError> for MigrateError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { operation, .. } => write!(f, "{operation} failed"),
            Self::Link(kind) => write!(f, "the link failed: {kind:?}"),
            Self::Truncated => f.write_str("the link ended early"),
            Self::Frame(_) => f.write_str("the bytes are no frame of a migration"),
            Self::Protocol(_) => f.write_str("the peer does not keep to the protocol"),
            Self::Refused(_) => f.write_str("the peer refused"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::WrongPhase => f.write_str("not allowed in this phase of a migration"),
        }
    }
}

impl core::error::Error for MigrateError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Failed { error, .. } => Some(error),
            Self::Frame(error) => Some(error),
            Self::Protocol(error) => Some(error),
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(got) => write!(f, "magic number {got:#010x}"),
            Self::Version(got) => write!(f, "format version {got}"),
            Self::Kind(got) => write!(f, "record kind {got:#x}"),
            Self::Reserved(got) => write!(f, "reserved bits {got:#x}"),
            Self::Length { kind, claimed } => {
                write!(f, "length {claimed:#x} for record kind {kind:#x}")
            }
            Self::Tag => f.write_str("wrong tag"),
        }
    }
}

impl core::error::Error for FrameError {}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unexpected(kind) => write!(f, "record kind {kind:#x} is not due"),
            Self::Index { due, got } => write!(f, "record {got} came where {due} was due"),
            Self::Field(name) => write!(f, "{name} is out of range"),
            Self::OutsideOfGuest(gfn) => write!(f, "frame {gfn:#x} is outside of the guest"),
            Self::Session => f.write_str("not the session that is under way"),
            Self::Incomplete { frames, vcpus } => {
                write!(f, "{frames} frames and {vcpus} vCPUs never came")
            }
            Self::TooManyRecords => f.write_str("more records than the session may have"),
        }
    }
}

impl core::error::Error for ProtocolError {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.reason {
            Reason::Damaged => "records were damaged or out of order",
            Reason::Shape => "the guest does not fit the VM that waits for it",
            Reason::Firmware => "firmware refused",
            Reason::Host => "the VM or its host refused",
            Reason::Busy => "another migration is under way",
            Reason::Session => "no such session",
            Reason::Limits => "the guest is incomplete or the session too long",
        })?;
        match self.status {
            0 => Ok(()),
            status => write!(f, ", status {status:#x}"),
        }
    }
}

impl core::error::Error for Refusal {}
