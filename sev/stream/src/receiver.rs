//! The end that takes a guest.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Gfn, VcpuId};

use crate::ends::{MigrateTarget, Shape, VcpuContent};
use crate::frame::{Kind, Wire};
use crate::packet::Packet;
use crate::record::{self, SessionId};
use crate::{Result, at};
use kvm_ops_wire::{
    Challenge, Direction, Flow, FrameSet, MigrateError, Phase, Progress, ProtocolError, Reason,
    Refusal, Seal, StreamKey, TargetState, next_challenge,
};

/// Pages between two calls of the watcher.
const PAGES_BETWEEN_REPORTS: u64 = 256;

/// Takes a guest from a [`Sender`](super::Sender).
///
/// [`run`](Self::run) serves one link, to the end of the migration or of the link. After an error
/// for which [`can_go_on`](MigrateError::can_go_on) holds, `run` with a new link goes on in the
/// same session. [`abandon`](Self::abandon) gives up what came so far.
///
/// Every length, number and order that a peer sends is checked before it is used, and a mistake ends
/// the link, not the session. The receiver finishes only when every frame of the guest's memory and
/// every vCPU came.
#[derive(Debug)]
pub struct Receiver<T> {
    target: T,
    limits: ReceiveLimits,
    key: Option<StreamKey>,
    challenge: Challenge,
    session: Option<Session>,
    phase: Phase,
    round: u32,
    pages: u64,
    bytes: u64,
    packet: Box<Packet>,
}

#[derive(Debug)]
struct Session {
    id: SessionId,
    shape: Shape,
    /// The record that is due.
    next: u64,
    /// Frames and vCPUs of which no record came yet.
    missing: FrameSet,
    missing_vcpus: Vec<bool>,
    /// Records that may still come.
    budget: u64,
}

impl Session {
    fn new(id: SessionId, shape: Shape, limits: &ReceiveLimits) -> Self {
        let mut missing = FrameSet::new(&shape.layout);
        missing.insert_all();
        let once = missing.len() + u64::from(shape.vcpus) + 1;
        Self {
            id,
            next: 0,
            missing_vcpus: vec![true; shape.vcpus as usize],
            budget: once.saturating_mul(limits.times.into()),
            shape,
            missing,
        }
    }

    /// Fails unless every frame and every vCPU came at least once.
    fn require_complete(&self) -> Result<()> {
        let frames = self.missing.len();
        let vcpus = self.missing_vcpus.iter().filter(|m| **m).count() as u32;
        if frames == 0 && vcpus == 0 {
            return Ok(());
        }
        Err(ProtocolError::Incomplete { frames, vcpus }.into())
    }
}

/// Bounds of a session, which a sender cannot exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveLimits {
    /// The most records that a session may have for each frame and vCPU, on average.
    pub times: u32,
}

impl Default for ReceiveLimits {
    /// 64 times. The default sender needs 10 at most, and more after broken links.
    fn default() -> Self {
        Self { times: 64 }
    }
}

impl<T: MigrateTarget> Receiver<T> {
    /// A receiver that waits for a guest.
    pub fn new(target: T) -> Self {
        Self {
            target,
            limits: ReceiveLimits::default(),
            key: None,
            challenge: [0; 24],
            session: None,
            phase: Phase::New,
            round: 0,
            pages: 0,
            bytes: 0,
            packet: Box::default(),
        }
    }

    /// Replaces the default limits.
    #[must_use]
    pub fn with_limits(mut self, limits: ReceiveLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Takes only frames that are authenticated with this key, which the sender must have too.
    /// `nonce` is 16 random bytes that no receiver with this key had before: it keeps old sessions
    /// from being replayed.
    #[must_use]
    pub fn with_key(mut self, key: StreamKey, nonce: [u8; 16]) -> Self {
        self.key = Some(key);
        self.challenge[..16].copy_from_slice(&nonce);
        self
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        let mut progress = Progress::new(self.phase);
        progress.round = self.round;
        progress.pages = self.pages;
        progress.bytes = self.bytes;
        progress
    }

    /// The target.
    pub fn target(&self) -> &T {
        &self.target
    }

    /// The target back, at whatever point it is.
    pub fn into_target(self) -> T {
        self.target
    }

    /// Serves a link until the guest is this end's, the sender cancels, or the link fails.
    ///
    /// # Errors
    /// [`MigrateError::Cancelled`] if the sender or the watcher cancelled; else see
    /// [`MigrateError`]. The peer gets the reason if the link still carries it.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        next_challenge(&mut self.challenge);
        let seal = Seal::new(self.key.as_ref());
        let mut wire = Wire::new(link, Direction::ToSource, seal);
        let before = self.bytes;
        let ended = self.serve(&mut wire, before, watch);
        self.bytes = before + wire.bytes;
        match ended {
            Ok(()) => Ok(self.progress()),
            Err(error) => {
                if !error.is_of_the_link() && error != MigrateError::Cancelled {
                    let refusal = record::refusal_of(&error);
                    let _ = wire.send(Kind::Refuse, self.due(), &[&refusal.encode()]);
                    let _ = wire.flush();
                }
                Err(error)
            }
        }
    }

    /// Gives up everything received, so that the VM can take another guest. The sender's guest runs
    /// on when the sender cancels.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] once the guest is this end's; the error of the target.
    pub fn abandon(&mut self) -> Result<()> {
        if self.phase.owner() == Phase::Done.owner() {
            return Err(MigrateError::WrongPhase);
        }
        if self.phase != Phase::New && self.phase != Phase::Cancelled {
            at("DECOMMISSION", self.target.abandon())?;
        }
        self.session = None;
        self.phase = Phase::Cancelled;
        Ok(())
    }

    /// Takes a guest that is prepared here although the sender never said that it gave it up.
    ///
    /// Only right when the sender's machine is known not to run the guest any more and never will
    /// again (it is fenced): otherwise the guest runs twice. A sender that finished but whose last
    /// word was lost needs no more than a new link.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] unless everything is here.
    pub fn take_over_from_fenced_source(&mut self) -> Result<()> {
        if self.phase != Phase::Prepared {
            return Err(MigrateError::WrongPhase);
        }
        self.own();
        Ok(())
    }

    fn own(&mut self) {
        self.target.own();
        self.phase = Phase::Done;
    }

    fn due(&self) -> u64 {
        self.session.as_ref().map_or(0, |session| session.next)
    }

    fn state(&self) -> TargetState {
        match self.phase {
            Phase::Done | Phase::Committed => TargetState::Owner,
            Phase::Prepared => TargetState::Prepared,
            _ => TargetState::Receiving,
        }
    }

    fn serve<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        before: u64,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        self.greet(wire)?;
        loop {
            let (kind, index, payload) = wire.receive()?;
            let is_numbered = matches!(
                kind,
                Kind::Private | Kind::Shared | Kind::Absent | Kind::Vcpu
            );
            let due = self.due();
            if index != due {
                return Err(ProtocolError::Index { due, got: index }.into());
            }
            if let Some(session) = &mut self.session {
                let budget = session.budget.checked_sub(1);
                session.budget = budget.ok_or(ProtocolError::TooManyRecords)?;
            }
            match (self.phase, kind) {
                (_, Kind::Cancel) if self.phase < Phase::Done => {
                    self.abandon()?;
                    return Err(MigrateError::Cancelled);
                }
                (Phase::Copying, Kind::Private | Kind::Shared | Kind::Absent) => {
                    self.frame(kind, payload)?;
                    self.pages += 1;
                }
                (Phase::Copying, Kind::Vcpu) => self.vcpu(payload)?,
                (Phase::Copying, Kind::RoundEnd) => {
                    self.round = self.round.saturating_add(1);
                    self.answer(wire, Kind::RoundOk, &[])?;
                }
                (Phase::Copying, Kind::Prepare) => {
                    if let Some(session) = &self.session {
                        session.require_complete()?;
                    }
                    at("RECEIVE_FINISH", self.target.receive_finish())?;
                    self.phase = Phase::Prepared;
                    self.answer(wire, Kind::Prepared, &[])?;
                }
                (Phase::Prepared, Kind::Commit) => {
                    self.own();
                    self.answer(wire, Kind::Done, &[])?;
                }
                // The answer to the first one was lost.
                (Phase::Done, Kind::Commit) => self.answer(wire, Kind::Done, &[])?,
                _ => return Err(ProtocolError::Unexpected(kind as u8).into()),
            }
            if is_numbered && let Some(session) = &mut self.session {
                session.next += 1;
            }
            let pages_only = is_numbered && !self.pages.is_multiple_of(PAGES_BETWEEN_REPORTS);
            self.bytes = before + wire.bytes;
            if !pages_only && watch(&self.progress()) == Flow::Cancel && self.phase < Phase::Done {
                self.abandon()?;
                let refusal = Refusal {
                    reason: Reason::Host,
                    status: 0,
                };
                let _ = wire.send(Kind::Refuse, self.due(), &[&refusal.encode()]);
                let _ = wire.flush();
                return Err(MigrateError::Cancelled);
            }
            if self.phase == Phase::Done {
                return Ok(());
            }
        }
    }

    /// Takes the first record of a link: a new session, or the one under way.
    fn greet<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        let (kind, _, payload) = wire.receive()?;
        if !matches!(kind, Kind::Hello | Kind::Resume) {
            return Err(ProtocolError::Unexpected(kind as u8).into());
        }
        let (id, link) = record::parse_session(payload)?;
        let shape = match kind {
            Kind::Hello => Some(record::parse_hello(payload)?),
            _ => None,
        };
        wire.seal.bind(&id, link, &[0; 24]);
        match shape {
            None => {
                match &self.session {
                    Some(session) if session.id == id => {}
                    _ => return Err(ProtocolError::Session.into()),
                }
                self.ready(wire)?;
                wire.seal.bind(&id, link, &self.challenge);
                Ok(())
            }
            Some(shape) => {
                if !matches!(self.phase, Phase::New | Phase::Cancelled) {
                    return Err(MigrateError::WrongPhase);
                }
                if let Err(error) = self.target.accept(&shape) {
                    let refusal = Refusal {
                        reason: Reason::Shape,
                        status: error.errno() as u64,
                    };
                    wire.send(Kind::Refuse, 0, &[&refusal.encode()])?;
                    wire.flush()?;
                    // The peer has the reason.
                    return Err(MigrateError::Refused(refusal));
                }
                let certs = at("PDH_CERT_EXPORT", self.target.certs())?;
                wire.send(Kind::Offer, 0, &[&record::offer(&self.challenge, &certs)])?;
                wire.seal.bind(&id, link, &self.challenge);
                wire.flush()?;
                let (kind, index, payload) = wire.receive()?;
                match kind {
                    Kind::Start => {}
                    Kind::Cancel => return Err(MigrateError::Cancelled),
                    _ => return Err(ProtocolError::Unexpected(kind as u8).into()),
                }
                if index != 0 {
                    return Err(ProtocolError::Index { due: 0, got: index }.into());
                }
                let start = record::parse_start(payload)?;
                if start.policy != shape.policy {
                    return Err(ProtocolError::Field("policy").into());
                }
                at("RECEIVE_START", self.target.receive_start(&start))?;
                self.session = Some(Session::new(id, shape, &self.limits));
                (self.phase, self.round, self.pages) = (Phase::Copying, 0, 0);
                self.ready(wire)
            }
        }
    }

    fn ready<L: Read + Write>(&self, wire: &mut Wire<'_, L>) -> Result<()> {
        self.answer(wire, Kind::Ready, &self.state().ready(&self.challenge))
    }

    fn answer<L: Read + Write>(
        &self,
        wire: &mut Wire<'_, L>,
        kind: Kind,
        payload: &[u8],
    ) -> Result<()> {
        wire.send(kind, self.due(), &[payload])?;
        Ok(wire.flush()?)
    }

    fn check(&self, gfn: Gfn) -> Result<()> {
        let inside = self
            .session
            .as_ref()
            .is_some_and(|session| session.shape.layout.contains(gfn));
        if inside {
            return Ok(());
        }
        Err(ProtocolError::OutsideOfGuest(gfn.get()).into())
    }

    fn frame(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let gfn = match kind {
            Kind::Private => {
                let gfn = record::parse_private(payload, &mut self.packet)?;
                self.check(gfn)?;
                let placed = self.target.receive_private(gfn, &self.packet);
                at("RECEIVE_UPDATE_DATA", placed)?;
                gfn
            }
            Kind::Shared => {
                let (gfn, has_data) = record::parse_shared(payload, &mut self.packet)?;
                self.check(gfn)?;
                let page = has_data.then_some(&self.packet.data);
                at("shared page", self.target.receive_shared(gfn, page))?;
                gfn
            }
            _ => {
                let gfn = record::parse_absent(payload)?;
                self.check(gfn)?;
                at("absent page", self.target.receive_absent(gfn))?;
                gfn
            }
        };
        if let Some(session) = &mut self.session {
            session.missing.remove(gfn);
        }
        Ok(())
    }

    fn vcpu(&mut self, payload: &[u8]) -> Result<()> {
        let (vcpu, content) = record::parse_vcpu(payload, &mut self.packet)?;
        let fits = self.session.as_ref().is_some_and(|session| {
            let is_es = session.shape.tech == kvm_ops::Tech::SevEs;
            vcpu < session.shape.vcpus && is_es == (content == VcpuContent::Vmsa)
        });
        if !fits {
            return Err(ProtocolError::Field("vCPU").into());
        }
        let received = self
            .target
            .receive_vcpu(VcpuId(vcpu), content, &self.packet);
        at("RECEIVE_UPDATE_VMSA", received)?;
        if let Some(session) = &mut self.session {
            session.missing_vcpus[vcpu as usize] = false;
        }
        Ok(())
    }
}
