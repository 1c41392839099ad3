//! What a migration agent asks of its host and, through that, of firmware.

use kvm_ops_core::{Gpa, PAGE_SIZE, Privacy};

use super::request::call;
use crate::failure::Failure;
use crate::io::{BUFFER, Io};
use crate::message::MAX_MESSAGE;
use crate::request::REFUSED;

/// The page with the message keys, which firmware writes at the launch.
pub(crate) const SECRETS: Gpa = Gpa::new(0x2000);

/// A page.
const PAGE: usize = PAGE_SIZE as usize;

impl Io {
    /// The agent's page of secrets.
    pub(crate) async fn secrets(&self) -> Result<[u8; PAGE], Failure> {
        let page = self.read(SECRETS, Privacy::Private, PAGE).await?;
        page.try_into().map_err(|_| Failure::Host)
    }

    /// Has the host carry a message to firmware. The answer is what the host gives back.
    pub(crate) async fn firmware(&self, message: &[u8]) -> Result<Vec<u8>, Failure> {
        self.show(message).await?;
        let args = [BUFFER.get(), message.len() as u64];
        match self.hypercall(call::FIRMWARE, args).await? {
            0 => self.read(BUFFER, Privacy::Shared, PAGE).await,
            REFUSED => Err(Failure::Host),
            status => Err(Failure::Firmware(status)),
        }
    }

    /// The platform's certificates, as the host has them.
    pub(crate) async fn certificates(&self) -> Result<Vec<u8>, Failure> {
        let args = [BUFFER.get(), MAX_MESSAGE as u64];
        match self.hypercall(call::CERTIFICATES, args).await? {
            0 => Err(Failure::Host),
            len if len <= MAX_MESSAGE as u64 => {
                self.read(BUFFER, Privacy::Shared, len as usize).await
            }
            _ => Err(Failure::Host),
        }
    }
}
