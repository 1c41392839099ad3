//! The reasons why no keys were exchanged.

use kvm_ops_core::guest::GuestFault;
use thiserror::Error;

use crate::policy::Mismatch;

/// The reason why a guest exchanged no keys, or did not carry a context. The guest tells it to its host as two numbers, and to
/// its peer as the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Failure {
    /// The host's request cannot be read.
    #[error("the request of the host is none")]
    Request,
    /// The host carries no more messages.
    #[error("the link to the peer ended")]
    Closed,
    /// A message that is not due, or that has not the form of its kind.
    #[error("the peer sent a message that is not due or malformed")]
    Message,
    /// The peer gave up, and says why; anyone on the link can say that.
    #[error("the peer gave up with reason {0}")]
    Refused(u8),
    /// The peer's evidence is not believed.
    #[error("the evidence of the peer cannot be trusted")]
    Evidence,
    /// The peer's evidence was made for another exchange, or for the other side of it.
    #[error("the evidence of the peer was not made for this exchange")]
    Binding,
    /// The peer is authentic, and not what the policy asks for.
    #[error("the policy refuses the peer: {0}")]
    Policy(Mismatch),
    /// A sealed message was changed, or sealed by somebody else.
    #[error("a sealed message does not open")]
    Seal,
    /// The TDX module refused a TDCALL, with this status.
    #[error("the TDX module refused with status {0:#x}")]
    Module(u64),
    /// The host has no quote, and this status in place of it.
    #[error("the host made no quote: status {0:#x}")]
    NoQuote(u64),
    /// An access to memory or a call of the host failed.
    #[error("the host took away what the program needs")]
    Host,
    /// No random numbers.
    #[error("there are no random numbers")]
    Random,
    /// The AMD SP refused a request of the guest, with this status.
    #[error("the AMD SP refused with status {0:#x}")]
    Firmware(u64),
    /// No keys were agreed on with a peer.
    #[error("there is no peer to carry a context to")]
    NoPeer,
}

impl From<Mismatch> for Failure {
    fn from(mismatch: Mismatch) -> Self {
        Self::Policy(mismatch)
    }
}

impl From<GuestFault> for Failure {
    fn from(_: GuestFault) -> Self {
        Self::Host
    }
}

impl Failure {
    /// The number of the reason, and its detail.
    pub(crate) const fn numbers(self) -> (u8, u64) {
        match self {
            Self::Request => (1, 0),
            Self::Closed => (2, 0),
            Self::Message => (3, 0),
            Self::Refused(code) => (4, code as u64),
            Self::Evidence => (5, 0),
            Self::Binding => (6, 0),
            Self::Policy(mismatch) => (7, mismatch.number()),
            Self::Seal => (8, 0),
            Self::Module(status) => (9, status),
            Self::NoQuote(status) => (10, status),
            Self::Host => (11, 0),
            Self::Random => (12, 0),
            Self::Firmware(status) => (13, status),
            Self::NoPeer => (14, 0),
        }
    }

    /// The reverse of [`numbers`](Self::numbers).
    #[cfg(any(feature = "host", test))]
    pub(crate) fn from_numbers(code: u64, detail: u64) -> Option<Self> {
        Some(match code {
            1 => Self::Request,
            2 => Self::Closed,
            3 => Self::Message,
            4 => Self::Refused(detail as u8),
            5 => Self::Evidence,
            6 => Self::Binding,
            7 => Self::Policy(Mismatch::from_number(detail)?),
            8 => Self::Seal,
            9 => Self::Module(detail),
            10 => Self::NoQuote(detail),
            11 => Self::Host,
            12 => Self::Random,
            13 => Self::Firmware(detail),
            14 => Self::NoPeer,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_its_numbers() {
        let mut all = vec![
            Failure::Request,
            Failure::Closed,
            Failure::Message,
            Failure::Refused(7),
            Failure::Evidence,
            Failure::Binding,
            Failure::Seal,
            Failure::Module(0xC000_0100_0000_0000),
            Failure::NoQuote(1 << 63),
            Failure::Host,
            Failure::Random,
            Failure::Firmware(0x13),
            Failure::NoPeer,
        ];
        all.extend(Mismatch::ALL.map(Failure::Policy));
        for failure in all {
            let (code, detail) = failure.numbers();
            assert_eq!(Failure::from_numbers(code.into(), detail), Some(failure));
        }
        assert_eq!(Failure::from_numbers(0, 0), None);
        assert_eq!(Failure::from_numbers(15, 0), None);
        assert_eq!(Failure::from_numbers(7, 99), None);
    }
}
