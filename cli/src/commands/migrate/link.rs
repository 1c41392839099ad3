//! The connection between two hosts: bounded in time, and ended by a signal.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;

/// The longest silence of a peer. A peer answers a record within milliseconds.
const SILENCE: Duration = Duration::from_secs(30);

/// The time between two looks at the clock and at the signal.
const TURN: Duration = Duration::from_millis(100);

/// The bound of a whole session: a moment in time, or a signal before it.
#[derive(Clone)]
pub(super) struct Bound {
    end: Instant,
    silence: Duration,
    interrupt: Interrupt,
}

impl Bound {
    /// A bound that ends after `timeout`.
    pub(super) fn new(timeout: Duration, interrupt: &Interrupt) -> Self {
        let now = Instant::now();
        Self {
            // A time that the clock cannot hold is as good as none.
            end: now
                .checked_add(timeout)
                .unwrap_or(now + Duration::from_secs(u32::MAX.into())),
            silence: SILENCE.min(timeout),
            interrupt: interrupt.clone(),
        }
    }

    /// Succeeds until the end, or a signal.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.interrupt.seen() {
            return Err(io::Error::other("stopped by a signal"));
        }
        if Instant::now() >= self.end {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the time is up"));
        }
        Ok(())
    }

    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}

/// A socket whose reads and writes return within a turn.
pub(super) trait Socket: Read + Write {
    fn set_turn(&self, turn: Duration) -> io::Result<()>;
}

impl Socket for TcpStream {
    fn set_turn(&self, turn: Duration) -> io::Result<()> {
        self.set_nodelay(true)?;
        self.set_read_timeout(Some(turn))?;
        self.set_write_timeout(Some(turn))
    }
}

impl Socket for UnixStream {
    fn set_turn(&self, turn: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(turn))?;
        self.set_write_timeout(Some(turn))
    }
}

/// A connection that fails when its peer is silent for too long, and at the end of its bound.
pub(super) struct Link<S> {
    socket: S,
    bound: Bound,
}

impl<S: Socket> Link<S> {
    pub(super) fn new(socket: S, bound: Bound) -> io::Result<Self> {
        socket.set_turn(TURN)?;
        Ok(Self { socket, bound })
    }

    /// Repeats a call until it makes progress.
    fn patiently(
        &mut self,
        mut call: impl FnMut(&mut S) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let start = Instant::now();
        loop {
            self.bound.check()?;
            match call(&mut self.socket) {
                Err(error) if is_turn(&error) => {
                    if start.elapsed() >= self.bound.silence {
                        let text = format!("the peer was silent for {:?}", self.bound.silence);
                        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                    }
                }
                done => return done,
            }
        }
    }
}

/// True for the error of a socket that had nothing to do for a turn.
fn is_turn(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

impl<S: Socket> Read for Link<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(|socket| socket.read(buffer))
    }
}

impl<S: Socket> Write for Link<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.patiently(|socket| socket.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// Checks that an address has a host and a port, before anything is built.
pub(super) fn parse_address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(text.to_owned())
        }
        _ => Err(format!("`{text}` is not HOST:PORT such as 127.0.0.1:4444")),
    }
}

/// Connects to a host that waits.
pub(super) fn connect(address: &str, bound: &Bound) -> Outcome<Link<TcpStream>> {
    let failed = |error: io::Error| Failure::because(format!("cannot reach {address}"), error);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs().map_err(failed)? {
        bound.check().map_err(failed)?;
        match TcpStream::connect_timeout(&address, bound.silence.min(bound.left())) {
            Ok(socket) => return Link::new(socket, bound.clone()).map_err(failed),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// Waits for the next connection.
pub(super) fn accept(waiting: &TcpListener, bound: &Bound) -> io::Result<Link<TcpStream>> {
    waiting.set_nonblocking(true)?;
    loop {
        bound.check()?;
        match waiting.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false)?;
                return Link::new(socket, bound.clone());
            }
            Err(error) if is_turn(&error) => thread::sleep(TURN / 10),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(timeout: Duration) -> Bound {
        Bound::new(timeout, &Interrupt::default())
    }

    #[test]
    fn a_silent_peer_ends_a_read_at_the_bound() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut link = Link::new(near, bound(Duration::from_millis(300))).unwrap();
        let start = Instant::now();
        let error = link.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(20), "{error}");
    }

    #[test]
    fn a_peer_that_reads_nothing_ends_a_write_at_the_bound() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut link = Link::new(near, bound(Duration::from_millis(300))).unwrap();
        let error = link.write_all(&vec![0; 64 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_slow_peer_does_not_extend_the_session() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut link = Link::new(near, bound(Duration::from_millis(500))).unwrap();
        let drip = thread::spawn(move || {
            let mut far = far;
            while far.write_all(&[1]).is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
        });
        let error = link.read_exact(&mut [0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(link);
        drip.join().unwrap();
    }

    #[test]
    fn a_listener_without_callers_gives_up_at_the_bound() {
        let waiting = TcpListener::bind("127.0.0.1:0").unwrap();
        let ended = accept(&waiting, &bound(Duration::from_millis(100)));
        assert_eq!(ended.err().map(|e| e.kind()), Some(io::ErrorKind::TimedOut));
    }
}
