//! The buffer of GetQuote (GHCI, "GetQuote"): a header, then data.

use core::fmt;

/// The state of a GetQuote buffer.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuoteStatus(pub u64);

impl QuoteStatus {
    /// The quote is in the buffer.
    pub const SUCCESS: Self = Self(0);
    /// The host works on it.
    pub const IN_FLIGHT: Self = Self(u64::MAX);
    /// There is no quote: an error of the quoting service.
    pub const ERROR: Self = Self(0x8000_0000_0000_0000);
    /// There is no quoting service.
    pub const UNAVAILABLE: Self = Self(0x8000_0000_0000_0001);
}

impl fmt::Display for QuoteStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SUCCESS => f.write_str("SUCCESS"),
            Self::IN_FLIGHT => f.write_str("IN_FLIGHT"),
            Self::ERROR => f.write_str("ERROR"),
            Self::UNAVAILABLE => f.write_str("SERVICE_UNAVAILABLE"),
            Self(other) => write!(f, "{other:#018x}"),
        }
    }
}

impl fmt::Debug for QuoteStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QuoteStatus({self})")
    }
}

/// The header of a GetQuote buffer. The data follows it.
///
/// The buffer is shared: a guest copies the header once, and believes no length in it before it has
/// compared it with the size of its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuoteHeader {
    /// The version of the layout.
    pub version: u64,
    /// The state.
    pub status: QuoteStatus,
    /// Bytes of the request, which follow the header.
    pub in_len: u32,
    /// Bytes of the answer, which follow the header.
    pub out_len: u32,
}

impl QuoteHeader {
    /// The length of the header in bytes.
    pub const LEN: usize = 24;
    /// The version of this layout.
    pub const VERSION: u64 = 1;

    /// The header of a request with `in_len` bytes of data.
    pub const fn request(in_len: u32) -> Self {
        Self {
            version: Self::VERSION,
            status: QuoteStatus::SUCCESS,
            in_len,
            out_len: 0,
        }
    }

    /// The header as it lies in the buffer.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.status.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.in_len.to_le_bytes());
        bytes[20..].copy_from_slice(&self.out_len.to_le_bytes());
        bytes
    }

    /// The reverse of [`QuoteHeader::to_bytes`].
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize, len: usize| {
            let bytes = bytes[at..at + len].iter().rev();
            bytes.fold(0, |word, byte| word << 8 | u64::from(*byte))
        };
        Self {
            version: word(0, 8),
            status: QuoteStatus(word(8, 8)),
            in_len: word(16, 4) as u32,
            out_len: word(20, 4) as u32,
        }
    }
}
