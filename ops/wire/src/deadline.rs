//! A link that ends when its time is over.

use embedded_io::{Error, ErrorKind, ErrorType, Read, Write};

/// Ends a link at a deadline.
///
/// Before each read and write it asks `expired`; once that says yes, every call fails with
/// [`ErrorKind::TimedOut`], and the session stops as at any broken link. The link below must return
/// from a read in bounded time, as a socket with a read timeout does: then a peer that is silent, or
/// sends one byte at a time, holds an end of a migration no longer than the deadline and one such timeout.
///
/// ```
/// use std::time::{Duration, Instant};
/// use kvm_ops_wire::Deadline;
/// # struct Link;
/// let end = Instant::now() + Duration::from_secs(60);
/// let link = Deadline::new(Link, move || Instant::now() >= end);
/// ```
#[derive(Debug)]
pub struct Deadline<L, F> {
    link: L,
    expired: F,
}

impl<L, F: FnMut() -> bool> Deadline<L, F> {
    /// `link`, until `expired` returns `true`.
    pub fn new(link: L, expired: F) -> Self {
        Self { link, expired }
    }

    /// The link below.
    pub fn into_inner(self) -> L {
        self.link
    }

    fn check(&mut self) -> Result<(), ErrorKind> {
        match (self.expired)() {
            true => Err(ErrorKind::TimedOut),
            false => Ok(()),
        }
    }
}

impl<L, F> ErrorType for Deadline<L, F> {
    type Error = ErrorKind;
}

impl<L: Read, F: FnMut() -> bool> Read for Deadline<L, F> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ErrorKind> {
        self.check()?;
        self.link.read(buffer).map_err(|error| error.kind())
    }
}

impl<L: Write, F: FnMut() -> bool> Write for Deadline<L, F> {
    fn write(&mut self, data: &[u8]) -> Result<usize, ErrorKind> {
        self.check()?;
        self.link.write(data).map_err(|error| error.kind())
    }

    fn flush(&mut self) -> Result<(), ErrorKind> {
        self.check()?;
        self.link.flush().map_err(|error| error.kind())
    }
}
