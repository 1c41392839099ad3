//! One message key, and the order of its messages.

use super::MessageKey;
use super::payload::{Bytes, Layout, MAX_REQUEST, MAX_RESPONSE, Request};
use core::fmt;

const HEADER: usize = 0x60;
/// The longest message in bytes: the response to a request for a report.
pub const MAX_MESSAGE: usize = HEADER + MAX_RESPONSE;
/// What is authenticated of the header begins here; before are tag and sequence number.
const AUTHENTICATED: usize = 0x30;
const SEQUENCE: usize = 0x20;
const AES_256_GCM: u8 = 1;
const HEADER_VERSION: u8 = 1;
const PAYLOAD_VERSION: u8 = 1;
/// The firmware counts in 32 bits, and refuses messages from there on.
const MAX_SEQUENCE: u64 = u32::MAX as u64;

/// A guest's side of the conversation with the firmware under one message key.
///
/// A request is asked until it is answered. The host can lose messages and their answers, and send old
/// ones again: the same request may be sealed again, which gives the same bytes; another one is
/// [refused](MessageError::Unanswered), because it would be sealed with the same nonce.
#[derive(Clone, Debug)]
pub struct Channel<K> {
    key: K,
    vmpl: u8,
    /// Of the last answer.
    sequence: u64,
    /// Type and payload of the request without an answer.
    asked: Option<(u8, Bytes)>,
}

impl<K: MessageKey> Channel<K> {
    /// With the message key of a VMPL, 0 to 3. `sequence` is the last number that was used with the key
    /// ([`Secrets::sequence`](super::Secrets::sequence)); 0 if there was none.
    pub const fn new(key: K, vmpl: u8, sequence: u64) -> Self {
        Self {
            key,
            vmpl,
            sequence,
            asked: None,
        }
    }

    /// The last sequence number that was used, for a later stage that takes the key over: the number of
    /// a request without an answer counts as used.
    pub const fn sequence(&self) -> u64 {
        match self.asked {
            Some(_) => self.sequence + 2,
            None => self.sequence,
        }
    }

    /// Seals a request into `message`; the message's length.
    ///
    /// # Errors
    /// [`MessageError::Unanswered`] while another request has no answer, [`MessageError::Exhausted`]
    /// after 2³¹ requests.
    pub fn seal<R: Request>(
        &mut self,
        request: &R,
        message: &mut [u8; MAX_MESSAGE],
    ) -> Result<usize, MessageError> {
        let payload = request.to_bytes();
        let asked = (R::TYPE, payload);
        if self.asked.is_some_and(|other| other != asked) {
            return Err(MessageError::Unanswered);
        }
        if self.sequence + 2 > MAX_SEQUENCE {
            return Err(MessageError::Exhausted);
        }
        self.asked = Some(asked);
        let number = self.sequence + 1;
        let (header, rest) = message.split_at_mut(HEADER);
        header.copy_from_slice(&Header::of(R::TYPE, R::LEN, self.vmpl).to_bytes(number));
        let sealed = &mut rest[..R::LEN];
        sealed.copy_from_slice(&payload[..R::LEN]);
        let tag = self
            .key
            .seal(&nonce(number), &header[AUTHENTICATED..], sealed);
        header[..16].copy_from_slice(&tag);
        Ok(HEADER + R::LEN)
    }

    /// Opens the answer to the request that was sealed last. `message` is a copy that the host cannot
    /// change any more; what lies behind the message is ignored.
    ///
    /// # Errors
    /// See [`MessageError`]. Only [`MessageError::Firmware`] and [`MessageError::Length`] end the
    /// request; after the others its answer may still come.
    pub fn open<R: Request>(
        &mut self,
        message: &mut [u8; MAX_MESSAGE],
    ) -> Result<R::Response, MessageError> {
        if self.asked.is_none_or(|(kind, _)| kind != R::TYPE) {
            return Err(MessageError::NotAsked);
        }
        let number = self.sequence + 2;
        let (header, rest) = message.split_at_mut(HEADER);
        let (header, tag) = (&*header, header.first_chunk().unwrap_or(&[0; 16]));
        let (len, expected) = Header::expected(header, R::TYPE + 1, self.vmpl);
        if header[AUTHENTICATED..] != expected.to_bytes(number)[AUTHENTICATED..] {
            return Err(MessageError::Header);
        }
        if header[SEQUENCE..SEQUENCE + 8] != number.to_le_bytes() {
            return Err(MessageError::Sequence);
        }
        let payload = rest.get_mut(..len).ok_or(MessageError::Header)?;
        if !(self.key).open(&nonce(number), &header[AUTHENTICATED..], payload, tag) {
            return Err(MessageError::Authentication);
        }
        // The firmware's word from here on.
        self.sequence = number;
        self.asked = None;
        let status = payload.first_chunk().ok_or(MessageError::Length(len))?;
        match u32::from_le_bytes(*status) {
            0 if len >= 0x20 => <R as Layout>::answer(payload),
            0 => Err(MessageError::Length(len)),
            status => Err(MessageError::Firmware(status)),
        }
    }
}

/// The fields of a header that are authenticated and not constant.
struct Header {
    kind: u8,
    len: u16,
    vmpl: u8,
}

impl Header {
    fn of(kind: u8, len: usize, vmpl: u8) -> Self {
        // Payloads are shorter than a page.
        let len = len as u16;
        Self { kind, len, vmpl }
    }

    /// The payload's length as a header has it, and the header that this must be.
    fn expected(header: &[u8], kind: u8, vmpl: u8) -> (usize, Self) {
        let len = usize::from(u16::from_le_bytes([header[0x36], header[0x37]]));
        (len, Self::of(kind, len, vmpl))
    }

    fn to_bytes(&self, sequence: u64) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[SEQUENCE..SEQUENCE + 8].copy_from_slice(&sequence.to_le_bytes());
        bytes[0x30] = AES_256_GCM;
        bytes[0x31] = HEADER_VERSION;
        bytes[0x32..0x34].copy_from_slice(&(HEADER as u16).to_le_bytes());
        bytes[0x34] = self.kind;
        bytes[0x35] = PAYLOAD_VERSION;
        bytes[0x36..0x38].copy_from_slice(&self.len.to_le_bytes());
        bytes[0x3C] = self.vmpl;
        bytes
    }
}

fn nonce(sequence: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&sequence.to_le_bytes());
    nonce
}

const _: () = assert!(MAX_REQUEST <= MAX_RESPONSE);

/// Why there is no message, or no answer in it.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageError {
    /// Another request has no answer yet: its sequence number must not seal this one.
    Unanswered,
    /// No request of this type waits for an answer.
    NotAsked,
    /// The key has no sequence number left.
    Exhausted,
    /// The header is not that of an answer to the request.
    Header,
    /// The message is an answer to another request: an old one, sent again.
    Sequence,
    /// Header or payload are not the firmware's.
    Authentication,
    /// The firmware's payload of so many bytes is not that of the answer.
    Length(usize),
    /// The firmware refused the request with this status.
    Firmware(u32),
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unanswered => f.write_str("another request has no answer yet"),
            Self::NotAsked => f.write_str("no such request waits for an answer"),
            Self::Exhausted => f.write_str("the message key has no sequence number left"),
            Self::Header => f.write_str("the header is not that of an answer to the request"),
            Self::Sequence => f.write_str("the message answers another request"),
            Self::Authentication => f.write_str("the message is not the firmware's"),
            Self::Length(len) => write!(f, "an answer of {len:#x} bytes"),
            Self::Firmware(status) => write!(f, "refused by the firmware with {status:#x}"),
        }
    }
}

impl core::error::Error for MessageError {}
