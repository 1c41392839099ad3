//! The host's side of a request: it gives it to the guest, and carries the guest's messages.

use std::sync::{Mutex, MutexGuard, PoisonError};

use embedded_io::{Read, Write};
use kvm_ops::{Answer, Exit, Gpa};
use kvm_ops_machine::{End, ExitContext, Flow, MachineError};
use kvm_ops_wire::{Direction, Seal, Wire, WireError};
use thiserror::Error;

use crate::failure::Failure;
use crate::message::MAX_MESSAGE;
use crate::request::{REFUSED, Role, call};

mod frames {
    kvm_ops_wire::kinds! {
        b"KOMK", 1;
        /// A message of one guest to its peer.
        Message = 1, 1, crate::message::MAX_MESSAGE;
    }
}

/// The reason why no keys were exchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The guest gave up.
    #[error("the guest that exchanges keys gave up")]
    Failed(#[source] Failure),
    /// The link between the hosts failed.
    #[error("the link to the peer failed")]
    Link(#[source] WireError),
    /// The machine of the guest does not run.
    #[error("the guest that exchanges keys does not run")]
    Machine(#[source] MachineError),
    /// The guest ended without an answer.
    #[error("the guest that exchanges keys ended without an answer: {0}")]
    Ended(End),
    /// The host could not carry a message to the AMD SP.
    #[error("the host cannot carry a message to the AMD SP")]
    Firmware(#[source] kvm_ops::Error),
    /// The guest answered with a reason that is none.
    #[error("the guest that exchanges keys answered with the unknown reason {0:#x}")]
    Unknown(u64),
}

/// The link of a request that needs none.
pub(crate) struct NoLink;

impl embedded_io::ErrorType for NoLink {
    type Error = embedded_io::ErrorKind;
}

impl Read for NoLink {
    fn read(&mut self, _: &mut [u8]) -> Result<usize, Self::Error> {
        Err(embedded_io::ErrorKind::NotConnected)
    }
}

impl Write for NoLink {
    fn write(&mut self, _: &[u8]) -> Result<usize, Self::Error> {
        Err(embedded_io::ErrorKind::NotConnected)
    }

    fn flush(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// Answers the hypercalls of a guest that serves one request.
pub(crate) struct Desk<'l, L>(Mutex<Session<'l, L>>);

struct Session<'l, L> {
    request: Option<Vec<u8>>,
    wire: Option<Wire<'l, L, frames::Kind>>,
    sent: u64,
    broken: Option<WireError>,
    told: Option<(u64, u64)>,
}

impl<'l, L: Read + Write + Send> Desk<'l, L> {
    /// A request, and the link to the peer if it needs that.
    pub(crate) fn new(request: Vec<u8>, link: Option<(Role, &'l mut L)>) -> Self {
        let wire = link.map(|(role, link)| {
            let direction = match role {
                Role::Source => Direction::ToTarget,
                Role::Target => Direction::ToSource,
            };
            // The messages protect themselves.
            Wire::new(link, direction, Seal::new(None))
        });
        Self(Mutex::new(Session {
            request: Some(request),
            wire,
            sent: 0,
            broken: None,
            told: None,
        }))
    }

    /// What the guest told before it ended so: the number of bytes that it shows, mostly 0.
    pub(crate) fn told(self, end: End) -> Result<u64, ExchangeError> {
        let session = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (session.told, session.broken) {
            (Some((0, shown)), _) => Ok(shown),
            (Some(_), Some(broken)) => Err(ExchangeError::Link(broken)),
            (Some((code, detail)), None) => Err(Failure::from_numbers(code, detail)
                .map_or(ExchangeError::Unknown(code), ExchangeError::Failed)),
            (None, _) => Err(ExchangeError::Ended(end)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Session<'l, L>> {
        // No panic happens under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers an exit.
    pub(crate) fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        let Exit::Hypercall { nr, args } = exit.exit() else {
            return Flow::Continue;
        };
        let mut session = self.lock();
        let value = match nr {
            call::WAIT => match session.request.take() {
                Some(request) => put(exit, args, &request),
                // It waits until the next run.
                None => return Flow::Stop,
            },
            call::SEND => session.send(exit, args),
            call::RECEIVE => session.receive(exit, args),
            call::STATUS => {
                session.told = Some((args[0], args[1]));
                0
            }
            _ => REFUSED,
        };
        // A value fits every hypercall.
        match exit.answer(Answer::Value(value)) {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::Stop,
        }
    }
}

/// Writes bytes to where the guest wants them: their number, or 0 if they do not fit.
pub(crate) fn put(exit: &ExitContext<'_>, args: [u64; 6], bytes: &[u8]) -> u64 {
    let memory = exit.machine().memory();
    let fits = bytes.len() as u64 <= args[1];
    match fits && memory.write(Gpa::new(args[0]), bytes).is_ok() {
        true => bytes.len() as u64,
        false => 0,
    }
}

impl<L: Read + Write> Session<'_, L> {
    /// Sends the message that the guest shows.
    fn send(&mut self, exit: &ExitContext<'_>, args: [u64; 6]) -> u64 {
        let length = usize::try_from(args[1]).unwrap_or(usize::MAX);
        let Some(wire) = self.wire.as_mut().filter(|_| length <= MAX_MESSAGE) else {
            return REFUSED;
        };
        let mut message = vec![0; length];
        let memory = exit.machine().memory();
        if memory.read(Gpa::new(args[0]), &mut message).is_err() {
            return REFUSED;
        }
        let sent = wire.send(frames::Kind::Message, self.sent, &[&message]);
        self.sent += 1;
        match sent.and_then(|()| wire.flush()) {
            Ok(()) => 0,
            Err(error) => {
                self.broken = Some(error);
                REFUSED
            }
        }
    }

    /// Receives a message to where the guest wants it.
    fn receive(&mut self, exit: &ExitContext<'_>, args: [u64; 6]) -> u64 {
        match self.wire.as_mut().map(Wire::receive) {
            Some(Ok((_, _, message))) => put(exit, args, message),
            Some(Err(error)) => {
                self.broken = Some(error);
                0
            }
            None => 0,
        }
    }
}
