//! A text on a guest's console at which its run ends.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ops_machine::{ExitContext, ExitHandler, Flow};

/// True once a text was seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen(Arc<AtomicBool>);

impl Seen {
    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// A writer that passes everything on, and looks for the text. An empty one is never seen.
    pub(crate) fn looks_for<W: Write>(&self, text: &str, writer: W) -> impl Write + use<W> {
        Search {
            writer,
            text: text.as_bytes().to_vec(),
            tail: Vec::new(),
            seen: self.clone(),
        }
    }
}

struct Search<W> {
    writer: W,
    text: Vec<u8>,
    /// The bytes with which the text may have begun.
    tail: Vec<u8>,
    seen: Seen,
}

impl<W: Write> Write for Search<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.writer.write(bytes)?;
        if self.text.is_empty() || self.seen.get() {
            return Ok(written);
        }
        self.tail.extend_from_slice(&bytes[..written]);
        if self
            .tail
            .windows(self.text.len())
            .any(|part| part == self.text)
        {
            self.seen.0.store(true, Ordering::Relaxed);
        }
        let keep = self.tail.len().min(self.text.len() - 1);
        self.tail.drain(..self.tail.len() - keep);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Devices whose machine ends once the text was seen.
pub(crate) struct Until<'a> {
    pub(crate) devices: &'a dyn ExitHandler,
    pub(crate) seen: Seen,
}

impl ExitHandler for Until<'_> {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        match self.devices.handle(exit) {
            Flow::Continue if self.seen.get() => Flow::Stop,
            flow => flow,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen_in(pieces: &[&str]) -> (bool, String) {
        let seen = Seen::default();
        let mut out = Vec::new();
        let mut search = seen.looks_for("aab", &mut out);
        for piece in pieces {
            search.write_all(piece.as_bytes()).unwrap();
        }
        drop(search);
        (seen.get(), String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_text_is_seen_in_one_piece_or_in_many_and_everything_is_passed_on() {
        for (pieces, found) in [
            (&["xaaby"][..], true),
            (&["a", "a", "b"], true),
            (&["aa", "", "ab"], true),
            (&["aa", "ca", "b"], false),
            (&["aa"], false),
        ] {
            assert_eq!(seen_in(pieces), (found, pieces.concat()), "{pieces:?}");
        }
    }

    #[test]
    fn an_empty_text_is_never_seen() {
        let seen = Seen::default();
        seen.looks_for("", io::sink()).write_all(b"a").unwrap();
        assert!(!seen.get());
    }
}
