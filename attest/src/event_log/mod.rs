//! Event logs of TDs: what firmware, boot loader and guest measured into the RTMRs.
//!
//! The log is TCG's (*PC Client Platform Firmware Profile*, 10: a header event, then
//! `TCG_PCR_EVENT2` records), in the memory that the ACPI table CCEL names. Its register numbers are
//! those of UEFI's confidential computing protocol (UEFI 2.10, 38.4.1): 0 is MRTD, 1 to 4 are RTMR0
//! to RTMR3. Linux shows it in `/sys/firmware/acpi/tables/data/CCEL`.
//!
//! A log is no evidence by itself, since the host can write another one. Its digests are believed if
//! they [replay](EventLog::rtmrs) to the RTMRs of a quote; the data of an event only if the digest is
//! that of the data ([`Event::digest_is_of_data`]).
//!
//! ```
//! use kvm_ops_attest::event_log::{EventKind, EventLog, Writer};
//!
//! let mut writer = Writer::new();
//! let digest = writer.measure(2, EventKind::IPL, b"root=/dev/vda")?; // for TDG.MR.RTMR.EXTEND
//! let log = EventLog::from_bytes(writer.as_bytes())?;
//! assert_eq!(log.events()[0].sha384(), Some(digest));
//! assert_eq!(log.rtmrs()[0], [0; 48]);
//! assert_ne!(log.rtmrs()[2], [0; 48]);
//! # Ok::<(), kvm_ops_attest::event_log::LogError>(())
//! ```

mod kind;
mod log;
mod reader;
mod writer;

pub use kind::EventKind;
pub use log::{Event, EventLog, RTMRS};
pub use writer::Writer;

use thiserror::Error;

/// Most bytes of a log that are read.
pub const MAX_LOG: usize = 0x20_0000;
/// Most events of a log that are read.
pub const MAX_EVENTS: usize = 0x4000;

/// TPM_ALG_SHA384, the algorithm of the RTMRs.
const SHA384: u16 = 0x000c;

/// The bytes are no event log of a TD.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum LogError {
    #[error("{0:#x} bytes are more than the {MAX_LOG:#x} that are read")]
    TooLong(usize),
    #[error("more than {MAX_EVENTS:#x} events")]
    TooMany,
    #[error("the log is cut: it ends within the event at {0:#x}")]
    Cut(usize),
    #[error("the first event is no header of a TCG log (Spec ID Event03)")]
    Header,
    #[error("the header names no SHA-384, which RTMRs are made with")]
    NoSha384,
    #[error(
        "the event at {at:#x} has a digest of the algorithm {algorithm:#x}, which the header does not name"
    )]
    Algorithm { at: usize, algorithm: u16 },
    #[error("the event at {0:#x} has no digest of SHA-384, or has two")]
    Digest(usize),
    #[error("the event at {at:#x} is of register {register}; those of a TD are 0 to 4")]
    Register { at: usize, register: u32 },
    #[error("bytes behind the last event at {0:#x} that are no event and no filling")]
    Tail(usize),
    #[error("RTMR{0} does not exist; those of a TD are 0 to 3")]
    Rtmr(usize),
}
