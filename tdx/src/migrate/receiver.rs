//! The end that a TD comes to.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Host, VcpuId};
use kvm_ops_wire::{
    Challenge, Direction, Flow, MigrateError, Phase, Progress, ProtocolError, Refusal, Seal,
    StreamKey, TargetState, next_challenge,
};

use super::ExitState;
use super::bundle::{Bundle, BundleKind};
use super::incoming::Incoming;
use super::record::{self, Kind, SessionId, Wire};

type Result<T> = core::result::Result<T, MigrateError>;

/// Bounds of a session, which a sender cannot exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveLimits {
    /// The most times that each page may come, on average.
    pub times: u32,
}

impl Default for ReceiveLimits {
    /// 64 times.
    fn default() -> Self {
        Self { times: 64 }
    }
}

/// Takes a TD from a [`Sender`](super::Sender).
///
/// [`run`](Self::run) serves one link. Until everything but the start token came, a link that fails ends
/// the migration: the source runs the TD on, and this VM is destroyed. From then on `run` with a new link
/// goes on, because the source cannot tell who has the guest.
pub struct Receiver<'a, H: Host> {
    target: Incoming<'a, H>,
    limits: ReceiveLimits,
    key: Option<StreamKey>,
    challenge: Challenge,
    session: Option<SessionId>,
    phase: Phase,
    /// The record that is due.
    next: u64,
    /// Bundles and shared frames that may still come.
    budget: u64,
    round: u32,
    bytes: u64,
    exit_states: BTreeMap<VcpuId, ExitState>,
    /// The abort token, for a source that asks again.
    returned: Option<Bundle>,
}

impl<'a, H: Host> Receiver<'a, H> {
    /// A receiver that waits for a TD.
    pub fn new(target: Incoming<'a, H>) -> Self {
        Self {
            target,
            limits: ReceiveLimits::default(),
            key: None,
            challenge: [0; 24],
            session: None,
            phase: Phase::New,
            next: 0,
            budget: 0,
            round: 0,
            bytes: 0,
            exit_states: BTreeMap::new(),
            returned: None,
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
        progress.pages = self.target.pages();
        progress.bytes = self.bytes;
        progress
    }

    /// What the source's host owed to a vCPU, for
    /// [`TdxVcpu::set_exit_state`](crate::TdxVcpu::set_exit_state).
    pub fn exit_state(&self, vcpu: VcpuId) -> Option<ExitState> {
        self.exit_states.get(&vcpu).copied()
    }

    /// Returns whether the session may go on over a new link.
    pub const fn can_go_on(&self) -> bool {
        matches!(
            self.phase,
            Phase::New | Phase::Prepared | Phase::Committed | Phase::Done
        ) || self.returned.is_some()
    }

    /// Serves a link until the TD is this end's, the source cancels, or the link fails.
    ///
    /// # Errors
    /// [`MigrateError::Cancelled`] if the sender or the watcher cancelled; else see
    /// [`MigrateError`]. The peer gets the reason if the link still carries it.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        if !self.can_go_on() {
            return Err(MigrateError::WrongPhase);
        }
        next_challenge(&mut self.challenge);
        let mut wire = Wire::new(link, Direction::ToSource, Seal::new(self.key.as_ref()));
        let before = self.bytes;
        let ended = self.serve(&mut wire, before, watch);
        self.bytes = before + wire.bytes;
        if let Err(error) = ended {
            let silent = matches!(
                error,
                MigrateError::Link(_) | MigrateError::Truncated | MigrateError::Cancelled
            );
            if !silent {
                let refusal = Refusal::of(&error).encode();
                let _ = wire.send(Kind::Refuse, self.next, &[&refusal]);
                let _ = wire.flush();
            }
            return Err(error);
        }
        Ok(self.progress())
    }

    /// Gives the guest up, also after the start token: the source runs it again when it asks.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] once the guest is this end's; the error of TDH.IMPORT.ABORT.
    pub fn give_back(&mut self) -> Result<()> {
        if self.phase == Phase::Done {
            return Err(MigrateError::WrongPhase);
        }
        let token = MigrateError::at("TDH.IMPORT.ABORT", self.target.abort())?;
        self.returned = Some(token);
        self.phase = Phase::Cancelled;
        Ok(())
    }

    fn state(&self) -> TargetState {
        match self.phase {
            Phase::Done => TargetState::Owner,
            Phase::Prepared | Phase::Committed => TargetState::Prepared,
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
        if self.returned.is_some() {
            return Err(MigrateError::Cancelled);
        }
        if self.phase == Phase::Done {
            return Ok(());
        }
        loop {
            let (kind, index, payload) = wire.receive()?;
            if index != self.next {
                let due = self.next;
                return Err(ProtocolError::Index { due, got: index }.into());
            }
            let answer = match kind {
                Kind::Start => {
                    let token = record::parse_bundle(payload)?;
                    return self.start(wire, &token);
                }
                Kind::Cancel => {
                    self.phase = Phase::Cancelled;
                    return Err(MigrateError::Cancelled);
                }
                kind => self.take(kind, payload)?,
            };
            self.next += 1;
            if let Some(answer) = answer {
                wire.send(answer, self.next, &[])?;
                wire.flush()?;
            }
            self.bytes = before + wire.bytes;
            if watch(&self.progress()) == Flow::Cancel && self.phase < Phase::Prepared {
                self.phase = Phase::Cancelled;
                return Err(MigrateError::Cancelled);
            }
        }
    }

    fn greet<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        let (kind, _, payload) = wire.receive()?;
        let (id, link) = record::parse_session(payload)?;
        match (kind, self.session) {
            (Kind::Hello, None) => {
                let shape = record::parse_hello(payload)?;
                wire.seal.bind(&id, link, &[0; 24]);
                MigrateError::at("shape of the guest", self.target.accept(&shape))?;
                let each = shape.layout.frames().saturating_add(shape.vcpus.into());
                self.budget = each.saturating_mul(self.limits.times.into());
                self.session = Some(id);
                self.phase = Phase::Copying;
            }
            (Kind::Resume, Some(session)) if session == id => {
                wire.seal.bind(&id, link, &[0; 24]);
                if let Some(token) = &self.returned {
                    let mut bytes = Vec::new();
                    token.encode(&mut bytes);
                    wire.send(Kind::Returned, self.next, &[&bytes])?;
                    return Ok(wire.flush()?);
                }
            }
            (Kind::Hello | Kind::Resume, _) => {
                wire.seal.bind(&id, link, &[0; 24]);
                return Err(ProtocolError::Session.into());
            }
            (kind, _) => return Err(ProtocolError::Unexpected(kind as u8).into()),
        }
        let ready = self.state().ready(&self.challenge);
        wire.send(Kind::Ready, self.next, &[&ready])?;
        wire.flush()?;
        wire.seal.bind(&id, link, &self.challenge);
        Ok(())
    }

    /// Takes a record, and returns the answer that is due.
    fn take(&mut self, kind: Kind, payload: &[u8]) -> Result<Option<Kind>> {
        if self.phase != Phase::Copying {
            return Err(ProtocolError::Unexpected(kind as u8).into());
        }
        match kind {
            Kind::Bundle => {
                let bundle = record::parse_bundle(payload)?;
                if bundle.is_start_token() {
                    return Err(ProtocolError::Field("bundle").into());
                }
                // A bundle costs as many records as it has pages.
                self.spend(1 + bundle.guest_pages() as u64)?;
                let operation = operation(bundle.kind());
                MigrateError::at(operation, self.target.take(&bundle))?;
                Ok(None)
            }
            Kind::Shared => {
                self.spend(1)?;
                let (gfn, page) = record::parse_shared(payload)?;
                MigrateError::at("shared page", self.target.take_shared(gfn, page))?;
                Ok(None)
            }
            Kind::ExitState => {
                self.spend(1)?;
                let (vcpu, state) = record::parse_exit_state(payload)?;
                if !self.target.has_vcpu(vcpu) {
                    return Err(ProtocolError::Field("vCPU").into());
                }
                self.exit_states.insert(vcpu, state);
                Ok(None)
            }
            Kind::RoundEnd => {
                self.spend(1)?;
                self.round = self.round.saturating_add(1);
                Ok(Some(Kind::RoundOk))
            }
            Kind::Prepare => {
                self.phase = Phase::Prepared;
                Ok(Some(Kind::Prepared))
            }
            kind => Err(ProtocolError::Unexpected(kind as u8).into()),
        }
    }

    fn spend(&mut self, records: u64) -> Result<()> {
        self.budget = self
            .budget
            .checked_sub(records)
            .ok_or(ProtocolError::TooManyRecords)?;
        Ok(())
    }

    /// The start token came: the guest is this end's, or goes back with the abort token.
    fn start<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>, token: &Bundle) -> Result<()> {
        if !matches!(self.phase, Phase::Prepared | Phase::Committed) || !token.is_start_token() {
            return Err(ProtocolError::Unexpected(Kind::Start as u8).into());
        }
        let owned = self.own(token);
        if owned.is_ok() {
            wire.send(Kind::Done, self.next, &[])?;
            return Ok(wire.flush()?);
        }
        self.give_back()?;
        if let Some(token) = &self.returned {
            let mut bytes = Vec::new();
            token.encode(&mut bytes);
            wire.send(Kind::Returned, self.next, &[&bytes])?;
            wire.flush()?;
        }
        owned
    }

    fn own(&mut self, token: &Bundle) -> Result<()> {
        if self.phase == Phase::Prepared {
            MigrateError::at("TDH.IMPORT.TRACK", self.target.take(token))?;
            self.phase = Phase::Committed;
        }
        MigrateError::at("TDH.IMPORT.END", self.target.own())?;
        self.phase = Phase::Done;
        Ok(())
    }
}

/// The leaf that takes a bundle.
const fn operation(kind: BundleKind) -> &'static str {
    match kind {
        BundleKind::Immutable => "TDH.IMPORT.STATE.IMMUTABLE",
        BundleKind::TdState => "TDH.IMPORT.STATE.TD",
        BundleKind::VcpuState => "TDH.IMPORT.STATE.VP",
        BundleKind::Memory => "TDH.IMPORT.MEM",
        BundleKind::Token => "TDH.IMPORT.TRACK",
        BundleKind::AbortToken => "TDH.IMPORT.ABORT",
    }
}
