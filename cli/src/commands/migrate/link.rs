//! The connection between two hosts: bounded in time, and ended by a signal.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
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

    /// The same bound, that ends after `time` at the latest.
    pub(super) fn within(&self, time: Duration) -> Self {
        Self {
            end: self.end.min(Instant::now() + time),
            ..self.clone()
        }
    }

    /// The time that is left.
    pub(super) fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}

/// A socket of either family.
#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Lets reads and writes return within a turn.
    fn set_turn(&self, turn: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(turn))?;
                socket.set_write_timeout(Some(turn))
            }
            Self::Unix(socket) => {
                socket.set_read_timeout(Some(turn))?;
                socket.set_write_timeout(Some(turn))
            }
        }
    }

    fn set_blocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.set_nonblocking(false),
            Self::Unix(socket) => socket.set_nonblocking(false),
        }
    }
}

impl From<TcpStream> for Socket {
    fn from(socket: TcpStream) -> Self {
        Self::Tcp(socket)
    }
}

impl From<UnixStream> for Socket {
    fn from(socket: UnixStream) -> Self {
        Self::Unix(socket)
    }
}

/// A connection that fails when its peer is silent for too long, and at the end of its bound.
pub(super) struct Link {
    socket: Socket,
    bound: Bound,
}

impl Link {
    /// A link over a connected pair.
    pub(super) fn of_pair(socket: UnixStream, bound: Bound) -> io::Result<Self> {
        Self::new(socket, bound)
    }

    fn new(socket: impl Into<Socket>, bound: Bound) -> io::Result<Self> {
        let socket = socket.into();
        socket.set_blocking()?;
        socket.set_turn(TURN)?;
        Ok(Self { socket, bound })
    }

    /// Repeats a call until it makes progress.
    fn patiently(
        &mut self,
        mut call: impl FnMut(&mut Socket) -> io::Result<usize>,
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

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(|socket| match socket {
            Socket::Tcp(socket) => socket.read(buffer),
            Socket::Unix(socket) => socket.read(buffer),
        })
    }
}

impl Write for Link {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.patiently(|socket| match socket {
            Socket::Tcp(socket) => socket.write(buffer),
            Socket::Unix(socket) => socket.write(buffer),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.socket {
            Socket::Tcp(socket) => socket.flush(),
            Socket::Unix(socket) => socket.flush(),
        }
    }
}

/// Waits for an end of a pair that another thread hands over.
pub(super) fn handed_over(from: &Receiver<UnixStream>, bound: &Bound) -> io::Result<Link> {
    loop {
        bound.check()?;
        match from.recv_timeout(TURN) {
            Ok(socket) => return Link::new(socket, bound.clone()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// The place where a host waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// HOST:PORT.
    Tcp(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Checks that an address has a host and a port, or a path, before anything is built.
pub(super) fn parse_address(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path.is_empty() {
            false => Ok(Address::Unix(path.into())),
            true => Err(format!(
                "`{text}` names no socket, as unix:/run/migrate.sock does"
            )),
        };
    }
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(Address::Tcp(text.to_owned()))
        }
        _ => Err(format!(
            "`{text}` is neither HOST:PORT such as 127.0.0.1:4444 nor unix:PATH"
        )),
    }
}

/// Connects to a host that waits.
pub(super) fn connect(address: &Address, bound: &Bound) -> Outcome<Link> {
    reach(address, bound)
        .map_err(|error| Failure::because(format!("cannot reach {address}"), error))
}

/// Connects to a host that waits.
pub(super) fn reach(address: &Address, bound: &Bound) -> io::Result<Link> {
    let address = match address {
        Address::Unix(path) => return Link::new(UnixStream::connect(path)?, bound.clone()),
        Address::Tcp(address) => address,
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        bound.check()?;
        match TcpStream::connect_timeout(&address, bound.silence.min(bound.left())) {
            Ok(socket) => return Link::new(socket, bound.clone()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The links that may break, and the tries to make each anew.
pub(super) const TRIES: u32 = 10;

/// The time between two tries.
const PAUSE: Duration = Duration::from_millis(200);

/// Replaces a broken link, with pauses between the tries.
pub(super) fn again(
    bound: &Bound,
    relink: &mut dyn FnMut() -> io::Result<Link>,
) -> io::Result<Link> {
    let mut last = relink();
    for _ in 1..TRIES {
        if last.is_ok() {
            return last;
        }
        bound.check()?;
        thread::sleep(PAUSE);
        last = relink();
    }
    last
}

/// A socket on which a host waits.
pub(super) enum Waiting {
    Tcp(TcpListener),
    /// With the path that goes with it.
    Unix(UnixListener, PathBuf),
}

impl Waiting {
    /// Waits at an address.
    pub(super) fn at(address: &Address) -> io::Result<Self> {
        let waiting = match address {
            Address::Tcp(address) => Self::Tcp(TcpListener::bind(address)?),
            Address::Unix(path) => Self::Unix(UnixListener::bind(path)?, path.clone()),
        };
        match &waiting {
            Self::Tcp(socket) => socket.set_nonblocking(true)?,
            Self::Unix(socket, _) => socket.set_nonblocking(true)?,
        }
        Ok(waiting)
    }

    /// The address, with the port that the system chose.
    pub(super) fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(socket) => Address::Tcp(socket.local_addr()?.to_string()),
            Self::Unix(_, path) => Address::Unix(path.clone()),
        })
    }

    fn next(&self, bound: &Bound) -> io::Result<Link> {
        match self {
            Self::Tcp(socket) => Link::new(socket.accept()?.0, bound.clone()),
            Self::Unix(socket, _) => Link::new(socket.accept()?.0, bound.clone()),
        }
    }

    /// Waits for the next connection.
    pub(super) fn accept(&self, bound: &Bound) -> io::Result<Link> {
        loop {
            bound.check()?;
            match self.next(bound) {
                Err(error) if is_turn(&error) => thread::sleep(TURN / 10),
                accepted => return accepted,
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // A path that is gone already is as good.
            let _ = std::fs::remove_file(path);
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
    fn a_unix_socket_is_an_address_and_goes_with_its_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = parse_address(&format!("unix:{}", path.display())).unwrap();
        let waiting = Waiting::at(&address).unwrap();
        assert_eq!(waiting.address().unwrap(), address);
        let bound = bound(Duration::from_secs(20));
        let mut near = connect(&address, &bound).unwrap();
        let mut far = waiting.accept(&bound).unwrap();
        near.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        drop(waiting);
        assert!(!path.exists());
        for text in ["unix:", "nonsense", ":1", "host:70000"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_listener_without_callers_gives_up_at_the_bound() {
        let waiting = Waiting::at(&parse_address("127.0.0.1:0").unwrap()).unwrap();
        let ended = waiting.accept(&bound(Duration::from_millis(100)));
        assert_eq!(ended.err().map(|e| e.kind()), Some(io::ErrorKind::TimedOut));
    }
}
