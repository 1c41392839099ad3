//! The messages of an exchange: a byte for the kind, then its parts.

use crate::failure::Failure;

/// The most bytes of a message. A quote has some 5 KiB.
pub const MAX_MESSAGE: usize = 0xf000;

/// The version of the protocol.
const VERSION: u16 = 1;
/// Bytes of a public key: an uncompressed point (SEC 1, 2.3.3).
pub(crate) const POINT: usize = 65;

/// A public key as it travels.
pub(crate) type Point = [u8; POINT];

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Source: its ephemeral key.
    Hello { key: Point },
    /// Target: its ephemeral key, and a quote over both.
    Reply { key: Point, quote: Vec<u8> },
    /// Source: a quote over both keys, and its sealed session key.
    SourceKey { quote: Vec<u8>, sealed: Vec<u8> },
    /// Target: its sealed session key.
    TargetKey { sealed: Vec<u8> },
    /// Source: it has set the target's key; sealed as well.
    Done { sealed: Vec<u8> },
    /// Either: it gives up for this reason.
    Refuse { code: u8 },
}

const HELLO: u8 = 1;
const REPLY: u8 = 2;
const SOURCE_KEY: u8 = 3;
const TARGET_KEY: u8 = 4;
const DONE: u8 = 5;
const REFUSE: u8 = 6;

impl Message {
    /// The message as it travels.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Hello { key } => {
                out.push(HELLO);
                out.extend_from_slice(&VERSION.to_le_bytes());
                out.extend_from_slice(key);
            }
            Self::Reply { key, quote } => {
                out.push(REPLY);
                out.extend_from_slice(&VERSION.to_le_bytes());
                out.extend_from_slice(key);
                out.extend_from_slice(quote);
            }
            Self::SourceKey { quote, sealed } => {
                out.push(SOURCE_KEY);
                out.extend_from_slice(&(quote.len() as u32).to_le_bytes());
                out.extend_from_slice(quote);
                out.extend_from_slice(sealed);
            }
            Self::TargetKey { sealed } => {
                out.push(TARGET_KEY);
                out.extend_from_slice(sealed);
            }
            Self::Done { sealed } => {
                out.push(DONE);
                out.extend_from_slice(sealed);
            }
            Self::Refuse { code } => out.extend_from_slice(&[REFUSE, *code]),
        }
        out
    }

    /// Reads a message. A refusal is the error that it says.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Failure> {
        let (kind, rest) = bytes.split_first().ok_or(Failure::Message)?;
        Ok(match *kind {
            HELLO => {
                let (key, rest) = versioned_key(rest)?;
                if !rest.is_empty() {
                    return Err(Failure::Message);
                }
                Self::Hello { key }
            }
            REPLY => {
                let (key, quote) = versioned_key(rest)?;
                Self::Reply {
                    key,
                    quote: quote.to_vec(),
                }
            }
            SOURCE_KEY => {
                let (length, rest) = rest.split_first_chunk().ok_or(Failure::Message)?;
                let length = u32::from_le_bytes(*length) as usize;
                let (quote, sealed) = rest.split_at_checked(length).ok_or(Failure::Message)?;
                Self::SourceKey {
                    quote: quote.to_vec(),
                    sealed: sealed.to_vec(),
                }
            }
            TARGET_KEY => Self::TargetKey {
                sealed: rest.to_vec(),
            },
            DONE => Self::Done {
                sealed: rest.to_vec(),
            },
            REFUSE => match rest {
                [code] => return Err(Failure::Refused(*code)),
                _ => return Err(Failure::Message),
            },
            _ => return Err(Failure::Message),
        })
    }
}

fn versioned_key(bytes: &[u8]) -> Result<(Point, &[u8]), Failure> {
    let (version, rest) = bytes.split_first_chunk().ok_or(Failure::Message)?;
    let (key, rest) = rest.split_first_chunk().ok_or(Failure::Message)?;
    match u16::from_le_bytes(*version) {
        VERSION => Ok((*key, rest)),
        _ => Err(Failure::Message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..100);
        let key = any::<[u8; 32]>().prop_map(|half| {
            let mut key = [4; POINT];
            key[1..33].copy_from_slice(&half);
            key
        });
        prop_oneof![
            key.clone().prop_map(|key| Message::Hello { key }),
            (key, bytes()).prop_map(|(key, quote)| Message::Reply { key, quote }),
            (bytes(), bytes()).prop_map(|(quote, sealed)| Message::SourceKey { quote, sealed }),
            bytes().prop_map(|sealed| Message::TargetKey { sealed }),
            bytes().prop_map(|sealed| Message::Done { sealed }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_message_is_read_as_it_was_written(message in any_message()) {
            prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
        }

        #[test]
        fn any_bytes_are_a_message_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }
    }

    #[test]
    fn a_refusal_is_the_error_that_it_says() {
        let refusal = Message::Refuse { code: 7 }.encode();
        assert_eq!(Message::decode(&refusal), Err(Failure::Refused(7)));
    }
}
