//! The end that a TD leaves.

use alloc::boxed::Box;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Error, Host, PAGE_SIZE, VcpuId};
use kvm_ops_wire::{
    Challenge, Direction, Flow, MigrateError, Phase, Progress, ProtocolError, Refusal, Seal,
    StreamKey, TargetState,
};

use super::ExitState;
use super::bundle::Bundle;
use super::outgoing::{Carried, Outgoing};
use super::record::{self, Kind, SessionId, Wire};

type Result<T> = core::result::Result<T, MigrateError>;

/// How long to copy while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendLimits {
    /// The most rounds before the guest is stopped; 0 stops it first.
    pub rounds: u32,
    /// The guest is stopped once no more pages than this are left.
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

/// Tells what the host owes to a vCPU ([`TdxVcpu::exit_state`](crate::TdxVcpu::exit_state)), once the TD
/// is stopped.
pub type ExitStates<'a> = Box<dyn FnMut(VcpuId) -> kvm_ops::Result<ExitState> + Send + 'a>;

/// Sends a TD to a [`Receiver`](super::Receiver).
///
/// [`run`](Self::run) does it over one link. Before the start token every failure, also of the link,
/// [aborts](Outgoing::abort): the TD runs on here. After it only the target knows who runs the TD;
/// `run` with a new link asks.
pub struct Sender<'a, H: Host> {
    source: Outgoing<'a, H>,
    limits: SendLimits,
    key: Option<StreamKey>,
    session: SessionId,
    links: u64,
    phase: Phase,
    exit_states: Option<ExitStates<'a>>,
    /// The start token, once it exists.
    token: Option<Bundle>,
    /// The number of the next record.
    next: u64,
    bytes: u64,
}

impl<'a, H: Host> Sender<'a, H> {
    /// Prepares to send. `random` fills 16 bytes with random numbers of the host, the name of the
    /// session.
    ///
    /// # Errors
    /// `random` fails.
    pub fn new(
        source: Outgoing<'a, H>,
        limits: SendLimits,
        random: &mut dyn FnMut(&mut [u8]) -> kvm_ops::Result<()>,
    ) -> Result<Self> {
        let mut session = [0; 16];
        MigrateError::at("name of the session", random(&mut session))?;
        Ok(Self {
            source,
            limits,
            key: None,
            session,
            links: 0,
            phase: Phase::New,
            exit_states: None,
            token: None,
            next: 0,
            bytes: 0,
        })
    }

    /// Authenticates every frame with this key, which the receiver must have too.
    #[must_use]
    pub fn with_key(mut self, key: StreamKey) -> Self {
        self.key = Some(key);
        self
    }

    /// Asks for what the host owes to each vCPU, so that the target can give it. Without, an exit that was
    /// not finished when the TD stopped is answered with zeros there.
    #[must_use]
    pub fn with_exit_states(mut self, states: ExitStates<'a>) -> Self {
        self.exit_states = Some(states);
        self
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        let mut progress = Progress::new(self.phase);
        let carried = self.source.carried();
        progress.round = carried.rounds;
        progress.pages = carried.pages;
        progress.left = match self.phase {
            Phase::Copying | Phase::Stopped => self.source.pages_left(),
            _ => 0,
        };
        progress.bytes = self.bytes;
        progress
    }

    /// The counts of the migration.
    pub fn carried(&self) -> Carried {
        self.source.carried()
    }

    /// Sends over a link, or asks over a new one what became of the TD.
    ///
    /// # Errors
    /// See [`MigrateError`]. The TD runs on here unless the phase is [`Phase::Committed`], where the
    /// target may run it: call again with a new link.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        if matches!(self.phase, Phase::Done | Phase::Cancelled) {
            return Err(MigrateError::WrongPhase);
        }
        self.links += 1;
        let mut wire = Wire::new(link, Direction::ToTarget, Seal::new(self.key.as_ref()));
        let before = self.bytes;
        let mut run = Run {
            sender: self,
            wire: &mut wire,
            before,
        };
        let ended = run.all(watch);
        if ended.is_err() && run.sender.phase < Phase::Committed {
            run.cancel()?;
        }
        self.bytes = before + wire.bytes;
        ended.map(|()| self.progress())
    }

    /// Gives the migration up before the start token: the TD runs on here.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] after it; the error of TDH.EXPORT.ABORT.
    pub fn cancel(&mut self) -> Result<()> {
        if self.phase >= Phase::Committed {
            return Err(MigrateError::WrongPhase);
        }
        MigrateError::at("TDH.EXPORT.ABORT", self.source.abort(None))?;
        self.phase = Phase::Cancelled;
        Ok(())
    }
}

/// One link's part of a session.
struct Run<'s, 'w, 'l, 'a, H: Host, L> {
    sender: &'s mut Sender<'a, H>,
    wire: &'w mut Wire<'l, L>,
    /// Bytes on earlier links.
    before: u64,
}

impl<H: Host, L: Read + Write> Run<'_, '_, '_, '_, H, L> {
    fn all(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        if self.sender.phase == Phase::Committed {
            return self.settle();
        }
        self.begin()?;
        self.copy(watch)?;
        self.stop(watch)?;
        self.prepare()?;
        self.report(watch)?;
        let token = MigrateError::at("TDH.EXPORT.TRACK", self.sender.source.start_token())?;
        self.sender.token = Some(token);
        self.sender.phase = Phase::Committed;
        // Too late to cancel: the answer does not matter.
        let _ = self.report(watch);
        self.start()?;
        let _ = self.report(watch);
        Ok(())
    }

    /// Tells the target, and gives the guest up, so that it runs on here.
    fn cancel(&mut self) -> Result<()> {
        self.sender.cancel()?;
        // Told or not, the guest is the source's.
        let _ = self.wire.send(Kind::Cancel, self.sender.next, &[]);
        let _ = self.wire.flush();
        Ok(())
    }

    fn bind(&mut self, challenge: &Challenge) {
        let Sender { session, links, .. } = &*self.sender;
        self.wire.seal.bind(session, *links, challenge);
    }

    fn begin(&mut self) -> Result<()> {
        let shape = MigrateError::at("shape of the guest", self.sender.source.shape())?;
        let hello = record::hello(&self.sender.session, self.sender.links, &shape);
        self.wire.send(Kind::Hello, 0, &[&hello])?;
        match self.greeted()? {
            TargetState::Receiving => {}
            _ => return Err(ProtocolError::Field("state of the target").into()),
        }
        let first = self.sender.source.begin();
        let first = MigrateError::at("TDH.EXPORT.STATE.IMMUTABLE", first)?;
        self.sender.phase = Phase::Copying;
        self.bundle(&first)
    }

    /// Takes the target's challenge for this link.
    fn greeted(&mut self) -> Result<TargetState> {
        self.bind(&[0; 24]);
        self.wire.flush()?;
        let (kind, _, payload) = self.wire.receive()?;
        let (state, challenge) = TargetState::parse_ready(expected(kind, payload, Kind::Ready)?)?;
        self.bind(&challenge);
        Ok(state)
    }

    /// Numbers and sends a record.
    fn send(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<()> {
        self.wire.send(kind, self.sender.next, parts)?;
        self.sender.next += 1;
        Ok(())
    }

    fn bundle(&mut self, bundle: &Bundle) -> Result<()> {
        self.send(Kind::Bundle, &[&bundle.encoded_head(), &bundle.pages])
    }

    /// Waits until the target has everything that was sent.
    fn confirmed(&mut self, say: Kind, payload: &[&[u8]], due: Kind) -> Result<()> {
        self.send(say, payload)?;
        self.wire.flush()?;
        let (kind, index, payload) = self.wire.receive()?;
        expected(kind, payload, due)?;
        match index == self.sender.next {
            true => Ok(()),
            false => Err(ProtocolError::Index {
                due: self.sender.next,
                got: index,
            }
            .into()),
        }
    }

    fn copy(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        let SendLimits { rounds, pages_left } = self.sender.limits;
        for _ in 0..rounds {
            self.round(watch)?;
            if self.sender.source.pages_left() <= pages_left {
                break;
            }
        }
        Ok(())
    }

    fn round(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        let streams = self.sender.source.streams();
        for stream in (0..streams).cycle() {
            self.report(watch)?;
            let bundle = self.sender.source.pages(stream);
            match MigrateError::at("TDH.EXPORT.MEM", bundle)? {
                Some(bundle) => self.bundle(&bundle)?,
                None => break,
            }
        }
        let token = MigrateError::at("TDH.EXPORT.TRACK", self.sender.source.end_round())?;
        self.bundle(&token)?;
        let round = self.sender.source.carried().rounds.to_le_bytes();
        self.confirmed(Kind::RoundEnd, &[&round], Kind::RoundOk)
    }

    fn stop(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        MigrateError::at("TDH.EXPORT.PAUSE", self.sender.source.stop())?;
        self.sender.phase = Phase::Stopped;
        while self.sender.source.pages_left() > 0 {
            self.round(watch)?;
        }
        Ok(())
    }

    /// State and shared memory: all that is left but the start token.
    fn prepare(&mut self) -> Result<()> {
        let mut page = [0; PAGE_SIZE as usize];
        for (first, pages) in self.sender.source.shared() {
            for gfn in (0..pages).filter_map(|n| first.checked_add(n)) {
                match self.sender.source.read_shared(gfn, &mut page) {
                    // Shared, but in no slot: nothing is there.
                    Err(Error::NotFound(..)) => continue,
                    read => MigrateError::at("shared page", read)?,
                }
                let number = gfn.get().to_le_bytes();
                match page.iter().all(|byte| *byte == 0) {
                    true => self.send(Kind::Shared, &[&number])?,
                    false => self.send(Kind::Shared, &[&number, &page])?,
                }
            }
        }
        let state = MigrateError::at("TDH.EXPORT.STATE.TD", self.sender.source.td_state())?;
        self.bundle(&state)?;
        for vcpu in self.sender.source.vcpus() {
            let state = self.sender.source.vcpu_state(vcpu, 0);
            self.bundle(&MigrateError::at("TDH.EXPORT.STATE.VP", state)?)?;
            if let Some(states) = &mut self.sender.exit_states {
                let state = MigrateError::at("exit state", states(vcpu))?.encode();
                self.send(Kind::ExitState, &[&vcpu.0.to_le_bytes(), &state])?;
            }
        }
        self.confirmed(Kind::Prepare, &[], Kind::Prepared)?;
        self.sender.phase = Phase::Prepared;
        Ok(())
    }

    /// After a broken link: asks who has the guest.
    fn settle(&mut self) -> Result<()> {
        let link = self.sender.links.to_le_bytes();
        let session = self.sender.session;
        self.wire.send(Kind::Resume, 0, &[&session, &link])?;
        self.bind(&[0; 24]);
        self.wire.flush()?;
        let (kind, _, payload) = self.wire.receive()?;
        if kind == Kind::Returned {
            let token = record::parse_bundle(payload)?;
            return self.returned(&token);
        }
        let (state, challenge) = TargetState::parse_ready(expected(kind, payload, Kind::Ready)?)?;
        self.bind(&challenge);
        match state {
            TargetState::Owner => self.done(),
            TargetState::Prepared => self.start(),
            TargetState::Receiving => Err(ProtocolError::Field("state of the target").into()),
        }
    }

    /// Sends the start token, and hears who has the guest.
    fn start(&mut self) -> Result<()> {
        let Some(token) = self.sender.token.clone() else {
            return Err(MigrateError::WrongPhase);
        };
        let mut bytes = Vec::new();
        token.encode(&mut bytes);
        self.wire.send(Kind::Start, self.sender.next, &[&bytes])?;
        self.wire.flush()?;
        let (kind, _, payload) = self.wire.receive()?;
        match kind {
            Kind::Returned => {
                let token = record::parse_bundle(payload)?;
                self.returned(&token)
            }
            kind => {
                expected(kind, payload, Kind::Done)?;
                self.done()
            }
        }
    }

    fn done(&mut self) -> Result<()> {
        MigrateError::at("end of the source", self.sender.source.leave())?;
        self.sender.phase = Phase::Done;
        Ok(())
    }

    /// The target gave the guest back.
    fn returned(&mut self, token: &Bundle) -> Result<()> {
        let aborted = self.sender.source.abort(Some(token));
        MigrateError::at("TDH.EXPORT.ABORT", aborted)?;
        self.sender.phase = Phase::Cancelled;
        Err(MigrateError::Refused(Refusal {
            reason: kvm_ops_wire::Reason::Host,
            status: 0,
        }))
    }

    fn report(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        self.sender.bytes = self.before + self.wire.bytes;
        match watch(&self.sender.progress()) {
            Flow::Cancel if self.sender.phase < Phase::Committed => Err(MigrateError::Cancelled),
            _ => Ok(()),
        }
    }
}

/// A target may refuse in place of any answer.
fn expected(kind: Kind, payload: &[u8], due: Kind) -> Result<&[u8]> {
    match kind {
        Kind::Refuse => Err(MigrateError::Refused(Refusal::decode(payload)?)),
        kind if kind == due => Ok(payload),
        kind => Err(ProtocolError::Unexpected(kind as u8).into()),
    }
}
