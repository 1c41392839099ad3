//! What the host asks of a migration agent, and the calls beside those of every guest that exchanges keys.

use crate::request::Role;

/// Hypercalls of a migration agent, with their arguments. Addresses are those of shared memory.
pub(crate) mod call {
    /// Carries the message at the address, length in bytes, to firmware: 0 once the answer lies there, or a status.
    pub(crate) const FIRMWARE: u64 = 0x4b4d_0011;
    /// Writes the platform's certificates to the address, room in bytes: their length, or 0.
    pub(crate) const CERTIFICATES: u64 = 0x4b4d_0012;
}

/// A request as it lies in shared memory: a byte for its kind, then its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AgentRequest {
    /// To meet the peer at the end of the link.
    Exchange(Role),
    /// To get the context at that address out of firmware, sealed for the peer.
    Export(u64),
    /// To put a context that the peer sealed into the one at that address.
    Import(u64, Vec<u8>),
}

const EXCHANGE: u8 = 1;
const EXPORT: u8 = 2;
const IMPORT: u8 = 3;

impl AgentRequest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Exchange(role) => vec![EXCHANGE, *role as u8],
            Self::Export(gctx) => [&[EXPORT][..], &gctx.to_le_bytes()].concat(),
            Self::Import(gctx, sealed) => [&[IMPORT][..], &gctx.to_le_bytes(), sealed].concat(),
        }
    }

    /// `None` for what is no request.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let gctx = rest.split_first_chunk();
        let gctx = gctx.map(|(gctx, rest)| (u64::from_le_bytes(*gctx), rest));
        Some(match (*kind, rest, gctx) {
            (EXCHANGE, [role], _) => Self::Exchange(Role::from_number(*role)?),
            (EXPORT, _, Some((gctx, []))) => Self::Export(gctx),
            (IMPORT, _, Some((gctx, sealed))) => Self::Import(gctx, sealed.to_vec()),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_request_is_read_as_it_was_written(gctx: u64, sealed: Vec<u8>) {
            for request in [
                AgentRequest::Exchange(Role::Source),
                AgentRequest::Exchange(Role::Target),
                AgentRequest::Export(gctx),
                AgentRequest::Import(gctx, sealed),
            ] {
                prop_assert_eq!(AgentRequest::decode(&request.encode()), Some(request));
            }
        }

        #[test]
        fn any_bytes_are_a_request_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(request) = AgentRequest::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }
    }
}
