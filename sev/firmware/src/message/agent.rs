//! A migration agent's side of its conversations: with the firmware below, and with its peer on another platform.

use super::{
    ExportRequest, ExportResponse, GuestChannel, ImportRequest, MessageError, MessageType,
    StatusResponse, open, seal,
};
use crate::status::Status;
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

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
    /// No keys were agreed on with a peer.
    #[error("there is no peer")]
    NoPeer,
}

/// The channels of a migration agent: to its firmware, and to the agent of another platform once it has
/// [met](Self::meet) that.
#[derive(Clone)]
pub struct AgentChannel {
    firmware: GuestChannel,
    peer: Option<Peer>,
}

/// The keys of both directions, and the last numbers of messages.
#[derive(Clone)]
struct Peer {
    to: [u8; 32],
    from: [u8; 32],
    sent: u64,
    received: u64,
}

impl AgentChannel {
    /// The channel to firmware.
    pub fn new(firmware: GuestChannel) -> Self {
        Self {
            firmware,
            peer: None,
        }
    }

    /// Takes a peer, in place of the one before, with keys that no other two agents have and that seal nothing else. How they agree
    /// on them, after each has judged the other's report, no specification says.
    pub fn meet(&mut self, to_peer: [u8; 32], from_peer: [u8; 32]) {
        self.peer = Some(Peer {
            to: to_peer,
            from: from_peer,
            sent: 0,
            received: 0,
        });
    }

    /// Forgets the peer.
    pub fn part(&mut self) {
        self.peer = None;
    }

    /// The agent's channel to firmware, for its own reports and keys.
    pub fn firmware(&mut self) -> &mut GuestChannel {
        &mut self.firmware
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
        let peer = self.peer.as_mut().ok_or(AgentError::NoPeer)?;
        peer.sent += 1;
        let kind = MessageType::ExportResponse;
        let packet = answer.as_bytes();
        Ok(seal(&peer.to, 0, kind, peer.sent, packet)?)
    }

    /// MSG_IMPORT_REQ with a context that the peer sealed, for one that was just created.
    pub fn import_request(&mut self, gctx: u64, packet: &[u8]) -> Result<Vec<u8>, AgentError> {
        let peer = self.peer.as_mut().ok_or(AgentError::NoPeer)?;
        let (header, packet) = open(&peer.from, packet)?;
        if header.sequence <= peer.received {
            return Err(AgentError::Sequence(header.sequence));
        }
        let context = ExportResponse::read_from_bytes(&packet);
        let context = context.map_err(|_| MessageError::Length(packet.len()))?;
        let request = ImportRequest {
            gctx_paddr: gctx.into(),
            in_gctx_size: context.gctx_size,
            in_gctx_version: context.gctx_version,
            incoming_gctx: context.gctx,
            ..Default::default()
        };
        peer.received = header.sequence;
        Ok(self.firmware.ask(&request)?)
    }

    /// Opens the firmware's answer to an import.
    pub fn imported(&mut self, response: &[u8]) -> Result<(), AgentError> {
        let answer: StatusResponse = self.firmware.answer::<ImportRequest>(response)?;
        expect(answer.status.get())
    }
}

impl std::fmt::Debug for AgentChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentChannel")
            .field("firmware", &self.firmware)
            .field("has_peer", &self.peer.is_some())
            .finish_non_exhaustive()
    }
}

fn expect(status: u32) -> Result<(), AgentError> {
    match status as u16 {
        0 => Ok(()),
        status => Err(AgentError::Refused(Status(status))),
    }
}
