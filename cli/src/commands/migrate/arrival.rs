//! TDs that come from another host.

use std::io;
use std::thread;

use embedded_io_adapters::std::FromStd;
use kvm_ops::sim::SimHost;
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::{Flow, MigrateError, Phase, Progress, Receiver};
use kvm_ops_machine::Machine;
use kvm_ops_migtd::Role;

use super::beside::{Beside, Ran};
use super::link::{Bound, Link};
use super::summary::{Equal, Summary};
use super::td::{GRACE, TdHost, td};
use super::threads::EachStream;
use super::{Session, random_bytes};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::term;

/// A TD that has come.
pub(super) struct Came {
    pub(super) machine: Machine<SimHost>,
    pub(super) journey: Journey,
}

/// The journey of a TD that has come.
pub(super) struct Journey {
    pub(super) progress: Progress,
    /// `None` if its source is gone.
    pub(super) equal: Option<Equal>,
    /// What it did before all of its pages had come.
    pub(super) ran: Option<Ran>,
}

/// The end of one link's part of an arrival.
enum Served {
    /// The source knows that the guest is here.
    Arrived(Equal),
    /// The source may come back over another link.
    Open,
    /// The guest stays with its source.
    Over,
    /// No end can run the guest.
    Lost(MigrateError),
}

/// The ends of a link's part, with what lives as long as the target.
struct Target<'t, 's, 'e> {
    at: &'t mut TdHost,
    vm: &'e TdxVm<SimHost>,
    receiver: Receiver<'e, SimHost>,
    guest: Beside<'s, 'e>,
    /// The guest's identity when it began to run.
    own: Option<Summary>,
}

impl Session<'_> {
    /// Waits for a TD: each link brings one, asks for one that came, or ends alone.
    pub(super) fn receive_td(
        &self,
        at: &mut TdHost,
        mut next: impl FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Came> {
        loop {
            let mut machine = at.target(self.guest.memory)?;
            if let Some(journey) = self.serve_target(at, &mut machine, &mut next)? {
                return Ok(Came { machine, journey });
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
        machine: &mut Machine<SimHost>,
        next: &mut dyn FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Option<Journey>> {
        let (vm, cpus) = machine.split();
        let vm = td(vm)?;
        thread::scope(|scope| {
            let mut target = Target {
                at,
                vm,
                receiver: self.receiver(vm)?,
                guest: Beside::new(self, scope, cpus),
                own: None,
            };
            let served = self.serve_links(&mut target, next);
            let Target {
                receiver, guest, ..
            } = target;
            let progress = receiver.progress();
            // A guest whose pages cannot come any more stops here.
            drop(receiver);
            let ran = guest.end(matches!(served, Ok(Some(_))));
            Ok(match served? {
                Some(equal) => Some(Journey {
                    progress,
                    equal,
                    ran: ran?,
                }),
                None => None,
            })
        })
    }

    fn receiver<'a>(&self, vm: &'a TdxVm<SimHost>) -> Outcome<Receiver<'a, SimHost>> {
        let incoming = vm
            .incoming(self.guest.streams())
            .map_err(|error| Failure::because("the target cannot take a guest", error))?;
        let mut receiver = Receiver::new(incoming);
        if self.guest.streams() > 1 {
            receiver = receiver.with_threads(Box::new(EachStream));
        }
        if self.guest.post_copy {
            receiver = receiver.with_post_copy();
        }
        if let Some(key) = &self.key {
            receiver = receiver.with_key(key.clone(), random_bytes()?);
        }
        Ok(receiver)
    }

    /// Serves links until the guest is here, with what its source compared, or the target is used up.
    fn serve_links(
        &self,
        target: &mut Target<'_, '_, '_>,
        next: &mut dyn FnMut(&Bound) -> io::Result<Link>,
    ) -> Outcome<Option<Option<Equal>>> {
        loop {
            let progress = target.receiver.progress();
            let bound = match progress.phase {
                Phase::Copying | Phase::PostCopy | Phase::Done => self.bound.within(GRACE),
                // It cannot know whether its source runs the guest on.
                _ => self.bound.clone(),
            };
            let mut link = match (next(&bound), progress.phase) {
                (Ok(link), _) => link,
                (Err(_), Phase::Done) => return Ok(Some(None)),
                (Err(_), Phase::Copying) if self.bound.check().is_ok() => {
                    term::complain("the source has not come back: waiting for another guest");
                    return Ok(None);
                }
                (Err(error), Phase::PostCopy) => {
                    let what = "the guest is lost: its source has not come back";
                    return Err(Failure::because(what, error)
                        .hint(format!(
                            "it ran here, and {} of its pages, as its source said last, did not follow",
                            progress.left
                        ))
                        .code(Code::Guest));
                }
                (Err(error), _) => return Err(Failure::because("no guest arrived", error)),
            };
            match self.serve(target, &mut link) {
                Served::Arrived(equal) => return Ok(Some(Some(equal))),
                Served::Open => {}
                Served::Over => return Ok(None),
                Served::Lost(error) => {
                    return Err(Failure::because("the guest is lost", error)
                        .hint("it ran here, and its other pages cannot follow")
                        .code(Code::Guest));
                }
            }
        }
    }

    /// Serves one link.
    fn serve(&self, target: &mut Target<'_, '_, '_>, link: &mut Link) -> Served {
        let Target {
            at,
            vm,
            receiver,
            guest,
            own,
        } = target;
        let alone = |why: &dyn std::fmt::Display| {
            term::complain(format!("a connection ended without a guest: {why}"));
        };
        if receiver.progress().phase == Phase::New
            && let Err(failure) = at.exchange(
                Role::Target,
                vm,
                link,
                self.agent_limits(),
                &self.guest.peer,
            )
        {
            alone(&failure.in_a_line());
            return Served::Open;
        }
        let received = receiver.run(&mut FromStd::new(&mut *link), &mut |progress| {
            if progress.phase == Phase::PostCopy && own.is_none() {
                // Before the guest changes it. What cannot be read is not equal.
                *own = Summary::of_td(&at.host, vm).ok();
            }
            guest.seen(progress);
            Flow::GoOn
        });
        if let Err(error) = received {
            if receiver.progress().phase == Phase::Lost {
                return Served::Lost(error);
            }
            alone(&error);
            return match receiver.can_go_on() {
                true => Served::Open,
                false => Served::Over,
            };
        }
        let own = match own.take() {
            Some(own) => Ok(own.resumed_after(guest.resumed_after())),
            None => Summary::of_td(&at.host, vm),
        };
        let compared = own.and_then(|own| Ok(own.equal(&own.exchange_second(link)?)));
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
