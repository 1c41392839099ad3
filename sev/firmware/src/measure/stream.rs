//! SHA-256 of a stream: by OpenSSL with the feature `openssl`, otherwise by the crate sha2.

#[cfg(feature = "openssl")]
use openssl::sha::Sha256;
#[cfg(not(feature = "openssl"))]
use sha2::{Digest as _, Sha256};

/// A running SHA-256.
#[derive(Clone)]
pub(super) struct Stream(Sha256);

impl Default for Stream {
    fn default() -> Self {
        Self(Sha256::new())
    }
}

impl Stream {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn value(&self) -> [u8; 32] {
        let stream = self.0.clone();
        #[cfg(feature = "openssl")]
        return stream.finish();
        #[cfg(not(feature = "openssl"))]
        return stream.finalize().into();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::Digest as _;

    use super::Stream;

    proptest! {
        #[test]
        fn a_stream_is_the_hash_of_its_parts_in_order(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..6),
        ) {
            let mut stream = Stream::default();
            for part in &parts {
                stream.update(part);
            }
            let want: [u8; 32] = sha2::Sha256::digest(parts.concat()).into();
            prop_assert_eq!(stream.value(), want);
        }
    }
}
