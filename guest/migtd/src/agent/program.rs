//! The program of a migration agent.

use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use soft_amd_sp::message::{AgentChannel, AgentError, GuestChannel, MessageError};
use zeroize::Zeroizing;

use super::judge::{AgentVerifier, ReportBytes};
use super::policy::AgentPolicy;
use super::request::AgentRequest;
use crate::exchange::{Side, exchange};
use crate::failure::Failure;
use crate::handshake::Random;
use crate::io::Io;
use crate::message::MAX_MESSAGE;
use crate::program::image;
use crate::request::Role;
use crate::steps::Driven;

/// The purposes of the keys beside those of the exchange.
const TO_TARGET: &str = "contexts to target";
const TO_SOURCE: &str = "contexts to source";
const FRAMES: &str = "frames of the hosts";

/// A migration agent as a guest program, for the first vCPU of an SNP guest that starts with its [image](Self::image) at address 0,
/// measured, and its page of secrets.
///
/// It waits for requests of its host, one after the other.
pub struct AgentProgram {
    driven: Driven,
    image: Box<[u8; 4096]>,
}

impl AgentProgram {
    /// A program that judges peers by `policy`, whose page the guest's launch has, and believes the reports that `verifier` believes.
    /// `random` fills memory with the guest's random numbers, as RDSEED gives them.
    pub fn new(
        policy: AgentPolicy,
        verifier: AgentVerifier,
        random: impl FnMut(&mut [u8]) -> kvm_ops_core::Result<()> + Send + 'static,
    ) -> Self {
        let driven = Driven::new(move |guest| run(Io(guest), policy, verifier, Box::new(random)));
        Self {
            driven,
            image: image(Agent::NAME, &policy.encode()),
        }
    }

    /// The page that stands for the program and its policy in the guest's measurement.
    pub fn image(&self) -> Box<[u8; 4096]> {
        self.image.clone()
    }
}

impl GuestProgram for AgentProgram {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        self.driven.next(last)
    }
}

struct Agent {
    io: Io,
    policy: AgentPolicy,
    verifier: AgentVerifier,
    random: Box<Random>,
    channel: AgentChannel,
    /// A message to firmware without an answer. No other may take its number: it would be sealed with the same nonce.
    unanswered: Option<Vec<u8>>,
}

/// Serves requests until the host takes something away that the program needs.
async fn run(io: Io, policy: AgentPolicy, verifier: AgentVerifier, random: Box<Random>) {
    if io.share().await.is_err() {
        return;
    }
    let Ok(secrets) = io.secrets().await else {
        return;
    };
    let Some(firmware) = GuestChannel::from_secrets_page(&secrets, 0) else {
        return;
    };
    let mut agent = Agent {
        io,
        policy,
        verifier,
        random,
        channel: AgentChannel::new(firmware),
        unanswered: None,
    };
    loop {
        let asked = match agent.io.wait(MAX_MESSAGE).await {
            Ok(Some(asked)) => AgentRequest::decode(&asked).ok_or(Failure::Request),
            Ok(None) => continue,
            Err(Failure::Host) => return,
            Err(failure) => Err(failure),
        };
        let served = match asked {
            Ok(AgentRequest::Exchange(role)) => agent.meet(role).await,
            Ok(AgentRequest::Export(gctx)) => agent.export(gctx).await,
            Ok(AgentRequest::Import(gctx, sealed)) => agent.import(gctx, &sealed).await,
            Err(failure) => Err(failure),
        };
        let told = match served {
            Ok(shown) => agent.io.tell(0, shown).await,
            Err(failure) => {
                let (code, detail) = failure.numbers();
                agent.io.tell(code.into(), detail).await
            }
        };
        if told.is_err() {
            return;
        }
    }
}

impl Agent {
    /// Shows the result of a request: its length.
    async fn show(&mut self, bytes: &[u8]) -> Result<u64, Failure> {
        self.io.show(bytes).await?;
        Ok(bytes.len() as u64)
    }

    /// Meets a peer: agrees on keys with it, and shows the host the one for its frames.
    async fn meet(&mut self, role: Role) -> Result<u64, Failure> {
        self.channel.part();
        let keys = exchange(self, role).await?;
        let (to, from) = match role {
            Role::Source => (TO_TARGET, TO_SOURCE),
            Role::Target => (TO_SOURCE, TO_TARGET),
        };
        self.channel.meet(*keys.key(to), *keys.key(from));
        self.show(&*keys.key(FRAMES)).await
    }

    async fn export(&mut self, gctx: u64) -> Result<u64, Failure> {
        self.settle().await?;
        let request = self
            .channel
            .export_request(gctx)
            .map_err(|_| Failure::Host)?;
        let answer = self.ask(request).await?;
        let sealed = self.channel.exported(&answer);
        self.answered(&sealed);
        self.show(&sealed.map_err(of_firmware)?).await
    }

    async fn import(&mut self, gctx: u64, sealed: &[u8]) -> Result<u64, Failure> {
        self.settle().await?;
        let request = self.channel.import_request(gctx, sealed);
        let request = request.map_err(|error| match error {
            AgentError::NoPeer => Failure::NoPeer,
            _ => Failure::Seal,
        })?;
        let answer = self.ask(request).await?;
        let done = self.channel.imported(&answer);
        self.answered(&done);
        done.map(|()| 0).map_err(of_firmware)
    }

    /// Sends a message to firmware.
    async fn ask(&mut self, message: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let message = self.unanswered.insert(message);
        self.io.firmware(message).await
    }

    /// Notes that the last message has its answer, unless it was opened as none.
    fn answered<T>(&mut self, opened: &Result<T, AgentError>) {
        if !matches!(opened, Err(AgentError::Message(_))) {
            self.unanswered = None;
        }
    }

    /// Gets the answer to a message that had none, so that the next may be sealed.
    async fn settle(&mut self) -> Result<(), Failure> {
        if let Some(message) = &self.unanswered {
            let answer = self.io.firmware(message).await?;
            let opened = self.channel.firmware().open(&answer);
            opened.map_err(|_| Failure::Host)?;
            self.unanswered = None;
        }
        Ok(())
    }
}

impl Side for Agent {
    const NAME: &'static str = "kvm-ops migration agent";
    type Report = Box<ReportBytes>;

    fn io(&self) -> Io {
        self.io.clone()
    }

    fn random(&mut self) -> &mut Random {
        &mut *self.random
    }

    async fn report(&mut self, data: &[u8; 64]) -> Result<Self::Report, Failure> {
        self.settle().await?;
        let request = self.channel.firmware().report_request(data, 0);
        let answer = self.ask(request.map_err(|_| Failure::Host)?).await?;
        let opened = self.channel.firmware().open_report(&answer);
        let opened = opened.map_err(AgentError::from);
        self.answered(&opened);
        let (status, report) = opened.map_err(of_firmware)?;
        match (status, report.try_into()) {
            (0, Ok(report)) => Ok(report),
            (0, Err(_)) => Err(Failure::Host),
            (status, _) => Err(Failure::Firmware(status.into())),
        }
    }

    async fn evidence(&mut self, report: &Self::Report) -> Result<Vec<u8>, Failure> {
        let certificates = self.io.certificates().await?;
        Ok([&report[..], &certificates].concat())
    }

    fn judge(
        &mut self,
        own: &Self::Report,
        evidence: &[u8],
        data: &[u8; 64],
    ) -> Result<(), Failure> {
        self.verifier.judge(&self.policy, own, evidence, data)
    }

    /// Nothing: both have derived all keys. The sealed message proves it.
    async fn give(&mut self) -> Result<Zeroizing<Vec<u8>>, Failure> {
        Ok(Zeroizing::default())
    }

    async fn take(&mut self, secret: &[u8]) -> Result<(), Failure> {
        match secret {
            [] => Ok(()),
            _ => Err(Failure::Message),
        }
    }
}

/// The failure behind what the host says is firmware's answer.
fn of_firmware(error: AgentError) -> Failure {
    match error {
        AgentError::Refused(status) => Failure::Firmware(status.0.into()),
        AgentError::NoPeer => Failure::NoPeer,
        AgentError::Message(MessageError::Authentication) => Failure::Seal,
        _ => Failure::Host,
    }
}
