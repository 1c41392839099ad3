//! The reasons why a link carries no record.

use embedded_io::ErrorKind;

/// The reason why a frame was not sent or received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The link failed.
    #[error("the link failed: {0:?}")]
    Link(ErrorKind),
    /// The link ended inside a frame, or where one was due.
    #[error("the link ended early")]
    Truncated,
    /// The bytes that came are no frame.
    #[error("the bytes are no frame of a migration")]
    Frame(#[from] FrameError),
}

/// The reason why bytes are no frame.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another number than the magic one at the start.
    #[error("magic number {0:#010x}")]
    Magic(u32),
    /// An unknown version of the format.
    #[error("format version {0}")]
    Version(u8),
    /// An unknown kind.
    #[error("record kind {0:#x}")]
    Kind(u8),
    /// Reserved bits are set.
    #[error("reserved bits {0:#x}")]
    Reserved(u16),
    /// A length that its kind cannot have.
    #[error("length {claimed:#x} for record kind {kind:#x}")]
    Length {
        /// The kind.
        kind: u8,
        /// The length that it claims.
        claimed: u32,
    },
    /// The tag is wrong: the frame was damaged or forged, or the ends have different keys.
    #[error("wrong tag")]
    Tag,
}

pub(crate) type Result<T> = core::result::Result<T, WireError>;
