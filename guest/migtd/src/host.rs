//! The host's side: a machine that runs a migration TD, and carries its messages.

use std::sync::{Mutex, MutexGuard, PoisonError};

use embedded_io::{Read, Write};
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::Binding;
use kvm_ops::{Answer, AnyVm, Exit, FreeReport, Gpa, Host, IntelVm, Kind, Tech};
use kvm_ops_machine::{
    End, ExitContext, Flow, LaunchPage, Machine, MachineConfig, MachineError, QuoteService,
    Quoting, RunLimits,
};
use kvm_ops_wire::{Direction, Seal, Wire, WireError};
use sha2::{Digest, Sha384};
use thiserror::Error;

use crate::failure::Failure;
use crate::io::{BUFFER, MEMORY, WORK};
use crate::message::MAX_MESSAGE;
use crate::program::Program;
use crate::request::{Exchange, Request, Role, call};

mod frames {
    kvm_ops_wire::kinds! {
        b"KOMK", 1;
        /// A message of one migration TD to the other.
        Message = 1, 1, crate::message::MAX_MESSAGE;
    }
}

/// Bytes of TDINFO.
const TDINFO: usize = 512;

/// A migration TD on its machine.
pub struct MigrationTd<H: Host, S> {
    machine: Machine<H>,
    quoting: Quoting<S>,
}

/// The reason why no keys were exchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The migration TD gave up.
    #[error("the migration TD exchanged no keys")]
    Failed(#[source] Failure),
    /// The link between the hosts failed.
    #[error("the link between the migration TDs failed")]
    Link(#[source] WireError),
    /// The machine of the migration TD does not run.
    #[error("the migration TD does not run")]
    Machine(#[source] MachineError),
    /// The migration TD ended without an answer.
    #[error("the migration TD ended without an answer: {0}")]
    Ended(End),
    /// The migration TD answered with a reason that is none.
    #[error("the migration TD answered with the unknown reason {0:#x}")]
    Unknown(u64),
}

impl<H: Host, S: QuoteService> MigrationTd<H, S> {
    /// Builds the TD, whose quotes `service` makes.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn start(host: &H, program: Program, service: S) -> Result<Self, MachineError> {
        let pages = [
            LaunchPage::measured(Gpa::new(0), program.image()),
            LaunchPage::measured(WORK, Box::new([0; 4096])),
        ];
        let config = MachineConfig::new()
            .kind(Kind::Of(Tech::Tdx))
            .memory(MEMORY)
            .launch(pages)
            .program(program);
        Ok(Self {
            machine: Machine::build(host, config)?,
            quoting: Quoting::new(service),
        })
    }

    /// The TD, to be bound to others ([`TdxVm::bind_migration_td`]).
    pub fn td(&self) -> &TdxVm<H> {
        match self.machine.vm().back_end() {
            AnyVm::Intel(IntelVm::Tdx(td)) => td,
            #[allow(unreachable_patterns)] // In a build with other technologies.
            _ => unreachable!("it was built as a TD"),
        }
    }

    /// SHA-384 of the TD's TDINFO, by which it can be prebound
    /// ([`TdParams::migration_td`](kvm_ops::TdParams::migration_td)) with attributes of 0. A TD that starts
    /// with the same program and policy has the same on every machine.
    ///
    /// # Errors
    /// See [`ExchangeError`].
    pub fn info_hash(&mut self, limits: RunLimits) -> Result<[u8; 48], ExchangeError> {
        self.serve::<NoLink>(Request::Describe, None, limits)?;
        let mut info = [0; TDINFO];
        let read = self.machine.memory().read(BUFFER, &mut info);
        read.map_err(ExchangeError::Machine)?;
        Ok(Sha384::digest(info).into())
    }

    /// Exchanges the session keys of a bound TD with the migration TD at the other end of `link`. The calls
    /// of both ends must run at the same time.
    ///
    /// # Errors
    /// See [`ExchangeError`]. No key was set unless the failure came in the last message; a session
    /// without the peer's key, or with a wrong one, is refused by the TDX module.
    pub fn exchange<L: Read + Write + Send>(
        &mut self,
        role: Role,
        binding: Binding,
        link: &mut L,
        limits: RunLimits,
    ) -> Result<(), ExchangeError> {
        let request = Request::Exchange(Exchange {
            role,
            handle: binding.handle,
            uuid: binding.uuid,
        });
        let direction = match role {
            Role::Source => Direction::ToTarget,
            Role::Target => Direction::ToSource,
        };
        // The messages protect themselves.
        let wire = Wire::new(link, direction, Seal::new(None));
        self.serve(request, Some(wire), limits)
    }

    /// Tears the TD down.
    pub fn destroy(self) -> FreeReport {
        self.machine.destroy()
    }

    fn serve<L: Read + Write + Send>(
        &mut self,
        request: Request,
        wire: Option<Wire<'_, L, frames::Kind>>,
        limits: RunLimits,
    ) -> Result<(), ExchangeError> {
        let desk = Desk(Mutex::new(Session {
            request: Some(request.encode()),
            wire,
            sent: 0,
            broken: None,
            told: None,
        }));
        let quoting = &self.quoting;
        let handler = |exit: &mut ExitContext<'_>| match quoting.answer(exit) {
            true => Flow::Continue,
            false => desk.handle(exit),
        };
        let ran = self
            .machine
            .run_while(&handler, limits, |parts| quoting.serve(parts));
        let (report, ()) = ran.map_err(ExchangeError::Machine)?;
        let session = desk.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (session.told, session.broken) {
            (Some((0, _)), _) => Ok(()),
            (Some(_), Some(broken)) => Err(ExchangeError::Link(broken)),
            (Some((code, detail)), None) => Err(Failure::from_numbers(code, detail)
                .map_or(ExchangeError::Unknown(code), ExchangeError::Failed)),
            (None, _) => Err(ExchangeError::Ended(report.end)),
        }
    }
}

/// The link of a request that needs none.
struct NoLink;

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

/// Answers the hypercalls of a migration TD.
struct Desk<'l, L>(Mutex<Session<'l, L>>);

struct Session<'l, L> {
    request: Option<Vec<u8>>,
    wire: Option<Wire<'l, L, frames::Kind>>,
    sent: u64,
    broken: Option<WireError>,
    told: Option<(u64, u64)>,
}

/// The answer to a call that the host does not know, or cannot carry out.
const REFUSED: u64 = u64::MAX;

impl<'l, L: Read + Write + Send> Desk<'l, L> {
    fn lock(&self) -> MutexGuard<'_, Session<'l, L>> {
        // No panic happens under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
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
fn put(exit: &ExitContext<'_>, args: [u64; 6], bytes: &[u8]) -> u64 {
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
