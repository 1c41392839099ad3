//! A page as memory holds it: bytes, and for each line the key that it was written under.

use super::{IntegrityFailure, KeyRing, LINE, LINES, LineKey, PAGE, View, parts_mut};
use std::ops::Range;

pub(super) type Bytes = Box<[u8; PAGE]>;

pub(super) struct Page {
    bytes: Bytes,
    writers: Writers,
}

/// For each line the generation of the key that it was written under, 0 for an ordinary line.
enum Writers {
    /// The same for all lines, as in nearly every page.
    One(u32),
    Each(Box<[u32; LINES]>),
}

impl Writers {
    fn of(&self, line: usize) -> u32 {
        match self {
            Writers::One(generation) => *generation,
            Writers::Each(writers) => writers[line],
        }
    }

    fn are_all(&self, mut lines: Range<usize>, generation: u32) -> bool {
        lines.all(|line| self.of(line) == generation)
    }

    fn set(&mut self, lines: Range<usize>, generation: u32) {
        if lines == (0..LINES) {
            *self = Writers::One(generation);
        } else if let Writers::One(one) = *self
            && one != generation
        {
            *self = Writers::Each(Box::new([one; LINES]));
        }
        if let Writers::Each(writers) = self {
            writers[lines].fill(generation);
        }
    }
}

/// Where an access begins in its page, and the bytes and lines that it covers.
fn covered(pa: u64, len: usize) -> (Range<usize>, Range<usize>) {
    let from = pa as usize % PAGE;
    (from..from + len, from / LINE..(from + len).div_ceil(LINE))
}

fn is_whole_lines(pa: u64, bytes: &[u8]) -> bool {
    pa.is_multiple_of(LINE as u64) && bytes.len().is_multiple_of(LINE)
}

impl Page {
    /// A page of zeros whose lines are ordinary.
    pub(super) fn zeros() -> Self {
        // A boxed array would be filled on the stack first; a vector's zeros are often fresh memory of the system.
        let bytes = vec![0; PAGE].into_boxed_slice().try_into();
        Page {
            bytes: bytes.unwrap_or_else(|_| Box::new([0; PAGE])),
            writers: Writers::One(0),
        }
    }

    /// A page of these bytes whose lines are ordinary.
    pub(super) fn of(bytes: Bytes) -> Self {
        Page {
            bytes,
            writers: Writers::One(0),
        }
    }

    pub(super) fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// A page of zeros under a key.
    pub(super) fn zeros_under(pa: u64, generation: u32, keys: &KeyRing) -> Self {
        let mut page = Page::zeros();
        keys.encrypt_zeros(generation, pa, &mut page.bytes[..]);
        page.writers = Writers::One(generation);
        page
    }

    /// The bytes as the host sees them.
    pub(super) fn bytes(&self) -> &[u8; PAGE] {
        &self.bytes
    }

    /// Overwrites the page with what `make` writes. If it has nothing, it has written nothing.
    pub(super) fn overwrite<T>(
        &mut self,
        pa: u64,
        key: Option<&LineKey>,
        make: impl FnOnce(&mut [u8; PAGE]) -> Option<T>,
    ) -> Option<T> {
        let made = make(&mut self.bytes)?;
        match key {
            Some(key) => self.seal(pa, 0..PAGE, key),
            None => self.writers = Writers::One(0),
        }
        Some(made)
    }

    /// Encrypts plaintext that was put into whole lines.
    fn seal(&mut self, pa: u64, bytes: Range<usize>, key: &LineKey) {
        let lines = bytes.start / LINE..bytes.end / LINE;
        self.writers.set(lines, key.generation());
        key.encrypt(pa, &mut self.bytes[bytes]);
    }

    /// Fails if one of these lines was not written with the key.
    pub(super) fn check(&self, lines: Range<usize>, key: &LineKey) -> Result<(), IntegrityFailure> {
        match self.writers.are_all(lines, key.generation()) {
            true => Ok(()),
            false => Err(IntegrityFailure),
        }
    }

    /// Reads bytes as a view shows them.
    pub(super) fn read(
        &self,
        pa: u64,
        buf: &mut [u8],
        view: View<'_>,
        keys: &KeyRing,
    ) -> Result<(), IntegrityFailure> {
        let (bytes, lines) = covered(pa, buf.len());
        match view {
            View::Private(key) => {
                self.check(lines, key)?;
                self.read_plain(pa, buf, key);
            }
            View::Plain => {
                for (pa, part) in parts_mut(pa, buf, LINE) {
                    let at = pa as usize % PAGE;
                    match keys.of_generation(self.writers.of(at / LINE)) {
                        Some(key) => self.read_plain(pa, part, &key),
                        None => part.copy_from_slice(&self.bytes[at..at + part.len()]),
                    }
                }
            }
            View::Host => buf.copy_from_slice(&self.bytes[bytes]),
        }
        Ok(())
    }

    /// Decrypts bytes that were written with the key.
    fn read_plain(&self, pa: u64, buf: &mut [u8], key: &LineKey) {
        if is_whole_lines(pa, buf) {
            let (bytes, _) = covered(pa, buf.len());
            key.decrypt_to(pa, &self.bytes[bytes], buf);
            return;
        }
        for (pa, part) in parts_mut(pa, buf, LINE) {
            let within = pa as usize % LINE;
            let line = self.plain_line(pa - within as u64, key);
            part.copy_from_slice(&line[within..within + part.len()]);
        }
    }

    fn plain_line(&self, pa: u64, key: &LineKey) -> [u8; LINE] {
        let mut line = [0; LINE];
        let (bytes, _) = covered(pa, LINE);
        key.decrypt_to(pa, &self.bytes[bytes], &mut line);
        line
    }

    /// Writes bytes with a key, or as the host does. Part of a line that is written with a key is read first.
    pub(super) fn write(
        &mut self,
        pa: u64,
        data: &[u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        let (bytes, lines) = covered(pa, data.len());
        let Some(key) = key else {
            self.bytes[bytes].copy_from_slice(data);
            self.writers.set(lines, 0);
            return Ok(());
        };
        if is_whole_lines(pa, data) {
            self.bytes[bytes.clone()].copy_from_slice(data);
            self.seal(pa, bytes, key);
            return Ok(());
        }
        let mut done = 0;
        while done < data.len() {
            let at = pa + done as u64;
            let within = at as usize % LINE;
            let len = (LINE - within).min(data.len() - done);
            self.write_line(at - within as u64, within, &data[done..done + len], key)?;
            done += len;
        }
        Ok(())
    }

    fn write_line(
        &mut self,
        pa: u64,
        within: usize,
        data: &[u8],
        key: &LineKey,
    ) -> Result<(), IntegrityFailure> {
        let (bytes, lines) = covered(pa, LINE);
        let mut line = [0; LINE];
        if data.len() < LINE {
            self.check(lines, key)?;
            line = self.plain_line(pa, key);
        }
        line[within..within + data.len()].copy_from_slice(data);
        self.bytes[bytes.clone()].copy_from_slice(&line);
        self.seal(pa, bytes, key);
        Ok(())
    }
}
