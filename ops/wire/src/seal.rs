//! The tag of a frame: a checksum against accidents, or a code that only the two ends can make.

use core::fmt;

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Bytes of a tag.
pub const TAG: usize = 16;
/// A target's contribution to a link's key, fresh for each link: 16 random bytes and a counter of links.
pub type Challenge = [u8; 24];

/// Makes the challenge of the next link, which no link had before: the counter goes up.
pub fn next_challenge(challenge: &mut Challenge) {
    for byte in &mut challenge[16..] {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            break;
        }
    }
}

/// A secret of 256 bits that sender and receiver share, from the embedder.
///
/// With it every frame carries a message authentication code (HMAC-SHA-256, 128 bits) over its kind,
/// number, frame number and contents, under a key that is new for each link. Without one the tag is
/// a CRC-32, and the link must be authenticated by other means, for example TLS.
#[derive(Clone)]
pub struct StreamKey([u8; 32]);

impl StreamKey {
    /// A key from these bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamKey(..)")
    }
}

/// The direction of a frame. A frame that is sent back to its origin does not verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the source of a guest.
    ToTarget = 0,
    /// From its target.
    ToSource = 1,
}

impl Direction {
    /// The other direction.
    pub const fn reversed(self) -> Self {
        match self {
            Self::ToTarget => Self::ToSource,
            Self::ToSource => Self::ToTarget,
        }
    }
}

/// Makes and checks the tags of one link.
#[derive(Clone)]
pub struct Seal {
    key: Option<StreamKey>,
    /// Keyed for this link. The first frame of a link goes under the stream key itself.
    link: Option<Hmac<Sha256>>,
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal(..)")
    }
}

fn hmac(key: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of every length")
}

impl Seal {
    /// Tags under this key, or checksums without one.
    pub fn new(key: Option<&StreamKey>) -> Self {
        Self {
            key: key.cloned(),
            link: key.map(|key| hmac(&key.0)),
        }
    }

    /// Derives the key of the link: from the session, the number of the link at the source, and the
    /// target's challenge. A frame of another session or link does not verify.
    pub fn bind(&mut self, session: &[u8; 16], link: u64, challenge: &Challenge) {
        let Some(key) = &self.key else { return };
        let mut derive = hmac(&key.0);
        // No frame's code begins so: a frame begins with its direction.
        derive.update(b"link");
        derive.update(session);
        derive.update(&link.to_le_bytes());
        derive.update(challenge);
        self.link = Some(hmac(&derive.finalize().into_bytes().into()));
    }

    /// The tag of a frame, whose payload is the concatenation of `parts`.
    pub(crate) fn tag(&self, direction: Direction, head: &[u8], parts: [&[u8]; 2]) -> [u8; TAG] {
        let mut tag = [0; TAG];
        match &self.link {
            None => {
                let mut sum = crc32fast::Hasher::new();
                sum.update(head);
                parts.iter().for_each(|part| sum.update(part));
                tag[..4].copy_from_slice(&sum.finalize().to_le_bytes());
            }
            Some(mac) => {
                let code = fed(mac, direction, head, parts).finalize().into_bytes();
                tag.copy_from_slice(&code[..TAG]);
            }
        }
        tag
    }

    pub(crate) fn verify(
        &self,
        direction: Direction,
        head: &[u8],
        payload: &[u8],
        tag: &[u8; TAG],
    ) -> bool {
        match &self.link {
            None => self.tag(direction, head, [payload, &[]]) == *tag,
            Some(mac) => fed(mac, direction, head, [payload, &[]])
                .verify_truncated_left(tag)
                .is_ok(),
        }
    }
}

fn fed(mac: &Hmac<Sha256>, direction: Direction, head: &[u8], parts: [&[u8]; 2]) -> Hmac<Sha256> {
    let mut mac = mac.clone();
    mac.update(&[direction as u8]);
    mac.update(head);
    parts.iter().for_each(|part| mac.update(part));
    mac
}
