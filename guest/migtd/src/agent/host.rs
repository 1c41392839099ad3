//! The host's side: a machine that runs a migration agent, and carries its messages.

use std::sync::{Mutex, PoisonError};

use embedded_io::{Read, Write};
use kvm_ops::sev::migrate::{MigrationAgent, StreamKey};
use kvm_ops::sev::{Identity, SevVm};
use kvm_ops::{
    AmdVm, Answer, AnyVm, EncParams, Error, Exit, FreeReport, Gpa, GuestResponse, Host, Hpa,
    InitialPageKind, Kind, OpName, SevParams, Tech, Vm,
};
use kvm_ops_machine::{
    ExitContext, Flow, LaunchPage, Machine, MachineConfig, MachineError, RunLimits,
};

use super::io::SECRETS;
use super::program::AgentProgram;
use super::request::{AgentRequest, call};
use crate::desk::{Desk, ExchangeError, NoLink, put};
use crate::io::{BUFFER, MEMORY};
use crate::message::MAX_MESSAGE;
use crate::request::{REFUSED, Role};

/// What [`MigrationAgent`] answers when the agent gave up. [`SnpAgent::take_failure`] has the reason.
static GAVE_UP: OpName = OpName("the request of the migration agent");

/// A migration agent on its machine.
pub struct SnpAgent<H: Host> {
    machine: Machine<H>,
    certificates: Vec<u8>,
    limits: RunLimits,
    failure: Option<ExchangeError>,
}

impl<H: Host> SnpAgent<H> {
    /// Builds the guest, launched with these parameters. `certificates` is the platform's table of them (as the GHCB's SNP Extended
    /// Guest Request gives it, `kvm_ops_attest::snp::table`): the chain of the key that signs reports, and the root's
    /// revocation list. They are signed, so that they may come from anywhere. Each request of the guest has these limits.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub fn start(
        host: &H,
        program: AgentProgram,
        params: SevParams,
        certificates: Vec<u8>,
        limits: RunLimits,
    ) -> Result<Self, MachineError> {
        let secrets = LaunchPage {
            gpa: SECRETS,
            contents: Box::new([0; 4096]),
            kind: InitialPageKind::Secrets,
        };
        let config = MachineConfig::new()
            .kind(Kind::Of(Tech::SevSnp))
            .memory(MEMORY)
            .enc(EncParams::Sev(Box::new(params)))
            .launch([LaunchPage::measured(Gpa::new(0), program.image()), secrets])
            .program(program);
        Ok(Self {
            machine: Machine::build(host, config)?,
            certificates,
            limits,
            failure: None,
        })
    }

    /// The guest.
    pub fn vm(&self) -> &SevVm<H> {
        sev(self.machine.vm())
    }

    /// The agent's context page, by which guests are bound to it at their launch ([`SevParams::migration_agent`]).
    pub fn gctx(&self) -> Option<Hpa> {
        match self.vm().identity() {
            Some(Identity::Gctx(page)) => page.base(),
            _ => None,
        }
    }

    /// Judges the agent at the other end of `link`, and agrees with it on keys. The calls of both ends must run at the same time.
    /// Returns the key for the frames between the hosts.
    ///
    /// # Errors
    /// See [`ExchangeError`]. The agent has no peer then, and carries nothing.
    pub fn exchange<L: Read + Write + Send>(
        &mut self,
        role: Role,
        link: &mut L,
    ) -> Result<StreamKey, ExchangeError> {
        let request = AgentRequest::Exchange(role);
        let key = self.serve(&request, Some((role, link)))?;
        // A guest that shows something else is none of this program.
        let key = key.try_into().map_err(|_| ExchangeError::Unknown(0))?;
        Ok(StreamKey::new(key))
    }

    /// Why the agent gave up last, as [`MigrationAgent`] had no words for.
    pub fn take_failure(&mut self) -> Option<ExchangeError> {
        self.failure.take()
    }

    /// Tears the guest down.
    pub fn destroy(self) -> FreeReport {
        self.machine.destroy()
    }

    /// Lets the guest serve a request. Returns what it shows.
    fn serve<L: Read + Write + Send>(
        &mut self,
        request: &AgentRequest,
        link: Option<(Role, &mut L)>,
    ) -> Result<Vec<u8>, ExchangeError> {
        let desk = Desk::new(request.encode(), link);
        let certificates = &self.certificates;
        let (vm, mut cpus) = self.machine.split();
        let firmware = Firmware {
            vm: sev(vm),
            failed: Mutex::new(None),
        };
        let handler = |exit: &mut ExitContext<'_>| {
            let value = match exit.exit() {
                Exit::Hypercall {
                    nr: call::FIRMWARE,
                    args,
                } => firmware.carry(exit, args),
                Exit::Hypercall {
                    nr: call::CERTIFICATES,
                    args,
                } => put(exit, args, certificates),
                _ => return desk.handle(exit),
            };
            // A value fits every hypercall.
            match exit.answer(Answer::Value(value)) {
                Ok(()) => Flow::Continue,
                Err(_) => Flow::Stop,
            }
        };
        let report = cpus.run(&handler, self.limits);
        let failed = firmware.failed.into_inner();
        let report = report.map_err(ExchangeError::Machine)?;
        if let Some(error) = failed.unwrap_or_else(PoisonError::into_inner) {
            return Err(ExchangeError::Firmware(error));
        }
        let shown = desk.told(report.end)?.min(MAX_MESSAGE as u64);
        let mut bytes = vec![0; shown as usize];
        let memory = self.machine.memory();
        memory
            .read(BUFFER, &mut bytes)
            .map_err(ExchangeError::Machine)?;
        Ok(bytes)
    }

    /// The same without a link, as a [`MigrationAgent`] answers.
    fn answer(&mut self, request: &AgentRequest) -> kvm_ops::Result<Vec<u8>> {
        self.failure = None;
        match self.serve::<NoLink>(request, None) {
            Ok(shown) => Ok(shown),
            Err(ExchangeError::Firmware(error)) => Err(error),
            Err(error) => {
                self.failure = Some(error);
                Err(Error::Protected(&GAVE_UP))
            }
        }
    }
}

impl<H: Host> MigrationAgent for SnpAgent<H> {
    fn export(&mut self, gctx: Hpa) -> kvm_ops::Result<Vec<u8>> {
        self.answer(&AgentRequest::Export(gctx.get()))
    }

    fn import(&mut self, gctx: Hpa, sealed: &[u8]) -> kvm_ops::Result<()> {
        let request = AgentRequest::Import(gctx.get(), sealed.to_vec());
        self.answer(&request).map(drop)
    }
}

fn sev<H: Host>(vm: &Vm<AnyVm<H>>) -> &SevVm<H> {
    match vm.back_end() {
        AnyVm::Amd(AmdVm::Sev(vm)) => vm,
        #[allow(unreachable_patterns)] // In a build with other technologies.
        _ => unreachable!("it was built as an SNP guest"),
    }
}

/// The way of the agent's messages to firmware.
struct Firmware<'a, H: Host> {
    vm: &'a SevVm<H>,
    /// The host's error, which the guest does not see.
    failed: Mutex<Option<Error>>,
}

impl<H: Host> Firmware<'_, H> {
    /// Carries the message at an address to firmware, and the answer back there.
    fn carry(&self, exit: &ExitContext<'_>, args: [u64; 6]) -> u64 {
        let memory = exit.machine().memory();
        let mut page = [0; 4096];
        let Some(message) = page.get_mut(..usize::try_from(args[1]).unwrap_or(usize::MAX)) else {
            return REFUSED;
        };
        if memory.read(Gpa::new(args[0]), message).is_err() {
            return REFUSED;
        }
        match self.vm.guest_request(&page) {
            Ok(GuestResponse::Message(answer)) => {
                match memory.write(Gpa::new(args[0]), &answer[..]) {
                    Ok(()) => 0,
                    Err(_) => REFUSED,
                }
            }
            Ok(GuestResponse::Refused(status)) => status.into(),
            Err(error) => {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                *failed = Some(error);
                REFUSED
            }
        }
    }
}
