//! Guest requests over the GHCB page: reports and derived keys.

use super::ghcb::exit_code;
use super::message::{
    Channel, MAX_MESSAGE, MessageError, MessageKey, REPORT_LEN, ReportRequest, Request,
};
use super::{GhcbAnswer, GhcbExit, GhcbPort, SevGuest};
use crate::{GpaRange, SharedBuffer};
use core::fmt;

const PAGE: usize = 0x1000;
/// SW_EXITINFO2, upper half: the host's errors (GHCB specification, "SNP Guest Request").
const INVALID_LEN: u32 = 1;
const BUSY: u32 = 2;

impl<P: GhcbPort> SevGuest<P> {
    /// Asks the firmware, through the host, and opens its answer.
    ///
    /// `buffer` is shared memory of two pages or more, for the request and its answer; `memory` is the
    /// same pages. `wait` is called when the host is busy, before the same message is sent again; it gives
    /// up by returning false.
    ///
    /// # Errors
    /// See [`RequestError`]. Until an answer came, the channel takes only the same request again.
    pub fn guest_request<K: MessageKey, R: Request>(
        &mut self,
        channel: &mut Channel<K>,
        buffer: GpaRange,
        memory: &mut impl SharedBuffer,
        request: &R,
        wait: impl FnMut() -> bool,
    ) -> Result<R::Response, RequestError> {
        let exit = exit(exit_code::GUEST_REQUEST, buffer)?;
        self.exchange_messages(channel, exit, memory, request, wait)
    }

    /// Asks for a report and for the certificates that the host has for it.
    ///
    /// The pages of `buffer` behind the first two are for the certificates. They are copied to
    /// `certificates`, as far as they fit; the bytes that were copied are a table of certificates, which
    /// a verifier reads. It is the host's word.
    ///
    /// # Errors
    /// See [`RequestError`]. [`RequestError::Certificates`] says how many pages the host needs: the same
    /// request may be made again with a larger buffer, or without certificates by
    /// [`guest_request`](Self::guest_request).
    pub fn extended_report<K: MessageKey>(
        &mut self,
        channel: &mut Channel<K>,
        buffer: GpaRange,
        memory: &mut impl SharedBuffer,
        request: &ReportRequest,
        certificates: &mut [u8],
        wait: impl FnMut() -> bool,
    ) -> Result<([u8; REPORT_LEN], usize), RequestError> {
        let exit = exit(exit_code::EXTENDED_GUEST_REQUEST, buffer)?;
        let pages = buffer.bytes() / PAGE as u64 - 2;
        let exit = GhcbExit {
            rax: Some(buffer.start() + 2 * PAGE as u64),
            rbx: Some(pages),
            ..exit
        };
        let report = self.exchange_messages(channel, exit, memory, request, wait)?;
        let room = usize::try_from(pages).map_or(usize::MAX, |pages| pages.saturating_mul(PAGE));
        let len = room.min(certificates.len());
        memory.read(2 * PAGE, &mut certificates[..len]);
        Ok((report, len))
    }

    fn exchange_messages<K: MessageKey, R: Request>(
        &mut self,
        channel: &mut Channel<K>,
        exit: GhcbExit,
        memory: &mut impl SharedBuffer,
        request: &R,
        mut wait: impl FnMut() -> bool,
    ) -> Result<R::Response, RequestError> {
        let mut message = [0; MAX_MESSAGE];
        let len = channel.seal(request, &mut message)?;
        loop {
            memory.write(0, &message[..len]);
            // What an earlier answer left there is none to this request.
            memory.write(PAGE, &[0; MAX_MESSAGE]);
            match took(self.port().ghcb_exit(exit)) {
                Ok(()) => break,
                Err(RequestError::Host(BUSY)) if wait() => {}
                Err(error) => return Err(error),
            }
        }
        // One copy: what is opened below is what is used.
        memory.read(PAGE, &mut message);
        Ok(channel.open::<R>(&mut message)?)
    }
}

/// The exit for a buffer of two pages or more.
fn exit(code: u64, buffer: GpaRange) -> Result<GhcbExit, RequestError> {
    let bytes = buffer.bytes();
    if bytes < 2 * PAGE as u64 {
        return Err(RequestError::Buffer { bytes });
    }
    Ok(GhcbExit {
        code,
        info1: buffer.start(),
        info2: buffer.start() + PAGE as u64,
        ..GhcbExit::default()
    })
}

/// Reads the host's answer: SW_EXITINFO2 is its own error above that of the firmware.
fn took(answer: GhcbAnswer) -> Result<(), RequestError> {
    if answer.info1 as u32 != 0 {
        return Err(RequestError::Refused {
            info1: answer.info1,
            info2: answer.info2,
        });
    }
    match ((answer.info2 >> 32) as u32, answer.info2 as u32) {
        (0, 0) => Ok(()),
        (INVALID_LEN, _) => Err(RequestError::Certificates {
            pages: answer.rbx.unwrap_or(0),
        }),
        (0, status) => Err(RequestError::Firmware(status)),
        (error, _) => Err(RequestError::Host(error)),
    }
}

/// Why a guest request has no answer.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The buffer has no room for request and answer: two pages.
    Buffer {
        /// Its length.
        bytes: u64,
    },
    /// No message was sealed, or the answer is none.
    Message(MessageError),
    /// The host did not take the exit.
    Refused {
        /// SW_EXITINFO1.
        info1: u64,
        /// SW_EXITINFO2.
        info2: u64,
    },
    /// The host needs so many pages for its certificates, it says.
    Certificates {
        /// The number of pages.
        pages: u64,
    },
    /// The host refused the request; 2 if it was busy for as long as the caller waited.
    Host(u32),
    /// The firmware refused the message, as the host says.
    Firmware(u32),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Buffer { bytes } => {
                write!(
                    f,
                    "{bytes:#x} bytes are no room for a guest request and its answer"
                )
            }
            Self::Message(_) => f.write_str("no message from the firmware"),
            Self::Refused { info1, info2 } => {
                write!(
                    f,
                    "the host refused the exit with {info1:#x} and {info2:#x}"
                )
            }
            Self::Certificates { pages } => {
                write!(f, "the host needs {pages:#x} pages for its certificates")
            }
            Self::Host(error) => write!(f, "the host refused the request with {error:#x}"),
            Self::Firmware(status) => {
                write!(f, "the firmware refused the message with {status:#x}")
            }
        }
    }
}

impl core::error::Error for RequestError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Message(error) => Some(error),
            _ => None,
        }
    }
}

impl From<MessageError> for RequestError {
    fn from(error: MessageError) -> Self {
        Self::Message(error)
    }
}
