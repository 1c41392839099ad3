//! TDs between hosts: the migration TD beside each, the two ends of the stream, and what is compared.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use embedded_io_adapters::std::FromStd;
use kvm_ops::sev::migrate::{Flow, Phase, Progress};
use kvm_ops::sim::SimHost;
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::{MigrateError, Receiver, SendLimits, Sender};
use kvm_ops::{AnyVm, EncParams, IntelVm, Kind, PreboundTd, TdParams, Tech, Vm};
use kvm_ops_attest::software::{Collateral, Pcs, QuotingService};
use kvm_ops_attest::tdx::{Quote, Root};
use kvm_ops_machine::{LaunchPage, Machine, MachineConfig, RunLimits};
use kvm_ops_migtd::{Dcap, MigrationTd, Policy, Program, Role, Untrusted};

use super::link::{Bound, Link};
use super::summary::{Equal, Summary};
use super::threads::EachStream;
use super::{Session, link, random};
use crate::confidential::Quotes;
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
    pub(super) fn new(host: SimHost, limits: RunLimits) -> Outcome<Self> {
        let root = Root::software()
            .map_err(|error| Failure::because("cannot read the software root", error))?;
        let program = Program::new(Policy::default(), Dcap::new(root, collateral), random);
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
    fn target(&self, memory: u64) -> Outcome<Machine<SimHost>> {
        Machine::build(&self.host, self.config(memory, true))
            .map_err(|error| Failure::of_machine("cannot build the target", error))
    }

    /// Binds the migration TD, and exchanges the session's keys with that at the other end.
    fn exchange(
        &mut self,
        role: Role,
        td: &TdxVm<SimHost>,
        link: &mut Link,
        limits: RunLimits,
    ) -> Outcome<()> {
        let binding = td
            .bind_migration_td(self.keeper.td(), self.prebound.attributes)
            .map_err(|error| Failure::because("the migration TD cannot be bound", error))?;
        self.keeper
            .exchange(role, binding, &mut FromStd::new(link), limits)
            .map_err(|error| {
                Failure::because("the migration TDs exchanged no keys", error)
                    .hint("the guest runs on at its source")
            })
    }

    /// Tears the migration TD down, and returns the number of leaks.
    pub(super) fn leaks(self) -> usize {
        self.keeper.destroy().leaks.len()
    }
}

fn td(vm: &Vm<AnyVm<SimHost>>) -> Outcome<&TdxVm<SimHost>> {
    match vm.back_end() {
        AnyVm::Intel(IntelVm::Tdx(td)) => Ok(td),
        _ => Err(Failure::new("the VM is no TD")),
    }
}

/// The time that a source has to come back over another link. It tries for two seconds.
const GRACE: Duration = Duration::from_secs(5);

/// The end of one link's part of an arrival.
enum Served {
    /// The source knows that the guest is here.
    Arrived(Equal),
    /// The source may come back over another link.
    Open,
    /// The guest stays with its source.
    Over,
}

impl Session<'_> {
    fn td_limits(&self) -> RunLimits {
        RunLimits::none().deadline(self.bound.left())
    }

    /// The host of a TD.
    pub(super) fn td_host(&self) -> Outcome<TdHost> {
        TdHost::new(self.guest.home()?, self.td_limits())
    }

    /// Sends a TD. A link that breaks is replaced by what `relink` brings, and the session goes on.
    pub(super) fn send_td(
        &self,
        from: &mut TdHost,
        vm: &Vm<AnyVm<SimHost>>,
        mut link: Link,
        relink: &mut dyn FnMut() -> io::Result<Link>,
        seen: &mut dyn FnMut(&Progress),
    ) -> Outcome<(Progress, Equal)> {
        let vm = td(vm)?;
        let own = Summary::of_td(&from.host, vm)?;
        from.exchange(Role::Source, vm, &mut link, self.td_limits())?;
        let streams = self.guest.streams();
        let outgoing = vm
            .outgoing(streams)
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        let limits = SendLimits {
            rounds: self.guest.rounds,
            ..SendLimits::default()
        };
        let mut sender = Sender::new(outgoing, limits, &mut random)
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        if streams > 1 {
            sender = sender.with_threads(Box::new(EachStream));
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
            let phase = sender.progress().phase;
            let (begun, committed) = (phase > Phase::New, phase == Phase::Committed);
            let error = match sent {
                Ok(progress) => {
                    let theirs = own.exchange_first(&mut link).map_err(|error| {
                        let what = "the guest arrived, and its host does not say what it got";
                        Failure::because(what, error)
                    })?;
                    return Ok((progress, own.equal(&theirs)));
                }
                Err(error) if begun && goes_on(&error, committed) => error,
                Err(error) => return Err(ended(error, committed)),
            };
            term::complain(match committed {
                false => format!("the link broke: {error}; going on over another"),
                true => format!("asking again who has the guest: {error}"),
            });
            broken += 1;
            let next = match broken {
                ..=link::TRIES => link::again(&self.bound, relink),
                _ => Err(io::Error::other("too many links broke")),
            };
            link = match next {
                Ok(link) => link,
                Err(failed) if committed => {
                    return Err(ended(error, true).hint(failed.to_string()));
                }
                Err(_) => {
                    sender.cancel().map_err(|error| {
                        let what = "the guest does not run on at its source";
                        Failure::because(what, error)
                    })?;
                    return Err(ended(error, false));
                }
            };
        }
    }

    /// Waits for a TD: each link brings one, asks for one that came, or ends alone. A TD that came is not
    /// compared if its source is gone.
    pub(super) fn receive_td(
        &self,
        at: &mut TdHost,
        mut next: impl FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<(Machine<SimHost>, Progress, Option<Equal>)> {
        loop {
            let machine = at.target(self.guest.memory)?;
            let served = self.serve_target(at, &machine, &mut next)?;
            if let Some((progress, equal)) = served {
                return Ok((machine, progress, equal));
            }
            // A target that has seen a guest takes no other.
            for leak in &machine.destroy().leaks {
                term::complain(format!("leaked: {leak}"));
            }
        }
    }

    /// Serves links with one target; `None` once it is used up.
    fn serve_target(
        &self,
        at: &mut TdHost,
        machine: &Machine<SimHost>,
        next: &mut dyn FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Option<(Progress, Option<Equal>)>> {
        let vm = td(machine.vm())?;
        let incoming = vm
            .incoming(self.guest.streams())
            .map_err(|error| Failure::because("the target cannot take a guest", error))?;
        let mut receiver = Receiver::new(incoming);
        if self.guest.streams() > 1 {
            receiver = receiver.with_threads(Box::new(EachStream));
        }
        if let Some(key) = &self.key {
            let mut nonce = [0; 16];
            random(&mut nonce)
                .map_err(|error| Failure::because("the host has no random numbers", error))?;
            receiver = receiver.with_key(key.clone(), nonce);
        }
        loop {
            let phase = receiver.progress().phase;
            let bound = match phase {
                Phase::Copying | Phase::Done => self.bound.within(GRACE),
                // It cannot know whether its source runs the guest on.
                _ => self.bound.clone(),
            };
            let mut link = match next(&bound) {
                Ok(link) => link,
                Err(_) if phase == Phase::Done => return Ok(Some((receiver.progress(), None))),
                Err(_) if phase == Phase::Copying && self.bound.check().is_ok() => {
                    term::complain("the source has not come back: waiting for another guest");
                    return Ok(None);
                }
                Err(error) => return Err(Failure::because("no guest arrived", error)),
            };
            match self.serve(at, vm, &mut receiver, &mut link) {
                Served::Arrived(equal) => return Ok(Some((receiver.progress(), Some(equal)))),
                Served::Open => {}
                Served::Over => return Ok(None),
            }
        }
    }

    /// Serves one link.
    fn serve(
        &self,
        at: &mut TdHost,
        vm: &TdxVm<SimHost>,
        receiver: &mut Receiver<'_, SimHost>,
        link: &mut Link,
    ) -> Served {
        let alone = |why: &dyn std::fmt::Display| {
            term::complain(format!("a connection ended without a guest: {why}"));
        };
        if receiver.progress().phase == Phase::New
            && let Err(failure) = at.exchange(Role::Target, vm, link, self.td_limits())
        {
            alone(&failure.in_a_line());
            return Served::Open;
        }
        let received = receiver.run(&mut FromStd::new(&mut *link), &mut |_| Flow::GoOn);
        if let Err(error) = received {
            alone(&error);
            return match receiver.can_go_on() {
                true => Served::Open,
                false => Served::Over,
            };
        }
        let compared =
            Summary::of_td(&at.host, vm).and_then(|own| Ok(own.equal(&own.exchange_second(link)?)));
        match compared {
            Ok(equal) => Served::Arrived(equal),
            // The source may not have heard that the guest is here.
            Err(failure) => {
                term::complain(format!(
                    "the guest is not compared: {}",
                    failure.in_a_line()
                ));
                Served::Open
            }
        }
    }
}

/// Returns whether a session goes on over another link.
const fn goes_on(error: &MigrateError, committed: bool) -> bool {
    match committed {
        false => error.is_of_the_link(),
        true => error.can_go_on(),
    }
}

/// The error of a migration that ended early.
fn ended(error: MigrateError, committed: bool) -> Failure {
    let failure = Failure::because("the journey ended early", error);
    failure.hint(match committed {
        false => "the guest runs on at its source",
        true => "the guest was given up: only its target knows whether it runs there",
    })
}
