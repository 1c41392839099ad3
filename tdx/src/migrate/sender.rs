//! The end that a TD leaves.

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use embedded_io::{Read, Write};
use kvm_ops::{Host, VcpuId};
use kvm_ops_wire::{Direction, Flow, MigrateError, Phase, Progress, Seal, StreamKey};

use super::ExitState;
use super::bundle::Bundle;
use super::outgoing::{Carried, Outgoing};
use super::record::{SessionId, Wire};
use super::rest::Rest;
use super::sending::Sending;
use super::threads::{OneThread, Threads};
use super::unconfirmed::Unconfirmed;

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
/// [`run`](Self::run) does it over one link. Where that breaks, `run` with a new link goes on: what the
/// target has is not sent again. Before the start token every other failure [aborts](Outgoing::abort), as
/// [`cancel`](Self::cancel) does: the TD runs on here. After it only the target knows who runs the TD; `run`
/// with a new link asks.
///
/// A [post-copy](Self::with_post_copy) sends the start token before the pages that never travelled. From
/// [`Phase::PostCopy`] on the TD runs at its target, and `run` sends what it waits for, and the rest. After any
/// error but [`MigrateError::Lost`] it goes on over a new link; a sender that is dropped then loses the TD.
pub struct Sender<'a, H: Host> {
    pub(super) source: Outgoing<'a, H>,
    pub(super) limits: SendLimits,
    pub(super) key: Option<StreamKey>,
    pub(super) session: SessionId,
    pub(super) links: u64,
    pub(super) phase: Phase,
    /// The pages that never travelled follow the start token.
    pub(super) post_copy: bool,
    pub(super) exit_states: Option<ExitStates<'a>>,
    pub(super) threads: Box<dyn Threads + 'a>,
    /// The start token, once it exists.
    pub(super) token: Option<Bundle>,
    /// Rounds that may still be made while the guest runs.
    pub(super) rounds: u32,
    pub(super) sent: Unconfirmed,
    /// The steps that are left once all pages travelled; `None` before.
    pub(super) rest: Option<VecDeque<Rest>>,
    pub(super) bytes: u64,
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
            post_copy: false,
            exit_states: None,
            threads: Box::new(OneThread),
            token: None,
            rounds: limits.rounds,
            sent: Unconfirmed::default(),
            rest: None,
            bytes: 0,
        })
    }

    /// Authenticates every frame with this key, which the receiver must have too.
    #[must_use]
    pub fn with_key(mut self, key: StreamKey) -> Self {
        self.key = Some(key);
        self
    }

    /// Lets the TD run at its target before the pages come that never travelled: all of them after 0
    /// [rounds](SendLimits::rounds). Pages that were sent and written again travel while the TD is stopped, because
    /// the module demands it. The receiver must [offer](super::Receiver::with_post_copy) it.
    #[must_use]
    pub fn with_post_copy(mut self) -> Self {
        self.post_copy = true;
        self
    }

    /// Asks here for what the host owes to each vCPU, so that the target can give it, and not
    /// [where the vCPUs keep it](Outgoing::exit_state) between two runs: for an embedder that stops its vCPUs with exits that it
    /// has not answered.
    #[must_use]
    pub fn with_exit_states(mut self, states: ExitStates<'a>) -> Self {
        self.exit_states = Some(states);
        self
    }

    /// Makes the bundles of the streams on these threads, instead of all on the one that calls
    /// [`run`](Self::run).
    #[must_use]
    pub fn with_threads(mut self, threads: Box<dyn Threads + 'a>) -> Self {
        self.threads = threads;
        self
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        progress(&self.source, self.phase, self.bytes)
    }

    /// The counts of the migration.
    pub fn carried(&self) -> Carried {
        self.source.carried()
    }

    /// Sends over a link, goes on over a new one, or asks there what became of the TD.
    ///
    /// # Errors
    /// See [`MigrateError`]. After [`MigrateError::Link`] and [`MigrateError::Truncated`] call again with a
    /// new link, or [`cancel`](Self::cancel); a TD that was stopped is stopped until then. After all
    /// others the TD runs on here unless the phase is [`Phase::Committed`] or [`Phase::PostCopy`], where the target
    /// may run it or does: call again with a new link. [`MigrateError::Lost`] says that no end can run it.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        if matches!(self.phase, Phase::Done | Phase::Cancelled | Phase::Lost) {
            return Err(MigrateError::WrongPhase);
        }
        self.links += 1;
        let mut wire = Wire::new(link, Direction::ToTarget, Seal::new(self.key.as_ref()));
        let before = self.bytes;
        let mut run = Sending {
            sender: self,
            wire: &mut wire,
            before,
        };
        let ended = run.all(watch);
        let failed = ended.is_err_and(|error| !error.is_of_the_link());
        if failed && run.sender.phase < Phase::Committed {
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

pub(super) fn progress<H: Host>(source: &Outgoing<'_, H>, phase: Phase, bytes: u64) -> Progress {
    let mut progress = Progress::new(phase);
    let carried = source.carried();
    progress.round = carried.rounds;
    progress.pages = carried.pages;
    progress.left = match phase {
        Phase::Copying | Phase::Stopped | Phase::PostCopy => source.pages_left(),
        _ => 0,
    };
    progress.late = carried.pages_late;
    progress.on_demand = carried.pages_on_demand;
    progress.bytes = bytes;
    progress
}
