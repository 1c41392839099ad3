//! The actions of a SEV guest besides memory accesses: conversions, PVALIDATE, and the GHCB's MSR
//! protocol.

use kvm_ops::guest::GuestFault;
use kvm_ops::{Exit, Gfn, Gpa, Level, PAGE_SIZE, Privacy, Tech};
use soft_amd_sp::PageSize;

use super::access::{Validated, validate};
use super::protocol::{self, Reply};
use crate::reported::Reported;
use crate::table::GPA_BITS;
use crate::vcpu::{Core, Flow, State};

/// A range that changes hands, page by page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Converting {
    gpa: Gpa,
    pages: u64,
    to: Privacy,
    /// Pages done in this phase.
    done: u64,
    phase: Phase,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// PVALIDATE away what will be shared, before the host takes it (SNP).
    GiveUp,
    /// The host was asked; its answer is in `ret`.
    Asked,
    /// PVALIDATE what is private now (SNP).
    Accept,
    /// PVALIDATE of one page of this size, for itself.
    AcceptOne(PageSize),
    /// As `Asked`, by the MSR protocol, which is answered by its register.
    AskedByMsr,
}

impl Converting {
    /// True while the host's answer is due.
    pub(crate) fn asks(&self) -> bool {
        matches!(self.phase, Phase::Asked | Phase::AskedByMsr)
    }
}

impl Core {
    fn is_snp(&self) -> bool {
        self.vm.tech == Tech::SevSnp
    }

    /// `Action::Share`, `Action::Unshare`.
    pub(crate) fn convert(&mut self, gpa: Gpa, pages: u64, to: Privacy) -> Flow {
        let last = pages
            .checked_sub(1)
            .and_then(|n| Gfn::containing(gpa).checked_add(n));
        if !gpa.is_page_aligned() || last.is_none_or(|last| last.get() >> (GPA_BITS - 12) != 0) {
            return Flow::fault(GuestFault::BadOperand);
        }
        let phase = match to {
            Privacy::Shared if self.is_snp() => Phase::GiveUp,
            _ => return self.ask_host(gpa, pages, to, Phase::Asked),
        };
        Flow::Go(State::Converting(Converting {
            gpa,
            pages,
            to,
            done: 0,
            phase,
        }))
    }

    fn ask_host(&mut self, gpa: Gpa, pages: u64, to: Privacy, phase: Phase) -> Flow {
        let state = State::Converting(Converting {
            gpa,
            pages,
            to,
            done: 0,
            phase,
        });
        Flow::Leave(state, Exit::MapGpaRange { gpa, pages, to })
    }

    /// `Action::Accept`.
    pub(crate) fn accept(&mut self, gpa: Gpa, level: Level) -> Flow {
        let size = match level {
            _ if !self.is_snp() => return Flow::fault(GuestFault::NotOffered),
            Level::Size4K => PageSize::Size4K,
            Level::Size2M => PageSize::Size2M,
            _ => return Flow::fault(GuestFault::BadOperand),
        };
        if !Gfn::containing(gpa).is_aligned(level)
            || !gpa.is_page_aligned()
            || gpa.get() >> GPA_BITS != 0
        {
            return Flow::fault(GuestFault::BadOperand);
        }
        Flow::Go(State::Converting(Converting {
            gpa,
            pages: 1,
            to: Privacy::Private,
            done: 0,
            phase: Phase::AcceptOne(size),
        }))
    }

    /// Goes on with a conversion.
    pub(crate) fn go_on_converting(&mut self, now: Converting) -> Flow {
        let next = |phase| {
            Flow::Go(State::Converting(Converting {
                done: 0,
                phase,
                ..now
            }))
        };
        let (size, valid) = match now.phase {
            Phase::Asked if self.ret != 0 => return Flow::fault(GuestFault::Refused(self.ret)),
            Phase::Asked if now.to == Privacy::Private && self.is_snp() => {
                return next(Phase::Accept);
            }
            Phase::Asked => return Flow::report(Reported::Done),
            Phase::AskedByMsr => {
                return Flow::report(Reported::Value(protocol::converted(self.ret)));
            }
            Phase::GiveUp => (PageSize::Size4K, false),
            Phase::Accept => (PageSize::Size4K, true),
            Phase::AcceptOne(size) => (size, true),
        };
        if now.done == now.pages {
            return match now.phase {
                Phase::GiveUp => self.ask_host(now.gpa, now.pages, now.to, Phase::Asked),
                _ => Flow::report(Reported::Done),
            };
        }
        let gfn = Gfn::new(Gfn::containing(now.gpa).get() + now.done);
        match validate(&self.vm, gfn, size, valid) {
            Validated::Done => Flow::Go(State::Converting(Converting {
                done: now.done + 1,
                ..now
            })),
            Validated::Fault(why) => Flow::fault(why),
            Validated::Leave => {
                let gpa = Gpa::new(gfn.get() * PAGE_SIZE);
                let exit = Exit::MemoryFault {
                    gpa,
                    bytes: PAGE_SIZE,
                    access: Privacy::Private,
                };
                Flow::Leave(State::Converting(now), exit)
            }
            Validated::Fail(error) => Flow::Fail(State::Converting(now), error),
        }
    }

    /// VMGEXIT with a request in the GHCB MSR. A guest program has no CPUID leaf to ask for, and waits
    /// for no start-up interrupt.
    pub(crate) fn ghcb_msr(&mut self, msr: u64) -> Flow {
        if self.vm.tech == Tech::Sev {
            return Flow::fault(GuestFault::NotOffered);
        }
        match protocol::reply(&self.vm, msr) {
            Reply::Value(value) | Reply::Register { value, .. } => {
                Flow::report(Reported::Value(value))
            }
            Reply::Cpuid { .. } => Flow::report(Reported::Value(protocol::CPUID)),
            Reply::Hold => Flow::report(Reported::Value(msr)),
            Reply::Convert { gpa, to } => self.ask_host(gpa, 1, to, Phase::AskedByMsr),
            Reply::Terminate => self.terminate(msr),
        }
    }

    fn terminate(&mut self, msr: u64) -> Flow {
        self.buffer[..8].copy_from_slice(&msr.to_ne_bytes());
        self.data = 0..8;
        Flow::Leave(
            State::Off,
            Exit::SystemEvent {
                kind: protocol::SEV_TERM,
            },
        )
    }
}
