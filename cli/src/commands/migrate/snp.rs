//! SNP guests between hosts: the migration agent beside each, and the two ends of the stream.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use embedded_io_adapters::std::FromStd;
use kvm_ops::sev::migrate::{Flow, Phase, Progress, SnpReceiver, SnpSender, StreamKey};
use kvm_ops::sev::{SwapSlot, SwapStore};
use kvm_ops::sim::SimHost;
use kvm_ops::{AnyVm, EncParams, Error, Field, SevParams, Vm};
use kvm_ops_attest::snp::Roots;
use kvm_ops_machine::{Machine, RunLimits};
use kvm_ops_migtd::Role;
use kvm_ops_migtd::agent::{AgentPolicy, AgentProgram, AgentVerifier, SnpAgent};
use soft_amd_sp::SnpPolicy;

use super::link::{self, Bound, Link};
use super::peer::Peer;
use super::sev::sev;
use super::td::GRACE;
use super::{Guest, Session, random, random_bytes};
use crate::confidential::certificates;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

/// A host of SNP guests, with the migration agent that serves them.
pub(super) struct SnpHost {
    host: SimHost,
    agent: SnpAgent<SimHost>,
}

/// Seconds of Unix time; 0 before that, when no certificate is valid.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

impl SnpHost {
    /// A host whose migration agent runs.
    fn new(host: SimHost, policy: AgentPolicy, limits: RunLimits) -> Outcome<Self> {
        let verifier = AgentVerifier::new(Roots::software(), now);
        let program = AgentProgram::new(policy, verifier, random);
        let platform = host.sev_platform();
        let platform = platform.ok_or_else(|| Failure::new("the host has no AMD SP"))?;
        let table = certificates(platform)?;
        let agent = SnpAgent::start(&host, program, SevParams::default(), table, limits)
            .map_err(|error| Failure::of_machine("cannot build the migration agent", error))?;
        Ok(Self { host, agent })
    }

    /// A guest that is launched here, bound to the agent.
    pub(super) fn source(&self, guest: &Guest) -> Outcome<Machine<SimHost>> {
        let policy = SnpPolicy::SMT.bits() | SnpPolicy::MIGRATE_MA.bits();
        let enc = EncParams::Sev(Box::new(SevParams {
            policy: Some(policy),
            migration_agent: self.agent.gctx(),
            ..SevParams::default()
        }));
        guest.source_with(&self.host, enc)
    }

    /// Lets the agent judge that at the other end. Returns the key of the frames.
    fn exchange(&mut self, role: Role, link: &mut Link, peer: &Peer) -> Outcome<StreamKey> {
        self.agent
            .exchange(role, &mut FromStd::new(link))
            .map_err(|error| peer.refused("the migration agents agreed on no keys", error))
    }

    /// Says why the agent gave up, if it did.
    fn tell_failure(&mut self) {
        if let Some(error) = self.agent.take_failure() {
            let failure = Failure::because("the migration agent gave up", error);
            term::complain(failure.in_a_line());
        }
    }

    /// Tears the agent down, and returns the number of leaks.
    pub(super) fn leaks(self) -> usize {
        self.agent.destroy().leaks.len()
    }
}

/// The source's last byte: it heard that the guest runs at its target.
const HEARD: u8 = 1;

/// Waits for the source's last byte.
fn heard(link: &mut Link) -> bool {
    let mut byte = [0];
    link.read_exact(&mut byte).is_ok() && byte == [HEARD]
}

/// The pages of a guest between its hosts.
#[derive(Default)]
struct Pages(BTreeMap<SwapSlot, Vec<u8>>);

impl SwapStore for Pages {
    fn put(&mut self, at: SwapSlot, page: &[u8]) -> kvm_ops::Result<()> {
        self.0.insert(at, page.to_vec());
        Ok(())
    }

    fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> kvm_ops::Result<()> {
        match self.0.get(&at) {
            Some(kept) if kept.len() == page.len() => {
                page.copy_from_slice(kept);
                Ok(())
            }
            _ => Err(Error::NotFound(Field::Page, at.index.into())),
        }
    }
}

impl Session<'_> {
    /// The host of an SNP guest.
    pub(super) fn snp_host(&self) -> Outcome<SnpHost> {
        let policy = self.guest.peer.of_agent();
        SnpHost::new(self.guest.sev_host()?, policy, self.agent_limits())
    }

    /// Sends an SNP guest. A link that breaks is replaced by what `relink` brings, and the session goes on.
    pub(super) fn send_snp(
        &self,
        from: &mut SnpHost,
        vm: &Vm<AnyVm<SimHost>>,
        mut link: Link,
        relink: &mut dyn FnMut() -> io::Result<Link>,
        seen: &mut dyn FnMut(&Progress),
    ) -> Outcome<Progress> {
        let key = from.exchange(Role::Source, &mut link, &self.guest.peer)?;
        let mut pages = Pages::default();
        let mut sender = SnpSender::new(sev(vm)?, &mut pages, key, &mut random)
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        let mut watch = |progress: &Progress| {
            seen(progress);
            Flow::GoOn
        };
        let mut broken = 0;
        loop {
            let sent = sender.run(&mut FromStd::new(&mut link), &mut from.agent, &mut watch);
            let error = match sent {
                Ok(progress) => {
                    // A target that does not hear it waits for a while, and keeps the guest.
                    let _ = link.write_all(&[HEARD]).and_then(|()| link.flush());
                    return Ok(progress);
                }
                Err(error) => error,
            };
            from.tell_failure();
            let is_committed = sender.progress().phase == Phase::Committed;
            broken += 1;
            if broken <= link::TRIES && (error.can_go_on() || is_committed) {
                term::complain(match is_committed {
                    true => format!("asking again who has the guest: {error}"),
                    false => format!("the link broke: {error}; going on over another"),
                });
                if let Ok(next) = link::again(&self.bound, relink) {
                    link = next;
                    continue;
                }
            }
            let failure = Failure::because("the journey ended early", error);
            if is_committed {
                return Err(failure
                    .hint("the guest was given up: only its target knows whether it runs there"));
            }
            return Err(match sender.cancel(Some(&mut FromStd::new(&mut link))) {
                Ok(()) => failure.hint("the guest runs on at its source"),
                Err(error) => failure
                    .hint(format!("the guest does not run on at its source: {error}"))
                    .code(Code::Guest),
            });
        }
    }

    /// Waits for an SNP guest: each link brings one, goes on with one, or ends alone.
    pub(super) fn receive_snp(
        &self,
        at: &mut SnpHost,
        mut next: impl FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<(Machine<SimHost>, Progress)> {
        loop {
            let machine = self.guest.target(&at.host)?;
            if let Some(progress) = self.take_snp(at, &machine, &mut next)? {
                return Ok((machine, progress));
            }
            // A target whose guest stayed away takes no other.
            for leak in &machine.destroy().leaks {
                term::complain(format!("leaked: {leak}"));
            }
        }
    }

    /// Takes a guest into one VM; `None` once that is used up.
    fn take_snp(
        &self,
        at: &mut SnpHost,
        machine: &Machine<SimHost>,
        next: &mut dyn FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Option<Progress>> {
        let no_guest = |error| Failure::because("no guest arrived", error);
        let mut link = next(&self.bound).map_err(no_guest)?;
        let key = match at.exchange(Role::Target, &mut link, &self.guest.peer) {
            Ok(key) => key,
            Err(failure) => {
                self.bound.check().map_err(no_guest)?;
                let why = failure.in_a_line();
                term::complain(format!("a connection ended without a guest: {why}"));
                return Ok(None);
            }
        };
        let mut pages = Pages::default();
        let mut receiver = SnpReceiver::new(sev(machine.vm())?, &mut pages, key, random_bytes()?);
        loop {
            let mut watch = |_: &Progress| Flow::GoOn;
            let took = receiver.run(&mut FromStd::new(&mut link), &mut at.agent, &mut watch);
            let phase = receiver.progress().phase;
            match took {
                Ok(progress) if heard(&mut link) => return Ok(Some(progress)),
                Ok(_) => {}
                Err(error) => {
                    at.tell_failure();
                    term::complain(format!("a connection ended without a guest: {error}"));
                }
            }
            let bound = match phase {
                Phase::New | Phase::Cancelled => return Ok(None),
                Phase::Stopped | Phase::Done => self.bound.within(GRACE),
                // Only its source knows who has it.
                _ => self.bound.clone(),
            };
            link = match next(&bound) {
                Ok(link) => link,
                // It runs here, whether its source knows it or not.
                Err(_) if phase == Phase::Done => return Ok(Some(receiver.progress())),
                Err(_) if phase == Phase::Stopped && self.bound.check().is_ok() => {
                    term::complain("the source has not come back: waiting for another guest");
                    return Ok(None);
                }
                Err(error) if phase == Phase::Stopped => return Err(no_guest(error)),
                Err(error) => {
                    let what =
                        "all of the guest came, and its source did not say that it gave it up";
                    return Err(Failure::because(what, error)
                        .hint("it does not run here; if its source gave it up, it is lost")
                        .code(Code::Guest));
                }
            };
        }
    }
}
