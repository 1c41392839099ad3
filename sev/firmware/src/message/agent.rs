//! A migration agent's side of its conversations: with the firmware below, and with its peer on another platform.

use super::{
    EXPORTED_CONTEXT, ExportRequest, GuestChannel, ImportRequest, MessageError, MessageType,
    StatusResponse, VmrkRequest, open, seal,
};
use crate::status::Status;
use thiserror::Error;
use zerocopy::IntoBytes;

/// Errors of a migration agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AgentError {
    /// A message of the firmware or of the peer is not understood, or not authentic.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The firmware's answer inside of its message.
    #[error("the firmware refused the agent's request: {0}")]
    Refused(Status),
    /// A message of the peer came before, or is older than one that did.
    #[error("message {0:#x} of the peer is not new")]
    Sequence(u64),
}

/// The channels of a migration agent. The keys to the peer and from it are the agents' to agree on, after each has judged the other's
/// report; no specification says how.
#[derive(Clone)]
pub struct AgentChannel {
    firmware: GuestChannel,
    to_peer: [u8; 32],
    from_peer: [u8; 32],
    sent: u64,
    received: u64,
}

impl AgentChannel {
    /// An agent's channels, before their first messages.
    pub fn new(firmware: GuestChannel, to_peer: [u8; 32], from_peer: [u8; 32]) -> Self {
        Self {
            firmware,
            to_peer,
            from_peer,
            sent: 0,
            received: 0,
        }
    }

    /// The agent's channel to firmware, for its own reports and keys.
    pub fn firmware(&mut self) -> &mut GuestChannel {
        &mut self.firmware
    }

    /// MSG_VMRK_REQ for a guest that is being launched.
    pub fn vmrk_request(&self, gctx: u64, vmrk: [u8; 32]) -> Result<Vec<u8>, MessageError> {
        self.firmware.ask(&VmrkRequest {
            gctx_paddr: gctx.into(),
            vmrk,
            ..Default::default()
        })
    }

    /// MSG_EXPORT_REQ for a guest that is swapped out.
    pub fn export_request(&self, gctx: u64) -> Result<Vec<u8>, MessageError> {
        self.firmware.ask(&ExportRequest {
            gctx_paddr: gctx.into(),
            ..Default::default()
        })
    }

    /// Opens the firmware's answer to that, and seals the context for the peer.
    pub fn exported(&mut self, response: &[u8]) -> Result<Vec<u8>, AgentError> {
        let answer = self.firmware.answer::<ExportRequest>(response)?;
        expect(answer.status.get())?;
        let size = (answer.gctx_size.get() as usize).min(EXPORTED_CONTEXT);
        let head = [answer.gctx_size, answer.gctx_version];
        let packet = [head.as_bytes(), &answer.gctx[..size]].concat();
        self.sent += 1;
        let kind = MessageType::ExportResponse;
        Ok(seal(&self.to_peer, 0, kind, self.sent, &packet)?)
    }

    /// MSG_IMPORT_REQ with a context that the peer sealed, for one that was just created.
    pub fn import_request(&mut self, gctx: u64, packet: &[u8]) -> Result<Vec<u8>, AgentError> {
        let (header, packet) = open(&self.from_peer, packet)?;
        if header.sequence <= self.received {
            return Err(AgentError::Sequence(header.sequence));
        }
        let mut request = ImportRequest {
            gctx_paddr: gctx.into(),
            ..Default::default()
        };
        let (head, context) = packet
            .split_at_checked(8)
            .ok_or(MessageError::Length(packet.len()))?;
        let place = request.incoming_gctx.get_mut(..context.len());
        place
            .ok_or(MessageError::Length(packet.len()))?
            .copy_from_slice(context);
        request
            .in_gctx_size
            .as_mut_bytes()
            .copy_from_slice(&head[..4]);
        request
            .in_gctx_version
            .as_mut_bytes()
            .copy_from_slice(&head[4..]);
        self.received = header.sequence;
        Ok(self.firmware.ask(&request)?)
    }

    /// Opens the firmware's answer to an import or a root key.
    pub fn done(&mut self, response: &[u8]) -> Result<(), AgentError> {
        let answer: StatusResponse = self.firmware.answer::<ImportRequest>(response)?;
        expect(answer.status.get())
    }
}

impl std::fmt::Debug for AgentChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentChannel")
            .field("firmware", &self.firmware)
            .field("sent", &self.sent)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

fn expect(status: u32) -> Result<(), AgentError> {
    match status as u16 {
        0 => Ok(()),
        status => Err(AgentError::Refused(Status(status))),
    }
}
