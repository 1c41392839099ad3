//! SEV guests between hosts: the two ends of the stream.

use std::io;

use embedded_io_adapters::std::FromStd;
use kvm_ops::sev::SevVm;
use kvm_ops::sev::migrate::{Flow, Phase, Progress, Receiver, SendLimits, Sender};
use kvm_ops::sim::{SevSetup, SimHost};
use kvm_ops::{AmdVm, AnyVm, EncParams, Gpa, Vendor, Vm};
use kvm_ops_machine::{LaunchPage, Machine, MachineConfig};

use super::link::{Bound, Link};
use super::{Guest, Session, link, random, random_bytes};
use crate::failure::{Failure, Outcome};
use crate::term;

impl Guest {
    /// A host of SEV guests with room for two VMs of the guest.
    pub(super) fn sev_host(&self) -> Outcome<SimHost> {
        let memory = (2 * self.memory).next_multiple_of(2 << 20) + (64 << 20);
        let platform = soft_amd_sp::Platform::builder().memory(memory);
        SimHost::builder(Vendor::Amd)
            .sev(SevSetup::new(platform))
            .build()
            .map_err(|error| Failure::because("cannot build a software host", error))
    }

    /// Builds a VM with a launched guest, and pre-faults the rest of its memory.
    pub(super) fn source(&self, host: &SimHost) -> Outcome<Machine<SimHost>> {
        self.source_with(host, EncParams::Default)
    }

    /// The same, with these parameters.
    pub(super) fn source_with(&self, host: &SimHost, enc: EncParams) -> Outcome<Machine<SimHost>> {
        let first = LaunchPage::measured(Gpa::new(0), Box::new([0; 4096]));
        let config = MachineConfig::new()
            .kind(self.kind())
            .memory(self.memory)
            .enc(enc)
            .launch(vec![first]);
        let machine = Machine::build(host, config)
            .map_err(|error| Failure::because("cannot build the source", error))?;
        machine
            .vm()
            .pre_fault_memory(kvm_ops::Gfn::new(1), self.memory / 4096 - 1)
            .map_err(|error| Failure::because("cannot give the guest its memory", error))?;
        Ok(machine)
    }

    /// Builds a VM that waits for a guest.
    pub(super) fn target(&self, host: &SimHost) -> Outcome<Machine<SimHost>> {
        let config = MachineConfig::new()
            .kind(self.kind())
            .memory(self.memory)
            .awaits_guest(true);
        Machine::build(host, config)
            .map_err(|error| Failure::because("cannot build the target", error))
    }
}

pub(super) fn sev(vm: &Vm<AnyVm<SimHost>>) -> Outcome<&SevVm<SimHost>> {
    match vm.back_end() {
        AnyVm::Amd(AmdVm::Sev(vm)) => Ok(vm),
        _ => Err(Failure::new("the VM is no SEV guest")),
    }
}

impl Session<'_> {
    /// Takes a guest from the first connection that brings one. A connection that brings garbage, or
    /// breaks, ends alone: the session goes on with the next.
    pub(super) fn receive_sev(
        &self,
        to: &mut Machine<SimHost>,
        host: &SimHost,
        mut next: impl FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Progress> {
        let vendor = match host.sev_platform() {
            Some(platform) => platform.vendor_certs(),
            None => return Err(Failure::new("the host has no AMD SP")),
        };
        let incoming = sev(to.vm())?
            .incoming(vendor, Box::new(|_, _| Ok(())))
            .map_err(|error| Failure::because("the target cannot take a guest", error))?;
        let mut receiver = Receiver::new(incoming);
        if let Some(key) = &self.key {
            receiver = receiver.with_key(key.clone(), random_bytes()?);
        }
        loop {
            let link =
                next(&self.bound).map_err(|error| Failure::because("no guest arrived", error))?;
            match receiver.run(&mut FromStd::new(link), &mut |_| Flow::GoOn) {
                Ok(progress) => return Ok(progress),
                Err(error) => {
                    self.bound
                        .check()
                        .map_err(|error| Failure::because("no guest arrived", error))?;
                    term::complain(format!("a connection ended without a guest: {error}"));
                }
            }
        }
    }

    /// Sends a guest. A link that breaks is replaced by what `relink` brings, and the session goes on.
    pub(super) fn send_sev(
        &self,
        vm: &Vm<AnyVm<SimHost>>,
        mut link: Link,
        relink: &mut dyn FnMut() -> io::Result<Link>,
        seen: &mut dyn FnMut(&Progress),
    ) -> Outcome<Progress> {
        let outgoing = sev(vm)?
            .outgoing(Box::new(|_| Ok(Vec::new())))
            .map_err(|error| Failure::because("the guest cannot be sent", error))?;
        let limits = SendLimits {
            rounds: self.guest.rounds(),
            ..SendLimits::default()
        };
        let mut sender = Sender::new(outgoing, limits, &mut random)
            .map_err(|(error, _)| Failure::because("the guest cannot be sent", error))?;
        if let Some(key) = &self.key {
            sender = sender.with_key(key.clone());
        }
        let mut watch = |progress: &Progress| {
            seen(progress);
            Flow::GoOn
        };
        loop {
            let error = match sender.run(&mut FromStd::new(&mut link), &mut watch) {
                Ok(progress) => return Ok(progress),
                Err(error) => error,
            };
            if error.is_of_the_link() {
                term::complain(format!("the link broke: {error}; going on over another"));
                if let Ok(next) = link::again(&self.bound, relink) {
                    link = next;
                    continue;
                }
            }
            let given_up = sender.progress().phase >= Phase::Committed;
            let cancelled = sender.cancel(Some(&mut FromStd::new(&mut link)));
            let failure = Failure::because("the journey ended early", error);
            return Err(failure.hint(match (given_up, cancelled) {
                (false, Ok(())) => "the guest runs on at its source".into(),
                (false, Err(error)) => format!("the guest does not run on at its source: {error}"),
                (true, _) => "the guest was given up: only its target can run it".into(),
            }));
        }
    }
}
