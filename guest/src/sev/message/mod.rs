//! Messages between an SNP guest and the firmware: sealed with a key that the host does not have (SNP
//! firmware ABI, "Guest Messages").
//!
//! A message is a header and a payload under AES-256-GCM, with one of the guest's four message keys
//! (VMPCK). The sequence number of a message is its nonce, so one number must never seal two different
//! payloads: a [`Channel`] does not ask anything else before its last request was answered.

#[cfg(feature = "aes-gcm")]
mod aes;
mod channel;
mod payload;
mod secrets;

#[cfg(feature = "aes-gcm")]
pub use aes::Aes256Gcm;
pub use channel::{Channel, MAX_MESSAGE, MessageError};
pub use payload::{
    DerivedKey, KeyFields, KeyRequest, KeySelect, REPORT_LEN, ReportRequest, Request, RootKey,
};
pub use secrets::{SECRETS_LEN, Secrets};

/// AES-256-GCM under one message key: a kernel's own implementation, or that of the feature `aes-gcm`.
pub trait MessageKey {
    /// Encrypts the payload in place and authenticates the header with it; the tag.
    fn seal(&self, nonce: &[u8; 12], header: &[u8], payload: &mut [u8]) -> [u8; 16];

    /// Decrypts the payload in place. False if the tag is not that of header and payload; then the
    /// payload must not be used.
    fn open(&self, nonce: &[u8; 12], header: &[u8], payload: &mut [u8], tag: &[u8; 16]) -> bool;
}
