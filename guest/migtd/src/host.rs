//! The host's side: a machine that runs a migration TD, and carries its messages.

use embedded_io::{Read, Write};
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::Binding;
use kvm_ops::{AnyVm, FreeReport, Gpa, Host, IntelVm, Kind, Tech};
use kvm_ops_machine::{
    ExitContext, Flow, LaunchPage, Machine, MachineConfig, MachineError, QuoteService, Quoting,
    RunLimits,
};
use sha2::{Digest, Sha384};

use crate::desk::{Desk, ExchangeError, NoLink};
use crate::io::{BUFFER, MEMORY};
use crate::module::WORK;
use crate::program::Program;
use crate::request::{Exchange, Request, Role};

/// Bytes of TDINFO.
const TDINFO: usize = 512;

/// A migration TD on its machine.
pub struct MigrationTd<H: Host, S> {
    machine: Machine<H>,
    quoting: Quoting<S>,
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
        self.serve(request, Some((role, link)), limits)
    }

    /// Tears the TD down.
    pub fn destroy(self) -> FreeReport {
        self.machine.destroy()
    }

    fn serve<L: Read + Write + Send>(
        &mut self,
        request: Request,
        link: Option<(Role, &mut L)>,
        limits: RunLimits,
    ) -> Result<(), ExchangeError> {
        let desk = Desk::new(request.encode(), link);
        let quoting = &self.quoting;
        let handler = |exit: &mut ExitContext<'_>| match quoting.answer(exit) {
            true => Flow::Continue,
            false => desk.handle(exit),
        };
        let ran = self
            .machine
            .run_while(&handler, limits, |parts| quoting.serve(parts));
        let (report, ()) = ran.map_err(ExchangeError::Machine)?;
        desk.told(report.end).map(drop)
    }
}
