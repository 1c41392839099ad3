//! The end that a TD comes to.

use alloc::boxed::Box;

use embedded_io::{Read, Write};
use kvm_ops::Host;
use kvm_ops_wire::{
    Challenge, Direction, Flow, MigrateError, Phase, Progress, ProtocolError, Refusal, Seal,
    StreamKey, TargetState, next_challenge,
};

use super::bundle::Bundle;
use super::incoming::Incoming;
use super::post_copy::Following;
use super::record::{Kind, SessionId, Wire};
use super::threads::{OneThread, Threads};

type Result<T> = core::result::Result<T, MigrateError>;

/// Bounds of a session, which a sender cannot exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveLimits {
    /// The most times that each page may come, on average. A turn of a post-copy that brings no page counts as one too, so a
    /// source cannot keep the target waiting for ever by turns.
    pub times: u32,
}

impl Default for ReceiveLimits {
    /// 64 times.
    fn default() -> Self {
        Self { times: 64 }
    }
}

/// Records that may still come; one with pages counts as many, and each turn of a post-copy as one.
#[derive(Default)]
pub(super) struct Budget(u64);

impl Budget {
    pub(super) const fn of(records: u64) -> Self {
        Self(records)
    }

    pub(super) fn spend(&mut self, records: u64) -> Result<()> {
        let left = self.0.checked_sub(records);
        self.0 = left.ok_or(ProtocolError::TooManyRecords)?;
        Ok(())
    }
}

/// Takes a TD from a [`Sender`](super::Sender).
///
/// [`run`](Self::run) serves one link. Where that breaks, `run` with a new link goes on. Until everything but
/// the start token came, any other failure ends the migration: the source runs the TD on, and this VM is
/// destroyed.
///
/// A guest whose pages follow it ([`with_post_copy`](Self::with_post_copy)) runs here from [`Phase::PostCopy`] on.
/// After any error but its loss `run` with a new link goes on; a receiver that is dropped then loses the guest.
pub struct Receiver<'a, H: Host> {
    pub(super) target: Incoming<'a, H>,
    pub(super) limits: ReceiveLimits,
    pub(super) key: Option<StreamKey>,
    pub(super) challenge: Challenge,
    pub(super) session: Option<SessionId>,
    pub(super) phase: Phase,
    /// It failed before it was prepared, otherwise than by its link.
    pub(super) failed: bool,
    /// The record that is due.
    pub(super) next: u64,
    pub(super) budget: Budget,
    pub(super) round: u32,
    pub(super) bytes: u64,
    pub(super) threads: Box<dyn Threads + 'a>,
    pub(super) following: Following,
    /// The abort token, for a source that asks again.
    pub(super) returned: Option<Bundle>,
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
            failed: false,
            next: 0,
            budget: Budget::default(),
            round: 0,
            bytes: 0,
            threads: Box::new(OneThread),
            following: Following::default(),
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

    /// Takes the bundles of the streams on these threads, instead of all on the one that calls
    /// [`run`](Self::run).
    #[must_use]
    pub fn with_threads(mut self, threads: Box<dyn Threads + 'a>) -> Self {
        self.threads = threads;
        self
    }

    /// Takes also a guest that comes before its pages. Once the watcher of [`run`](Self::run) sees
    /// [`Phase::PostCopy`], its vCPUs may be created and run, on other threads: they wait in
    /// [`vcpu_run`](kvm_ops::VcpuOps::vcpu_run) for pages that `run` takes.
    #[must_use]
    pub fn with_post_copy(mut self) -> Self {
        self.following.offered = true;
        self
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        let mut progress = progress(&self.target, self.phase, self.round, self.bytes);
        self.following.fill_in(&mut progress);
        progress
    }

    /// Returns whether the session may go on over a new link; of a lost guest the source only hears that it is.
    pub const fn can_go_on(&self) -> bool {
        match self.phase {
            Phase::New | Phase::Prepared | Phase::Committed => true,
            Phase::PostCopy | Phase::Done | Phase::Lost => true,
            Phase::Copying => !self.failed,
            _ => self.returned.is_some(),
        }
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
            if let Some(why) = self.loss(&error) {
                let _ = self.send_lost(&mut wire, &why);
            } else if !error.is_of_the_link() && error != MigrateError::Cancelled {
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
    /// [`MigrateError::WrongPhase`] once the guest is this end's or runs here; the error of TDH.IMPORT.ABORT.
    pub fn give_back(&mut self) -> Result<()> {
        if matches!(self.phase, Phase::PostCopy | Phase::Done | Phase::Lost) {
            return Err(MigrateError::WrongPhase);
        }
        let token = MigrateError::at("TDH.IMPORT.ABORT", self.target.abort())?;
        self.returned = Some(token);
        self.phase = Phase::Cancelled;
        Ok(())
    }

    pub(super) fn state(&self) -> TargetState {
        match self.phase {
            Phase::Done => TargetState::Owner,
            Phase::PostCopy => TargetState::Running,
            Phase::Prepared | Phase::Committed => TargetState::Prepared,
            _ => TargetState::Receiving,
        }
    }
}

pub(super) fn progress<H: Host>(
    target: &Incoming<'_, H>,
    phase: Phase,
    round: u32,
    bytes: u64,
) -> Progress {
    let mut progress = Progress::new(phase);
    progress.round = round;
    progress.pages = target.pages();
    progress.bytes = bytes;
    progress
}
