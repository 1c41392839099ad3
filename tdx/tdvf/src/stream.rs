//! SHA-384 of a stream: by OpenSSL with the feature `openssl`, otherwise by the crate sha2.

#[cfg(feature = "openssl")]
use openssl::sha::Sha384;
#[cfg(not(feature = "openssl"))]
use sha2::{Digest as _, Sha384};

/// A running SHA-384.
#[derive(Clone)]
pub(crate) struct Stream(Sha384);

impl Default for Stream {
    fn default() -> Self {
        Self(Sha384::new())
    }
}

impl Stream {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn value(self) -> [u8; 48] {
        #[cfg(feature = "openssl")]
        return self.0.finish();
        #[cfg(not(feature = "openssl"))]
        return self.0.finalize().into();
    }
}
