//! The end that a guest leaves.

use alloc::boxed::Box;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Gfn, VcpuId};

use crate::ends::{FrameContent, MigrateSource, VcpuContent};
use crate::frame::{Kind, Wire};
use crate::packet::Packet;
use crate::record::{self, SessionId};
use crate::{Result, at};
use kvm_ops_wire::{
    Challenge, Direction, Flow, FrameSet, MigrateError, Phase, Progress, ProtocolError, Refusal,
    Seal, StreamKey, TargetState,
};

/// When the sender stops the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendLimits {
    /// After so many rounds at the latest; 0 stops the guest before the first page.
    pub rounds: u32,
    /// As soon as no more than so many pages are left for the next round.
    pub pages_left: u64,
}

impl Default for SendLimits {
    /// 8 rounds, 64 pages.
    fn default() -> Self {
        Self {
            rounds: 8,
            pages_left: 64,
        }
    }
}

/// Pages between two calls of the watcher.
const PAGES_BETWEEN_REPORTS: u64 = 256;

/// A record that the target may not have yet.
#[derive(Clone, Copy, Debug)]
enum Unconfirmed {
    Frame(Gfn),
    Vcpu,
}

/// Sends a guest to a [`Receiver`](super::Receiver).
///
/// [`run`](Self::run) goes as far as its link carries. After an error for which
/// [`can_go_on`](MigrateError::can_go_on) holds, `run` with a new link goes on in the same session
/// at the record that the target is due. [`cancel`](Self::cancel) ends the session at any time before the
/// source has given the guest up, and the guest runs on.
///
/// The value must be used up by one of the two: dropped in between, it leaves the guest in the
/// firmware's sending state, as after a program that died.
#[derive(Debug)]
pub struct Sender<S> {
    source: S,
    limits: SendLimits,
    key: Option<StreamKey>,
    session: SessionId,
    /// Links so far.
    links: u64,
    phase: Phase,
    /// Prepare was sent: the target may be prepared, and nothing can be sent after that.
    closing: bool,
    pending: FrameSet,
    /// Records from number `next - unconfirmed.len()` on.
    unconfirmed: Vec<Unconfirmed>,
    next: u64,
    round: u32,
    pages: u64,
    bytes: u64,
    packet: Box<Packet>,
}

impl<S: MigrateSource> Sender<S> {
    /// Prepares to send. `random` fills 16 bytes with random numbers of the host, the name of the
    /// session.
    ///
    /// # Errors
    /// The guest cannot be sent, or `random` fails.
    pub fn new(
        source: S,
        limits: SendLimits,
        random: &mut dyn FnMut(&mut [u8]) -> kvm_ops::Result<()>,
    ) -> core::result::Result<Self, (MigrateError, S)> {
        let mut session = [0; 16];
        let prepared = at("name of the session", random(&mut session))
            .and_then(|()| at("shape of the guest", source.shape()));
        let layout = match prepared {
            Ok(shape) => shape.layout,
            Err(error) => return Err((error, source)),
        };
        Ok(Self {
            source,
            limits,
            key: None,
            session,
            links: 0,
            phase: Phase::New,
            closing: false,
            pending: FrameSet::new(&layout),
            unconfirmed: Vec::new(),
            next: 0,
            round: 0,
            pages: 0,
            bytes: 0,
            packet: Box::default(),
        })
    }

    /// Authenticates every frame with this key, which the receiver must have too.
    #[must_use]
    pub fn with_key(mut self, key: StreamKey) -> Self {
        self.key = Some(key);
        self
    }

    fn wire<'l, L: Read + Write>(&mut self, link: &'l mut L) -> Wire<'l, L> {
        self.links += 1;
        Wire::new(link, Direction::ToTarget, Seal::new(self.key.as_ref()))
    }

    /// Names session and link, after which the target answers under a key of this link.
    fn resume_on<L: Read + Write>(&self, wire: &mut Wire<'_, L>) -> Result<()> {
        let link = self.links.to_le_bytes();
        wire.send(Kind::Resume, self.next, &[&self.session, &link])?;
        self.bind(wire, &[0; 24]);
        Ok(wire.flush()?)
    }

    fn bind<L: Read + Write>(&self, wire: &mut Wire<'_, L>, challenge: &Challenge) {
        wire.seal.bind(&self.session, self.links, challenge);
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        let mut progress = Progress::new(self.phase);
        progress.round = self.round;
        progress.pages = self.pages;
        progress.left = self.pending.len();
        progress.bytes = self.bytes;
        progress
    }

    /// The source.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The source back, at whatever point it is.
    pub fn into_source(self) -> S {
        self.source
    }

    /// Sends over a link: begins a session, or goes on with the one under way.
    ///
    /// # Errors
    /// See [`MigrateError`]; the guest is still the source's unless the phase is
    /// [`Committed`](Phase::Committed) or later. A broken link lets a stopped guest run on, unless
    /// the target may be prepared already.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        if matches!(self.phase, Phase::Done | Phase::Cancelled) {
            return Err(MigrateError::WrongPhase);
        }
        let mut wire = self.wire(link);
        let before = self.bytes;
        let mut run = Run {
            sender: self,
            before,
        };
        let ended = run.all(&mut wire, watch);
        self.bytes = before + wire.bytes;
        match ended {
            Ok(()) => Ok(self.progress()),
            Err(MigrateError::Cancelled) => {
                self.end(Some(&mut wire))?;
                Err(MigrateError::Cancelled)
            }
            Err(error) => {
                // The next link may come late: the guest does not wait for it.
                if self.phase == Phase::Stopped && !self.closing {
                    self.source.go_on();
                    self.phase = Phase::Copying;
                }
                Err(error)
            }
        }
    }

    /// Gives the migration up: SEND_CANCEL, and the guest runs on here. With a link, the target
    /// hears of it; without, its embedder abandons it.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] once the guest is given up; the error of SEND_CANCEL. A target
    /// that cannot be reached is no error.
    pub fn cancel<L: Read + Write>(&mut self, link: Option<&mut L>) -> Result<()> {
        match link {
            None => self.end::<L>(None),
            Some(link) => {
                let mut wire = self.wire(link);
                let ready = self.greet_again(&mut wire);
                self.end(ready.is_ok().then_some(&mut wire))
            }
        }
    }

    /// Goes on with the session on a new link. Returns the target's state and the record that is due.
    fn greet_again<L: Read + Write>(&self, wire: &mut Wire<'_, L>) -> Result<(TargetState, u64)> {
        self.resume_on(wire)?;
        let (kind, index, payload) = wire.receive()?;
        let (state, challenge) = TargetState::parse_ready(expected(kind, payload, Kind::Ready)?)?;
        self.bind(wire, &challenge);
        Ok((state, index))
    }

    fn end<L: Read + Write>(&mut self, wire: Option<&mut Wire<'_, L>>) -> Result<()> {
        match self.phase {
            Phase::Committed | Phase::PostCopy | Phase::Done | Phase::Cancelled | Phase::Lost => {
                return Err(MigrateError::WrongPhase);
            }
            Phase::New => {}
            Phase::Copying | Phase::Stopped | Phase::Prepared => {
                at("SEND_CANCEL", self.source.send_cancel())?;
                if self.phase != Phase::Copying {
                    self.source.go_on();
                }
            }
        }
        self.phase = Phase::Cancelled;
        if let Some(wire) = wire {
            // Told or not, the guest is the source's.
            let _ = wire.send(Kind::Cancel, self.next, &[]);
            let _ = wire.flush();
        }
        Ok(())
    }
}

/// One link's part of a session.
struct Run<'s, S> {
    sender: &'s mut Sender<S>,
    /// Bytes on earlier links.
    before: u64,
}

impl<S: MigrateSource> Run<'_, S> {
    fn all<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        let state = if self.sender.phase == Phase::New {
            self.begin(wire)?
        } else {
            self.resume(wire)?
        };
        match state {
            TargetState::Receiving if self.sender.phase < Phase::Committed => {
                self.copy(wire, watch)?;
                self.prepare(wire)?;
            }
            TargetState::Prepared => self.prepared()?,
            // It was told, and only the answer was lost.
            TargetState::Owner if self.sender.phase == Phase::Committed => {}
            // It cannot have run ahead of what it was told, nor fallen back.
            _ => return Err(ProtocolError::Field("state of the target").into()),
        }
        self.report(wire, watch)?;
        if self.sender.phase == Phase::Prepared {
            at("SEND_FINISH", self.sender.source.send_finish())?;
            self.sender.phase = Phase::Committed;
            // Too late to cancel: the answer does not matter.
            let _ = self.report(wire, watch);
        }
        self.commit(wire)?;
        self.sender.phase = Phase::Done;
        let _ = self.report(wire, watch);
        Ok(())
    }

    fn begin<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<TargetState> {
        let sender = &mut *self.sender;
        let shape = at("shape of the guest", sender.source.shape())?;
        let hello = record::hello(&sender.session, sender.links, &shape)?;
        wire.send(Kind::Hello, 0, &[&hello])?;
        sender.bind(wire, &[0; 24]);
        wire.flush()?;
        let (challenge, certs) = record::parse_offer(expect(wire, Kind::Offer, 0)?)?;
        sender.bind(wire, &challenge);
        let start = at("SEND_START", sender.source.send_start(&certs))?;
        sender.phase = Phase::Copying;
        sender.pending.insert_all();
        wire.send(Kind::Start, 0, &[&record::start(&start)])?;
        wire.flush()?;
        Ok(TargetState::parse_ready(expect(wire, Kind::Ready, 0)?)?.0)
    }

    /// Asks for the target's state and takes up the records that it does not have.
    fn resume<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<TargetState> {
        let sender = &mut *self.sender;
        let (state, index) = sender.greet_again(wire)?;
        let first = sender.next - sender.unconfirmed.len() as u64;
        let has = index.checked_sub(first).filter(|_| index <= sender.next);
        let Some(has) = has else {
            let due = sender.next;
            return Err(ProtocolError::Index { due, got: index }.into());
        };
        for lost in sender.unconfirmed.drain(..).skip(has as usize) {
            if let Unconfirmed::Frame(gfn) = lost {
                sender.pending.insert(gfn);
            }
        }
        sender.next = index;
        if state == TargetState::Receiving {
            sender.closing = false;
        }
        Ok(state)
    }

    fn copy<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        loop {
            let sender = &mut *self.sender;
            if sender.phase == Phase::Copying {
                let follows = at("dirty log", sender.source.take_dirty(&mut sender.pending))?;
                let last = sender.round >= sender.limits.rounds
                    || (sender.round > 0 && sender.pending.len() <= sender.limits.pages_left);
                if last || !follows {
                    at("stop of the guest", sender.source.stop())?;
                    sender.phase = Phase::Stopped;
                    at("dirty log", sender.source.take_dirty(&mut sender.pending))?;
                }
            }
            self.round(wire, watch)?;
            if self.sender.phase == Phase::Stopped {
                return Ok(());
            }
            self.sender.round += 1;
        }
    }

    fn round<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        self.report(wire, watch)?;
        while let Some(gfn) = self.sender.pending.pop_first() {
            if let Err(error) = self.frame(wire, gfn) {
                self.sender.pending.insert(gfn);
                return Err(error);
            }
            if self.sender.pages.is_multiple_of(PAGES_BETWEEN_REPORTS) {
                self.report(wire, watch)?;
            }
        }
        let sender = &mut *self.sender;
        wire.send(Kind::RoundEnd, sender.next, &[&sender.round.to_le_bytes()])?;
        wire.flush()?;
        expect(wire, Kind::RoundOk, sender.next)?;
        sender.unconfirmed.clear();
        self.report(wire, watch)
    }

    /// Packs and sends one frame. The record counts as sent before the link is asked, because a
    /// link that fails may have carried it.
    fn frame<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>, gfn: Gfn) -> Result<()> {
        let sender = &mut *self.sender;
        let packed = sender.source.frame(gfn, &mut sender.packet);
        let content = at("SEND_UPDATE_DATA", packed)?;
        let (number, index) = (gfn.get().to_le_bytes(), sender.next);
        sender.unconfirmed.push(Unconfirmed::Frame(gfn));
        sender.next += 1;
        sender.pages += 1;
        let Packet { header, data } = &*sender.packet;
        match content {
            FrameContent::Private => wire.send(Kind::Private, index, &[&number, header, data])?,
            FrameContent::Shared if data.iter().all(|byte| *byte == 0) => {
                wire.send(Kind::Shared, index, &[&number])?;
            }
            FrameContent::Shared => wire.send(Kind::Shared, index, &[&number, data])?,
            FrameContent::Absent => wire.send(Kind::Absent, index, &[&number])?,
        }
        Ok(())
    }

    fn prepare<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        let sender = &mut *self.sender;
        let vcpus = at("shape of the guest", sender.source.shape())?.vcpus;
        for vcpu in 0..vcpus {
            let packed = sender.source.vcpu(VcpuId(vcpu), &mut sender.packet);
            let content = at("SEND_UPDATE_VMSA", packed)?;
            let head = record::vcpu_head(vcpu, content);
            let Packet { header, data } = &*sender.packet;
            let index = sender.next;
            sender.unconfirmed.push(Unconfirmed::Vcpu);
            sender.next += 1;
            match content {
                VcpuContent::Clear(len) => {
                    let clear = data.get(..len).unwrap_or(data);
                    wire.send(Kind::Vcpu, index, &[&head, clear])?;
                }
                VcpuContent::Vmsa => wire.send(Kind::Vcpu, index, &[&head, header, data])?,
            }
        }
        sender.closing = true;
        wire.send(Kind::Prepare, sender.next, &[])?;
        wire.flush()?;
        expect(wire, Kind::Prepared, sender.next)?;
        self.prepared()
    }

    /// The target has everything. Only a stopped guest can have been prepared.
    fn prepared(&mut self) -> Result<()> {
        let sender = &mut *self.sender;
        if !sender.closing {
            return Err(ProtocolError::Field("state of the target").into());
        }
        sender.unconfirmed.clear();
        sender.phase = sender.phase.max(Phase::Prepared);
        Ok(())
    }

    fn commit<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        wire.send(Kind::Commit, self.sender.next, &[])?;
        wire.flush()?;
        expect(wire, Kind::Done, self.sender.next)?;
        Ok(())
    }

    fn report<L: Read + Write>(
        &mut self,
        wire: &Wire<'_, L>,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        self.sender.bytes = self.before + wire.bytes;
        match watch(&self.sender.progress()) {
            Flow::Cancel if self.sender.phase < Phase::Committed => Err(MigrateError::Cancelled),
            _ => Ok(()),
        }
    }
}

/// The payload of the record that is due.
fn expect<'w, L: Read + Write>(
    wire: &'w mut Wire<'_, L>,
    due: Kind,
    index: u64,
) -> Result<&'w [u8]> {
    let (kind, got, payload) = wire.receive()?;
    let payload = expected(kind, payload, due)?;
    if got != index {
        return Err(ProtocolError::Index { due: index, got }.into());
    }
    Ok(payload)
}

/// A target may refuse in place of any answer.
fn expected(kind: Kind, payload: &[u8], due: Kind) -> Result<&[u8]> {
    match kind {
        Kind::Refuse => Err(MigrateError::Refused(Refusal::decode(payload)?)),
        kind if kind == due => Ok(payload),
        kind => Err(ProtocolError::Unexpected(kind as u8).into()),
    }
}
