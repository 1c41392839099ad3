//! The guest's console.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The destination of the guest's console: a writer, a bounded buffer, both, or none. A handle; clones
/// are the same console.
#[derive(Clone, Default)]
pub struct ConsoleSink(Arc<Mutex<Console>>);

#[derive(Default)]
struct Console {
    writer: Option<Box<dyn Write + Send>>,
    captured: Vec<u8>,
    /// The most bytes that are captured: the guest decides how much it prints.
    limit: usize,
    printed: u64,
    error: Option<io::Error>,
}

impl ConsoleSink {
    /// The bytes that [`capture`](Self::capture) keeps: 1 MiB.
    pub const CAPTURE_LIMIT: usize = 1 << 20;

    /// Drops what is printed.
    pub fn discard() -> Self {
        Self::default()
    }

    /// Passes it on to a writer, byte by byte as the guest prints.
    pub fn writer(writer: impl Write + Send + 'static) -> Self {
        Self::with(Some(Box::new(writer)), 0)
    }

    /// Keeps the first [`CAPTURE_LIMIT`](Self::CAPTURE_LIMIT) bytes.
    pub fn capture() -> Self {
        Self::with(None, Self::CAPTURE_LIMIT)
    }

    /// Keeps the first `limit` bytes and passes everything on.
    ///
    /// ```
    /// use kvm_ops_machine::ConsoleSink;
    /// use std::io::Write;
    ///
    /// let mut console = ConsoleSink::tee(std::io::sink(), 4);
    /// console.write_all(b"a long line")?;
    /// assert_eq!((console.text().as_str(), console.printed()), ("a lo", 11));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn tee(writer: impl Write + Send + 'static, limit: usize) -> Self {
        Self::with(Some(Box::new(writer)), limit)
    }

    fn with(writer: Option<Box<dyn Write + Send>>, limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Console {
            writer,
            limit,
            ..Console::default()
        })))
    }

    /// The captured bytes.
    pub fn captured(&self) -> Vec<u8> {
        self.lock().captured.clone()
    }

    /// The captured bytes as text; bytes that are not UTF-8 are replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().captured).into_owned()
    }

    /// The number of bytes that the guest printed.
    pub fn printed(&self) -> u64 {
        self.lock().printed
    }

    /// The first error of the writer, once. After an error nothing is passed on to it any more:
    /// a closed terminal must not end the guest.
    pub fn take_error(&self) -> Option<io::Error> {
        self.lock().error.take()
    }

    /// Prints, as the guest does.
    pub(crate) fn print(&self, bytes: &[u8]) {
        let mut console = self.lock();
        console.printed += bytes.len() as u64;
        let room = console.limit - console.captured.len();
        let kept = &bytes[..bytes.len().min(room)];
        console.captured.extend_from_slice(kept);
        if let Some(writer) = &mut console.writer
            && let Err(error) = writer.write_all(bytes).and_then(|()| writer.flush())
        {
            console.writer = None;
            console.error.get_or_insert(error);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Console> {
        // A writer that panicked leaves the buffer sound.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for ConsoleSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let console = self.lock();
        f.debug_struct("ConsoleSink")
            .field("printed", &console.printed)
            .field("captured", &console.captured.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_capture_is_bounded_and_counts_what_it_drops() {
        let sink = ConsoleSink::tee(io::sink(), 4);
        sink.print(b"abc");
        sink.print(b"def");
        assert_eq!((sink.text().as_str(), sink.printed()), ("abcd", 6));
        sink.print(b"g");
        assert_eq!(sink.captured(), b"abcd");
        assert_eq!(ConsoleSink::discard().captured(), b"");
    }

    #[test]
    fn a_writer_that_fails_is_told_of_once_and_not_used_again() {
        let sink = ConsoleSink::tee(Full, 10);
        sink.print(b"a");
        sink.print(b"b");
        let error = sink.take_error().map(|error| error.kind());
        assert_eq!(error, Some(io::ErrorKind::StorageFull));
        assert!(sink.take_error().is_none());
        assert_eq!(sink.text(), "ab");
    }
}
