//! MRTD: the measurement of a TD's launch.

use sha2::{Digest, Sha384};

use crate::PAGE_SIZE;

/// Bytes that one TDH.MR.EXTEND measures.
pub const CHUNK_SIZE: usize = 256;

/// A running MRTD, as the TDX module keeps it (TDX module base specification, measurement; ABI
/// reference, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND): SHA-384 over a record of 128 bytes for each call,
/// the name of the call in bytes 0 to 15 and the guest address in 16 to 23; behind an extension's
/// record come the 256 bytes that it measures.
#[derive(Clone, Default)]
pub struct Mrtd(Sha384);

impl core::fmt::Debug for Mrtd {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Mrtd(..)")
    }
}

impl Mrtd {
    /// A TD without pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Measures the address of a page that TDH.MEM.PAGE.ADD adds.
    pub fn page_add(&mut self, gpa: u64) {
        self.record(b"MEM.PAGE.ADD", gpa);
    }

    /// Measures the address and contents of one TDH.MR.EXTEND.
    pub fn extend(&mut self, gpa: u64, chunk: &[u8; CHUNK_SIZE]) {
        self.record(b"MR.EXTEND", gpa);
        self.0.update(chunk);
    }

    /// The 16 extensions of a page.
    pub fn extend_page(&mut self, gpa: u64, contents: &[u8; PAGE_SIZE]) {
        let addresses = (gpa..).step_by(CHUNK_SIZE);
        for (gpa, chunk) in addresses.zip(contents.chunks_exact(CHUNK_SIZE)) {
            self.record(b"MR.EXTEND", gpa);
            self.0.update(chunk);
        }
    }

    /// The value that TDH.MR.FINALIZE leaves.
    pub fn value(&self) -> [u8; 48] {
        self.0.clone().finalize().into()
    }

    fn record(&mut self, call: &[u8], gpa: u64) {
        let mut record = [0; 128];
        record[..call.len()].copy_from_slice(call);
        record[16..24].copy_from_slice(&gpa.to_le_bytes());
        self.0.update(record);
    }
}
