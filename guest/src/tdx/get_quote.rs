//! GetQuote from its request to the quote, over a buffer that the host shares.

use super::{CallError, QuoteHeader, QuoteStatus, TdGuest, TdcallPort, Vmcall};
use crate::{GpaRange, SharedBuffer};
use core::fmt;

/// The length of a TDREPORT in bytes.
pub const REPORT_LEN: usize = 1024;

impl<P: TdcallPort> TdGuest<P> {
    /// Asks the host for a quote of a TDREPORT (TDG.MR.REPORT), waits for it, and copies it to `quote`;
    /// returns its length.
    ///
    /// `buffer` is shared, `memory` is the same pages. `wait` is called whenever the quote is not there
    /// yet; it halts, or counts, and gives up by returning false. The quote is the host's word until a
    /// verifier has seen it: it needs no protection, and deserves no trust.
    ///
    /// # Errors
    /// See [`QuoteError`]. After [`QuoteError::GivenUp`] the host may still write to the buffer: it must
    /// not become private, nor be used for another call, until its status is no longer IN_FLIGHT.
    pub fn get_quote(
        &mut self,
        buffer: GpaRange,
        memory: &mut impl SharedBuffer,
        report: &[u8; REPORT_LEN],
        quote: &mut [u8],
        mut wait: impl FnMut() -> bool,
    ) -> Result<usize, QuoteError> {
        // A page at least, so header and report fit.
        let room = buffer.bytes() - QuoteHeader::LEN as u64;
        memory.write(QuoteHeader::LEN, report);
        memory.write(0, &QuoteHeader::request(REPORT_LEN as u32).to_bytes());
        self.vmcall(Vmcall::GetQuote(buffer))
            .map_err(QuoteError::Call)?;
        let header = loop {
            // One copy: what is checked below is what is used.
            let mut bytes = [0; QuoteHeader::LEN];
            memory.read(0, &mut bytes);
            let header = QuoteHeader::from_bytes(bytes);
            if header.status != QuoteStatus::IN_FLIGHT {
                break header;
            }
            if !wait() {
                return Err(QuoteError::GivenUp);
            }
        };
        if header.status != QuoteStatus::SUCCESS {
            return Err(QuoteError::Status(header.status));
        }
        let out_len = header.out_len;
        if header.version != QuoteHeader::VERSION || out_len == 0 || u64::from(out_len) > room {
            return Err(QuoteError::Header(header));
        }
        let len = out_len as usize;
        let out = quote.get_mut(..len).ok_or(QuoteError::Room { len })?;
        memory.read(QuoteHeader::LEN, out);
        Ok(len)
    }
}

/// Why there is no quote.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuoteError {
    /// The call itself was refused.
    Call(CallError),
    /// The host has none: its quoting service failed, or is not there.
    Status(QuoteStatus),
    /// The host's header is none: another version, no data, or more than the buffer holds.
    Header(QuoteHeader),
    /// The quote is longer than the caller's memory.
    Room {
        /// Its length in bytes.
        len: usize,
    },
    /// The caller does not wait any longer.
    GivenUp,
}

impl fmt::Display for QuoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(_) => f.write_str("no quote was asked for"),
            Self::Status(status) => write!(f, "the host has no quote: {status}"),
            Self::Header(header) => write!(
                f,
                "the host claims {:#x} bytes of version {:#x}",
                header.out_len, header.version
            ),
            Self::Room { len } => write!(f, "no room for a quote of {len:#x} bytes"),
            Self::GivenUp => f.write_str("the quote did not come in time"),
        }
    }
}

impl core::error::Error for QuoteError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Call(error) => Some(error),
            _ => None,
        }
    }
}
