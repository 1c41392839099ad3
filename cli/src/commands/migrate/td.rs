//! TDs between hosts: the migration TD beside each, and the end of the stream that sends.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use embedded_io_adapters::std::FromStd;
use kvm_ops::sev::migrate::{Flow, Phase, Progress};
use kvm_ops::sim::SimHost;
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::{MigrateError, SendLimits, Sender};
use kvm_ops::{AnyVm, EncParams, IntelVm, Kind, PreboundTd, TdParams, Tech, Vm};
use kvm_ops_attest::software::{Collateral, Pcs, QuotingService};
use kvm_ops_attest::tdx::{Quote, Root};
use kvm_ops_machine::{LaunchPage, Machine, MachineConfig, RunLimits};
use kvm_ops_migtd::{Dcap, MigrationTd, Policy, Program, Role, Untrusted};

use super::between::Sent;
use super::link::Link;
use super::peer::Peer;
use super::summary::Summary;
use super::threads::EachStream;
use super::{Session, link, random};
use crate::confidential::Quotes;
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

/// ATTRIBUTES.MIGRATABLE.
const MIGRATABLE: u64 = 1 << 29;

/// The seed of the software platforms' quoting enclave. Its quotes prove nothing about hardware.
const QUOTING: [u8; 32] = *b"kvm-ops migrate: quoting enclave";

/// A host of TDs, with the migration TD that serves them.
pub(super) struct TdHost {
    pub(super) host: SimHost,
    keeper: MigrationTd<SimHost, Quotes>,
    prebound: PreboundTd,
}

/// The software platforms' collateral, as their provisioning service gives it for every quote.
fn collateral(quote: &Quote) -> Result<(Vec<u8>, u64), Untrusted> {
    let untrusted = |error: &dyn std::fmt::Display| Untrusted(error.to_string());
    let service = QuotingService::new(QUOTING).map_err(|error| untrusted(&error))?;
    let platform = service.platform();
    let says = Collateral::new(platform, quote.report.tee_tcb_svn);
    let collateral = Pcs.collateral(platform, &says);
    let collateral = collateral.map_err(|error| untrusted(&error))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_err(|error| untrusted(&error))?.as_secs();
    Ok((collateral.to_string().into_bytes(), now))
}

impl TdHost {
    /// A host whose migration TD runs.
    pub(super) fn new(host: SimHost, policy: Policy, limits: RunLimits) -> Outcome<Self> {
        let root = Root::software()
            .map_err(|error| Failure::because("cannot read the software root", error))?;
        let program = Program::new(policy, Dcap::new(root, collateral), random);
        let quotes = Quotes::new(&host, QUOTING)?;
        let mut keeper = MigrationTd::start(&host, program, quotes)
            .map_err(|error| Failure::of_machine("cannot build the migration TD", error))?;
        let info_hash = keeper
            .info_hash(limits)
            .map_err(|error| Failure::because("the migration TD does not tell its name", error))?;
        Ok(Self {
            host,
            keeper,
            prebound: PreboundTd {
                info_hash,
                attributes: 0,
            },
        })
    }

    fn config(&self, memory: u64, arrives: bool) -> MachineConfig {
        let params = TdParams::default();
        let params = TdParams {
            attributes: params.attributes | MIGRATABLE,
            migration_td: Some(self.prebound),
            arrives,
            ..params
        };
        MachineConfig::new()
            .kind(Kind::Of(Tech::Tdx))
            .memory(memory)
            .enc(EncParams::Td(Box::new(params)))
            .awaits_guest(arrives)
    }

    /// A TD that is launched here.
    pub(super) fn source(&self, memory: u64) -> Outcome<Machine<SimHost>> {
        let first = LaunchPage::measured(kvm_ops::Gpa::new(0), Box::new([0; 4096]));
        let config = self.config(memory, false).launch([first]);
        let machine = Machine::build(&self.host, config)
            .map_err(|error| Failure::of_machine("cannot build the source", error))?;
        machine
            .vm()
            .pre_fault_memory(kvm_ops::Gfn::new(1), memory / 4096 - 1)
            .map_err(|error| Failure::because("cannot give the guest its memory", error))?;
        Ok(machine)
    }

    /// A TD that waits for its guest.
    pub(super) fn target(&self, memory: u64) -> Outcome<Machine<SimHost>> {
        Machine::build(&self.host, self.config(memory, true))
            .map_err(|error| Failure::of_machine("cannot build the target", error))
    }

    /// Binds the migration TD, and exchanges the session's keys with that at the other end.
    pub(super) fn exchange(
        &mut self,
        role: Role,
        td: &TdxVm<SimHost>,
        link: &mut Link,
        limits: RunLimits,
        peer: &Peer,
    ) -> Outcome<()> {
        let binding = td
            .bind_migration_td(self.keeper.td(), self.prebound.attributes)
            .map_err(|error| Failure::because("the migration TD cannot be bound", error))?;
        self.keeper
            .exchange(role, binding, &mut FromStd::new(link), limits)
            .map_err(|error| peer.refused("the migration TDs exchanged no keys", error))
    }

    /// Tears the migration TD down, and returns the number of leaks.
    pub(super) fn leaks(self) -> usize {
        self.keeper.destroy().leaks.len()
    }
}

pub(super) fn td(vm: &Vm<AnyVm<SimHost>>) -> Outcome<&TdxVm<SimHost>> {
    match vm.back_end() {
        AnyVm::Intel(IntelVm::Tdx(td)) => Ok(td),
        _ => Err(Failure::new("the VM is no TD")),
    }
}

/// The time that a source has to come back over another link. It tries for two seconds.
pub(super) const GRACE: Duration = Duration::from_secs(5);

impl Session<'_> {
    /// The limits of what a guest that exchanges keys does.
    pub(super) fn agent_limits(&self) -> RunLimits {
        RunLimits::none().deadline(self.bound.left())
    }

    /// The host of a TD.
    pub(super) fn td_host(&self) -> Outcome<TdHost> {
        let policy = self.guest.peer.of_td();
        TdHost::new(self.guest.home()?, policy, self.agent_limits())
    }

    /// Sends a TD. A link that breaks is replaced by what `relink` brings, and the session goes on.
    pub(super) fn send_td(
        &self,
        from: &mut TdHost,
        vm: &Vm<AnyVm<SimHost>>,
        mut link: Link,
        relink: &mut dyn FnMut() -> io::Result<Link>,
        seen: &mut dyn FnMut(&Progress),
    ) -> Outcome<Sent> {
        let vm = td(vm)?;
        let own = Summary::of_td(&from.host, vm)?;
        let peer = &self.guest.peer;
        from.exchange(Role::Source, vm, &mut link, self.agent_limits(), peer)?;
        let streams = self.guest.streams();
        let outgoing = vm
            .outgoing(streams)
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        let limits = SendLimits {
            rounds: self.guest.rounds(),
            ..SendLimits::default()
        };
        let mut sender = Sender::new(outgoing, limits, &mut random)
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        if streams > 1 {
            sender = sender.with_threads(Box::new(EachStream));
        }
        if self.guest.post_copy {
            sender = sender.with_post_copy();
        }
        if let Some(key) = &self.key {
            sender = sender.with_key(key.clone());
        }
        let mut watch = |progress: &Progress| {
            seen(progress);
            Flow::GoOn
        };
        let mut broken = 0;
        loop {
            let sent = sender.run(&mut FromStd::new(&mut link), &mut watch);
            let Progress { phase, left, .. } = sender.progress();
            let error = match sent {
                Ok(progress) => {
                    let theirs = own.exchange_first(&mut link).map_err(|error| {
                        let what = "the guest arrived, and its host does not say what it got";
                        Failure::because(what, error)
                    })?;
                    return Ok(Sent {
                        progress,
                        equal: Some(own.equal(&theirs)),
                        resumed_after: theirs.resumes_after(),
                    });
                }
                Err(error) if goes_on(&error, phase) => error,
                Err(error) => return Err(ended(error, phase, left)),
            };
            term::complain(match phase {
                Phase::Committed => format!("asking again who has the guest: {error}"),
                _ => format!("the link broke: {error}; going on over another"),
            });
            broken += 1;
            let next = match broken {
                ..=link::TRIES => link::again(&self.bound, relink),
                _ => Err(io::Error::other("too many links broke")),
            };
            link = match next {
                Ok(link) => link,
                Err(failed) if phase >= Phase::Committed => {
                    return Err(ended(error, phase, left).hint(failed.to_string()));
                }
                Err(_) => {
                    sender.cancel().map_err(|error| {
                        let what = "the guest does not run on at its source";
                        Failure::because(what, error)
                    })?;
                    return Err(ended(error, phase, left));
                }
            };
        }
    }
}

/// Returns whether a session goes on over another link.
const fn goes_on(error: &MigrateError, phase: Phase) -> bool {
    match phase {
        Phase::New => false,
        Phase::Copying | Phase::Stopped | Phase::Prepared => error.is_of_the_link(),
        Phase::Committed => error.can_go_on(),
        // The guest runs at its target and needs its pages, so nothing is left untried.
        Phase::PostCopy => true,
        Phase::Done | Phase::Cancelled | Phase::Lost => false,
    }
}

/// The error of a migration that ended early, with so many pages left.
fn ended(error: MigrateError, phase: Phase, left: u64) -> Failure {
    let lost = |what, hint: String| Failure::because(what, error).hint(hint).code(Code::Guest);
    match (phase, left) {
        (Phase::Lost, _) => lost(
            "the guest is lost",
            "it ran at its target, and its other pages cannot follow".into(),
        ),
        (Phase::PostCopy, 1..) => lost(
            "the guest is lost",
            format!("it ran at its target, and {left} of its pages did not follow"),
        ),
        (Phase::Committed | Phase::PostCopy, _) => {
            Failure::because("the journey ended early", error)
                .hint("the guest was given up: only its target knows whether it runs there")
        }
        _ => Failure::because("the journey ended early", error)
            .hint("the guest runs on at its source"),
    }
}
