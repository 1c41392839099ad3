//! The data of a command in the form of `EncCmd`, as the kernel wants it: offsets of blobs become addresses.

use std::ops::Range;

use kvm_ops::{Error, Field, Result};

use super::forms::{Address, Form, Len};

/// A page at a page's address: SNP_LAUNCH_UPDATE demands that of its source.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Memory of whole pages that a command reads or writes.
pub(super) struct Pages(Vec<Page>);

impl Pages {
    /// A copy of the bytes, with zeros behind them up to the end of a page.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut pages = vec![Page([0; 4096]); bytes.len().div_ceil(4096)];
        for (page, part) in pages.iter_mut().zip(bytes.chunks(4096)) {
            page.0[..part.len()].copy_from_slice(part);
        }
        Self(pages)
    }

    /// The address of the first byte, for the kernel to write.
    pub(super) fn address(&mut self) -> u64 {
        self.0.as_mut_ptr().expose_provenance() as u64
    }

    /// Copies the first bytes out.
    pub(super) fn copy_to(&self, bytes: &mut [u8]) {
        for (page, part) in self.0.iter().zip(bytes.chunks_mut(4096)) {
            part.copy_from_slice(&page.0[..part.len()]);
        }
    }
}

/// A command's structure with the addresses of its blobs, and the blobs.
pub(super) struct Patched {
    pub(super) head: Vec<u8>,
    blobs: Vec<Blob>,
}

/// A blob in `data`, and its copy at an address.
struct Blob {
    /// The field with its address.
    at: usize,
    range: Range<usize>,
    pages: Pages,
}

impl Patched {
    /// Takes the structure and its blobs out of `data`. An offset of 0 is an address of 0: no blob.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the length of `data`, if it is shorter than the structure, or if a blob lies
    /// outside of it.
    pub(super) fn new(form: &Form, data: &[u8]) -> Result<Self> {
        let short = Error::Invalid(Field::BufferLength, data.len() as u64);
        let mut this = Self {
            head: data.get(..form.bytes).ok_or(short)?.to_vec(),
            blobs: Vec::new(),
        };
        for address in form.blobs {
            let (offset, len) = (this.long(address.at), this.len(address.len));
            if offset == 0 || len == 0 {
                continue;
            }
            let end = offset.checked_add(len).ok_or(short)?;
            let range = usize::try_from(offset).map_err(|_| short)?
                ..usize::try_from(end).map_err(|_| short)?;
            let mut pages = Pages::of(data.get(range.clone()).ok_or(short)?);
            let value = pages.address();
            this.put_long(address.at, value);
            let at = address.at;
            this.blobs.push(Blob { at, range, pages });
        }
        Ok(this)
    }

    fn long(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.head[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    fn put_long(&mut self, at: usize, value: u64) {
        self.head[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn len(&self, len: Len) -> u64 {
        match len {
            Len::Word(at) => {
                let mut bytes = [0; 4];
                bytes.copy_from_slice(&self.head[at..at + 4]);
                u32::from_le_bytes(bytes).into()
            }
            Len::Long(at) => self.long(at),
            Len::Fixed(len) => len,
        }
    }

    /// The guest memory that the command is about: host address and bytes.
    pub(super) fn guest(&self, form: &Form) -> Option<(u64, u64)> {
        let Address { at, len } = form.guest?;
        Some((self.long(at), self.len(len)))
    }

    /// Writes the structure and the blobs back to where they came from. A command that counts its source up, as
    /// SNP_LAUNCH_UPDATE does, counts the offset up.
    pub(super) fn write_back(mut self, data: &mut [u8]) {
        for mut blob in std::mem::take(&mut self.blobs) {
            let done = self.long(blob.at).wrapping_sub(blob.pages.address());
            self.put_long(blob.at, (blob.range.start as u64).wrapping_add(done));
            // `new` found the range in `data`.
            if let Some(bytes) = data.get_mut(blob.range) {
                blob.pages.copy_to(bytes);
            }
        }
        data[..self.head.len()].copy_from_slice(&self.head);
    }
}
