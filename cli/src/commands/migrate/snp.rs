//! SNP guests between two hosts in this process: swapped out, with their context by a migration agent of each host.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ops::guest::{Action, GuestProgram, MAX_ACCESS, Outcome as Last};
use kvm_ops::sev::migrate::{MigrationAgent, Phase};
use kvm_ops::sev::{Identity, SwapSlot, SwapStore};
use kvm_ops::sim::SimHost;
use kvm_ops::{
    EncParams, Error, Field, Gpa, GuestResponse, Hpa, InitialPageKind, Kind, Privacy, Result,
    SevParams, SharedMask, Tech,
};
use kvm_ops_machine::{LaunchPage, Machine, MachineConfig};
use soft_amd_sp::SnpPolicy;
use soft_amd_sp::message::{AgentChannel, GuestChannel};

use super::report::Report;
use super::sev::sev;
use super::{PATIENCE, Session, WARM_UP, leaks, random};
use crate::failure::{Failure, Outcome};
use crate::term;

/// The memory of an agent, and the frame of its secrets page.
const AGENT_MEMORY: u64 = 1 << 20;
const SECRETS: u64 = 1;

/// The guest of an agent: it reads its message keys.
struct KeyReader {
    keys: Arc<OnceLock<Box<[u8; MAX_ACCESS]>>>,
}

impl GuestProgram for KeyReader {
    fn step(&mut self, last: Last<'_>) -> Action<'_> {
        match last {
            Last::Start { mask, .. } => Action::Read {
                gpa: private(mask, SECRETS),
                len: MAX_ACCESS,
            },
            Last::Data(bytes) => {
                if let Ok(page) = <[u8; MAX_ACCESS]>::try_from(bytes) {
                    let _ = self.keys.set(Box::new(page));
                }
                Action::Shutdown
            }
            _ => Action::Shutdown,
        }
    }
}

fn private(mask: SharedMask, frame: u64) -> Gpa {
    let gfn = kvm_ops::Gfn::new(frame);
    let gpa = mask.join(gfn, Privacy::Private);
    gpa.unwrap_or(Gpa::new(frame << 12))
}

/// A migration agent: an SNP guest, and its channels to firmware and to its peer.
struct Agent {
    machine: Machine<SimHost>,
    channel: AgentChannel,
}

impl Agent {
    /// Carries a request of the agent to firmware.
    fn ask(&self, request: &[u8]) -> Result<Box<[u8; 4096]>> {
        let mut page = [0; 4096];
        let place = page.get_mut(..request.len());
        let too_long = Error::Invalid(Field::BufferLength, request.len() as u64);
        place.ok_or(too_long)?.copy_from_slice(request);
        let vm = sev(self.machine.vm()).map_err(|_| Error::NotFound(Field::Vm, 0))?;
        match vm.guest_request(&page)? {
            GuestResponse::Message(answer) => Ok(answer),
            GuestResponse::Refused(status) => refused(format_args!("status {status:#x}")),
        }
    }
}

/// The answer of an agent that firmware or its peer refused, after the reason was said.
fn refused<T>(why: impl fmt::Display) -> Result<T> {
    term::complain(format!("a migration agent was refused: {why}"));
    kvm_ops::not_offered!("the request of the migration agent")
}

impl MigrationAgent for Agent {
    fn export(&mut self, gctx: Hpa) -> Result<Vec<u8>> {
        let request = self.channel.export_request(gctx.get()).or_else(refused)?;
        let answer = self.ask(&request)?;
        self.channel.exported(&answer[..]).or_else(refused)
    }

    fn import(&mut self, gctx: Hpa, sealed: &[u8]) -> Result<()> {
        let request = self.channel.import_request(gctx.get(), sealed);
        let answer = self.ask(&request.or_else(refused)?)?;
        self.channel.done(&answer[..]).or_else(refused)
    }
}

/// The pages of a guest between its hosts.
#[derive(Default)]
struct Pages(BTreeMap<SwapSlot, Vec<u8>>);

impl SwapStore for Pages {
    fn put(&mut self, at: SwapSlot, page: &[u8]) -> Result<()> {
        self.0.insert(at, page.to_vec());
        Ok(())
    }

    fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> Result<()> {
        let missing = Error::NotFound(Field::Page, at.index.into());
        match self.0.get(&at) {
            Some(kept) if kept.len() == page.len() => {
                page.copy_from_slice(kept);
                Ok(())
            }
            _ => Err(missing),
        }
    }
}

impl Session<'_> {
    /// Starts an agent. The keys to its peer are the program's gift to both.
    fn agent(&self, host: &SimHost, to_peer: [u8; 32], from_peer: [u8; 32]) -> Outcome<Agent> {
        let secrets = LaunchPage {
            gpa: Gpa::new(SECRETS << 12),
            contents: Box::new([0; 4096]),
            kind: InitialPageKind::Secrets,
        };
        let config = MachineConfig::new()
            .kind(Kind::Of(Tech::SevSnp))
            .memory(AGENT_MEMORY)
            .launch([secrets]);
        let mut machine = Machine::build(host, config)
            .map_err(|error| Failure::because("cannot build a migration agent", error))?;
        let keys = Arc::new(OnceLock::new());
        let reader = KeyReader {
            keys: Arc::clone(&keys),
        };
        self.load(&mut machine, reader)?;
        let start = Instant::now();
        self.run_during(&mut machine, |_| {
            while keys.get().is_none() && start.elapsed() < PATIENCE && self.bound.check().is_ok() {
                std::thread::yield_now();
            }
        })?;
        let page = keys
            .get()
            .map(|page| GuestChannel::from_secrets_page(page, 0));
        let Some(Some(firmware)) = page else {
            return Err(Failure::new("a migration agent does not find its keys"));
        };
        Ok(Agent {
            machine,
            channel: AgentChannel::new(firmware, to_peer, from_peer),
        })
    }

    /// The guest goes from one host of this process to another. It is stopped first: a page that is swapped out is not copied.
    pub(super) fn between_snp(&self) -> Outcome<Report> {
        let (here, there) = (self.guest.sev_host()?, self.guest.sev_host()?);
        let mut keys = [[0; 32]; 2];
        for key in &mut keys {
            random(key)
                .map_err(|error| Failure::because("the host has no random numbers", error))?;
        }
        let mut agent = self.agent(&here, keys[0], keys[1])?;
        let mut peer = self.agent(&there, keys[1], keys[0])?;
        let migration_agent = match sev(agent.machine.vm())?.identity() {
            Some(Identity::Gctx(page)) => page.base(),
            _ => None,
        };
        let policy = SnpPolicy::SMT.bits() | SnpPolicy::MIGRATE_MA.bits();
        let enc = EncParams::Sev(Box::new(SevParams {
            policy: Some(policy),
            migration_agent,
            ..SevParams::default()
        }));
        let mut from = self.guest.source_with(&here, enc)?;
        let mut to = self.guest.target(&there)?;
        let told = self.load_writer(&mut from)?;
        self.run_during(&mut from, |_| {
            self.wait_for(&told, self.guest.turns().all() + WARM_UP);
        })?;
        let mut report = Report::new("hosts", self.guest.memory, self.guest.kind());
        report.step(Phase::New);
        let last = told.count.load(Ordering::Acquire);
        let start = Instant::now();
        let pages = self.carry(&from, &to, (&mut agent, &mut peer), &mut report)?;
        let took = start.elapsed();
        let bytes = (pages.0.values()).map(|page| page.len() as u64).sum();
        report.finish(took, took, bytes / 4096, bytes, 0);
        drop(pages);
        let (first, end, told) = self.run_on(&mut to)?;
        report.counts(last, first, end);
        report.pages_told(&told);
        report.leaks = leaks(from) + leaks(to) + leaks(agent.machine) + leaks(peer.machine);
        Ok(report)
    }

    /// The way. Until the source gave its guest up, it takes it back when a step fails.
    fn carry(
        &self,
        from: &Machine<SimHost>,
        to: &Machine<SimHost>,
        (agent, peer): (&mut Agent, &mut Agent),
        report: &mut Report,
    ) -> Outcome<Pages> {
        let (source, target) = (sev(from.vm())?, sev(to.vm())?);
        let mut pages = Pages::default();
        report.step(Phase::Stopped);
        let arrived = source
            .depart(&mut pages, agent)
            .and_then(|image| target.arrive(&image, &mut pages, peer));
        if let Err(error) = arrived {
            let back = source.resume(&mut pages);
            let failure = Failure::because("the journey ended early", error);
            return Err(failure.hint(match back {
                Ok(()) => "the guest runs on at its source".into(),
                Err(error) => format!("the guest does not run on at its source: {error}"),
            }));
        }
        report.step(Phase::Prepared);
        source
            .hand_off()
            .map_err(|error| Failure::because("the source does not give its guest up", error))?;
        report.step(Phase::Committed);
        target
            .resume(&mut pages)
            .map_err(|error| Failure::because("the guest does not run at its target", error))?;
        report.step(Phase::Done);
        Ok(pages)
    }
}
