//! Messages between an SNP guest and the firmware, and their encryption.
//!
//! A message is a header of 0x60 bytes and an encrypted payload. AES-256-GCM with one of the
//! guest's four message keys (VMPCK); the sequence number is the nonce, and the header from its
//! algorithm field on is authenticated. Layout: Linux `arch/x86/include/asm/sev.h`.

mod agent;
mod payload;

pub use agent::{AgentChannel, AgentError};
pub use payload::{
    EXPORTED_CONTEXT, ExportRequest, ExportResponse, GuestFieldSelect, ImportRequest, KeyRequest,
    KeyResponse, KeySel, ReportRequest, ReportResponse, Request, RootKeySelect, StatusResponse,
    TscInfoRequest, TscInfoResponse, VmrkRequest,
};

use crate::wire::{copy_at, u16_at, u64_at};
use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit};
use thiserror::Error;
use zerocopy::FromBytes;

/// Length of a message header.
pub const HEADER_LEN: usize = 0x60;
/// Longest payload: a message fits one page.
pub const MAX_PAYLOAD: usize = 0x1000 - HEADER_LEN;
/// Number of AES-256-GCM, the only algorithm.
pub const AES_256_GCM: u8 = 1;
/// Version of the header.
pub const HEADER_VERSION: u8 = 1;

const SEQUENCE: usize = 0x20;
const AUTHENTICATED: usize = 0x30;

/// Type of a message. A response's number is its request's plus one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum MessageType {
    KeyRequest = 3,
    KeyResponse = 4,
    ReportRequest = 5,
    ReportResponse = 6,
    ExportRequest = 7,
    ExportResponse = 8,
    ImportRequest = 9,
    ImportResponse = 10,
    VmrkRequest = 13,
    VmrkResponse = 14,
    TscInfoRequest = 17,
    TscInfoResponse = 18,
}

impl MessageType {
    pub(crate) fn from_number(n: u8) -> Option<Self> {
        use MessageType::*;
        [
            KeyRequest,
            KeyResponse,
            ReportRequest,
            ReportResponse,
            ExportRequest,
            ExportResponse,
            ImportRequest,
            ImportResponse,
            VmrkRequest,
            VmrkResponse,
            TscInfoRequest,
            TscInfoResponse,
        ]
        .into_iter()
        .find(|t| *t as u8 == n)
    }

    pub(crate) fn response(self) -> Option<Self> {
        match self as u8 % 2 {
            1 => Self::from_number(self as u8 + 1),
            _ => None,
        }
    }
}

/// Errors of reading a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The header has a length, version or algorithm that does not exist.
    #[error("the message header is not understood")]
    Header,
    /// The payload is longer than a message can hold, or not that of its type.
    #[error("a payload of {0:#x} bytes does not fit the message")]
    Length(usize),
    /// The message is not authentic.
    #[error("the message is not authentic")]
    Authentication,
}

/// The fields of a header that are not constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sequence number.
    pub sequence: u64,
    /// Type number.
    pub message_type: u8,
    /// Version of the payload.
    pub version: u8,
    /// Length of the payload.
    pub len: u16,
    /// Message key, by the VMPL it belongs to.
    pub vmpck: u8,
}

impl Header {
    /// Reads a header and checks its constants.
    pub fn parse(message: &[u8]) -> Result<Self, MessageError> {
        let known = message.len() >= HEADER_LEN
            && message[0x30] == AES_256_GCM
            && message[0x31] == HEADER_VERSION
            && usize::from(u16_at(message, 0x32)) == HEADER_LEN
            && message[0x3c] < 4;
        let header = Self {
            sequence: u64_at(message, SEQUENCE),
            message_type: copy_at::<1>(message, 0x34)[0],
            version: copy_at::<1>(message, 0x35)[0],
            len: u16_at(message, 0x36),
            vmpck: copy_at::<1>(message, 0x3c)[0],
        };
        if known && usize::from(header.len) <= MAX_PAYLOAD {
            Ok(header)
        } else {
            Err(MessageError::Header)
        }
    }

    fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[SEQUENCE..SEQUENCE + 8].copy_from_slice(&self.sequence.to_le_bytes());
        out[0x30] = AES_256_GCM;
        out[0x31] = HEADER_VERSION;
        out[0x32..0x34].copy_from_slice(&(HEADER_LEN as u16).to_le_bytes());
        out[0x34] = self.message_type;
        out[0x35] = self.version;
        out[0x36..0x38].copy_from_slice(&self.len.to_le_bytes());
        out[0x3c] = self.vmpck;
        out
    }
}

fn nonce(sequence: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[..8].copy_from_slice(&sequence.to_le_bytes());
    out
}

/// Encrypts a payload under a message key.
pub fn seal(
    key: &[u8; 32],
    vmpck: u8,
    message_type: MessageType,
    sequence: u64,
    payload: &[u8],
) -> Result<Vec<u8>, MessageError> {
    if payload.len() > MAX_PAYLOAD {
        return Err(MessageError::Length(payload.len()));
    }
    let header = Header {
        sequence,
        message_type: message_type as u8,
        version: 1,
        len: payload.len() as u16,
        vmpck,
    };
    let mut message = header.to_bytes().to_vec();
    message.extend_from_slice(payload);
    let (head, body) = message.split_at_mut(HEADER_LEN);
    let tag = Aes256Gcm::new(key.into())
        .encrypt_in_place_detached(&nonce(sequence).into(), &head[AUTHENTICATED..], body)
        .map_err(|_| MessageError::Length(payload.len()))?;
    head[..16].copy_from_slice(&tag);
    Ok(message)
}

/// Decrypts a message under a message key.
pub fn open(key: &[u8; 32], message: &[u8]) -> Result<(Header, Vec<u8>), MessageError> {
    let header = Header::parse(message)?;
    let body = message.get(HEADER_LEN..HEADER_LEN + usize::from(header.len));
    let mut body = body
        .ok_or(MessageError::Length(header.len.into()))?
        .to_vec();
    let tag: [u8; 16] = copy_at(message, 0);
    Aes256Gcm::new(key.into())
        .decrypt_in_place_detached(
            &nonce(header.sequence).into(),
            &message[AUTHENTICATED..HEADER_LEN],
            &mut body,
            &tag.into(),
        )
        .map_err(|_| MessageError::Authentication)?;
    Ok((header, body))
}

/// A guest's side of the conversation: one message key and its sequence numbers.
#[derive(Clone)]
pub struct GuestChannel {
    key: [u8; 32],
    vmpck: u8,
    sequence: u64,
}

impl std::fmt::Debug for GuestChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestChannel")
            .field("vmpck", &self.vmpck)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl GuestChannel {
    /// A channel with the key of a VMPL (0 to 3), before its first message.
    pub fn new(vmpck: u8, key: [u8; 32]) -> Self {
        Self {
            key,
            vmpck,
            sequence: 0,
        }
    }

    /// The channel of a VMPL, from what the firmware wrote into the guest's secrets page. `None`
    /// above VMPL3.
    pub fn from_secrets_page(page: &[u8; 4096], vmpl: u8) -> Option<Self> {
        let at = 0x20 + 32 * usize::from(vmpl);
        (vmpl < 4).then(|| Self::new(vmpl, copy_at(page, at)))
    }

    /// The next request. The sequence number moves on when its response is [opened](Self::open).
    pub fn request(&self, kind: MessageType, payload: &[u8]) -> Result<Vec<u8>, MessageError> {
        seal(
            &self.key,
            self.vmpck,
            kind,
            self.sequence.wrapping_add(1),
            payload,
        )
    }

    /// The next request, with its payload as a structure.
    pub fn ask<R: Request>(&self, request: &R) -> Result<Vec<u8>, MessageError> {
        self.request(R::TYPE, request.as_bytes())
    }

    /// Opens the response to the last request, which was one of this type.
    pub fn answer<R: Request>(&mut self, response: &[u8]) -> Result<R::Response, MessageError> {
        let payload = self.open(response)?;
        let (answer, _) = R::Response::read_from_prefix(&payload)
            .map_err(|_| MessageError::Length(payload.len()))?;
        Ok(answer)
    }

    /// A request for an attestation report, signed by whatever key there is.
    pub fn report_request(
        &self,
        report_data: &[u8; 64],
        vmpl: u32,
    ) -> Result<Vec<u8>, MessageError> {
        self.ask(&ReportRequest {
            user_data: *report_data,
            vmpl: vmpl.into(),
            ..Default::default()
        })
    }

    /// Opens the response to the last request and returns its payload.
    pub fn open(&mut self, response: &[u8]) -> Result<Vec<u8>, MessageError> {
        let (header, payload) = open(&self.key, response)?;
        if header.sequence != self.sequence.wrapping_add(2) {
            return Err(MessageError::Authentication);
        }
        self.sequence = header.sequence;
        Ok(payload)
    }

    /// Opens the response to a report request: the status the firmware gave inside the message,
    /// and the report.
    pub fn open_report(&mut self, response: &[u8]) -> Result<(u32, Vec<u8>), MessageError> {
        let payload = self.open(response)?;
        let (head, rest) = ReportResponse::read_from_prefix(&payload)
            .map_err(|_| MessageError::Length(payload.len()))?;
        let report = rest.get(..head.report_size.get() as usize);
        let report = report.ok_or(MessageError::Length(payload.len()))?;
        Ok((head.status.get(), report.to_vec()))
    }
}
