//! MRTD: the measurement of a TD's launch.

use crate::PAGE_SIZE;
use crate::stream::Stream;

/// Bytes that one TDH.MR.EXTEND measures.
pub const CHUNK_SIZE: usize = 256;

/// Bytes of the record of a call.
const RECORD: usize = 128;

/// Bytes that one TDH.MR.EXTEND adds: its record and what it measures.
const EXTENSION: usize = RECORD + CHUNK_SIZE;

/// The place of the guest address in a record.
const ADDRESS: core::ops::Range<usize> = 16..24;

/// The names in the records.
const PAGE_ADD: &[u8] = b"MEM.PAGE.ADD";
const EXTEND: &[u8] = b"MR.EXTEND";

/// A running MRTD, as the TDX module keeps it (TDX module base specification, measurement; ABI
/// reference, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND): SHA-384 over a record of 128 bytes for each call,
/// the name of the call in bytes 0 to 15 and the guest address in 16 to 23; behind an extension's
/// record come the 256 bytes that it measures.
#[derive(Clone, Default)]
pub struct Mrtd {
    stream: Stream,
    /// The address of a page that was added, if it is not in the stream yet: its extensions mostly
    /// follow, and a hash is fastest over many blocks at a time.
    added: Option<u64>,
}

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
        self.flush();
        self.added = Some(gpa);
    }

    /// Measures the address and contents of one TDH.MR.EXTEND.
    pub fn extend(&mut self, gpa: u64, chunk: &[u8; CHUNK_SIZE]) {
        self.flush();
        let mut bytes = [0; EXTENSION];
        write_extension(&mut bytes, gpa, chunk);
        self.stream.update(&bytes);
    }

    /// The 16 extensions of a page.
    pub fn extend_page(&mut self, gpa: u64, contents: &[u8; PAGE_SIZE]) {
        let mut bytes = [0; RECORD + PAGE_SIZE / CHUNK_SIZE * EXTENSION];
        let (add, extensions) = bytes.split_at_mut(RECORD);
        let places = extensions.as_chunks_mut::<EXTENSION>().0;
        let chunks = contents.as_chunks::<CHUNK_SIZE>().0;
        for (index, (place, chunk)) in places.iter_mut().zip(chunks).enumerate() {
            let gpa = gpa.wrapping_add((index * CHUNK_SIZE) as u64);
            write_extension(place, gpa, chunk);
        }
        let start = match self.added.take() {
            Some(gpa) => {
                add.copy_from_slice(&add_record(gpa));
                0
            }
            None => RECORD,
        };
        self.stream.update(&bytes[start..]);
    }

    /// The value that TDH.MR.FINALIZE leaves.
    pub fn value(&self) -> [u8; 48] {
        let mut whole = self.clone();
        whole.flush();
        whole.stream.value()
    }

    fn flush(&mut self) {
        if let Some(gpa) = self.added.take() {
            self.stream.update(&add_record(gpa));
        }
    }
}

fn add_record(gpa: u64) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..PAGE_ADD.len()].copy_from_slice(PAGE_ADD);
    record[ADDRESS].copy_from_slice(&gpa.to_le_bytes());
    record
}

/// Writes the record of an extension, and the chunk behind it, over zeros.
fn write_extension(place: &mut [u8; EXTENSION], gpa: u64, chunk: &[u8; CHUNK_SIZE]) {
    place[..EXTEND.len()].copy_from_slice(EXTEND);
    place[ADDRESS].copy_from_slice(&gpa.to_le_bytes());
    place[RECORD..].copy_from_slice(chunk);
}
