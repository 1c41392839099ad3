//! What the host asks of a migration TD, and the calls by which it asks any guest that exchanges keys.

/// The side of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// The guest leaves this host.
    Source = 1,
    /// The guest comes to this host.
    Target = 2,
}

impl Role {
    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Source),
            2 => Some(Self::Target),
            _ => None,
        }
    }
}

/// The answer to a call that the host does not know, or cannot carry out.
#[cfg(feature = "host")]
pub(crate) const REFUSED: u64 = u64::MAX;

/// A request to exchange the session keys of a TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// This side.
    pub role: Role,
    /// The binding handle of TDH.SERVTD.BIND.
    pub handle: u64,
    /// The bound TD's UUID, of the same call.
    pub uuid: [u64; 4],
}

/// Hypercalls (R10 of a TD), with their arguments. Addresses are those of shared memory,
/// without the shared bit.
pub(crate) mod call {
    /// Waits for a request, which the host writes to the address, room in bytes: its length, or 0.
    pub(crate) const WAIT: u64 = 0x4b4d_0001;
    /// Sends the message at the address, length in bytes: 0.
    pub(crate) const SEND: u64 = 0x4b4d_0002;
    /// Receives a message to the address, room in bytes: its length; 0 at the end of the link.
    pub(crate) const RECEIVE: u64 = 0x4b4d_0003;
    /// The outcome of the request, 0 or the number of a reason, and its detail: after 0 the bytes that it shows, of a migration agent.
    pub(crate) const STATUS: u64 = 0x4b4d_0004;
}

/// A request as it lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Exchange(Exchange),
    /// To show the TD's own TDINFO in shared memory.
    Describe,
}

const EXCHANGE: u8 = 1;
const DESCRIBE: u8 = 2;

/// Bytes of an exchange's request: kind, role, handle, UUID.
const EXCHANGE_BYTES: usize = 2 + 8 + 32;

impl Request {
    /// The most bytes of a request.
    pub(crate) const MAX: usize = EXCHANGE_BYTES;

    #[cfg(any(feature = "host", test))]
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Describe => vec![DESCRIBE],
            Self::Exchange(exchange) => {
                let mut out = vec![EXCHANGE, exchange.role as u8];
                out.extend_from_slice(&exchange.handle.to_le_bytes());
                for word in exchange.uuid {
                    out.extend_from_slice(&word.to_le_bytes());
                }
                out
            }
        }
    }

    /// `None` for what is no request.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [DESCRIBE] => Some(Self::Describe),
            [EXCHANGE, role, words @ ..] => {
                let role = Role::from_number(*role)?;
                let (words, []) = words.as_chunks::<8>() else {
                    return None;
                };
                let [handle, uuid @ ..]: [u64; 5] = <[[u8; 8]; 5]>::try_from(words)
                    .ok()?
                    .map(u64::from_le_bytes);
                Some(Self::Exchange(Exchange { role, handle, uuid }))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_request_is_read_as_it_was_written(handle: u64, uuid: [u64; 4], leaves: bool) {
            let role = if leaves { Role::Source } else { Role::Target };
            let request = Request::Exchange(Exchange { role, handle, uuid });
            let bytes = request.encode();
            prop_assert!(bytes.len() <= Request::MAX);
            prop_assert_eq!(Request::decode(&bytes), Some(request));
            prop_assert_eq!(Request::decode(&bytes[..bytes.len() - 1]), None);
        }

        #[test]
        fn any_bytes_are_a_request_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }
    }

    #[test]
    fn a_request_to_describe_is_one_byte() {
        let request = Request::Describe;
        assert_eq!(Request::decode(&request.encode()), Some(request));
    }
}
