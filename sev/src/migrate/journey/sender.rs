//! The end that a guest leaves.

use alloc::vec;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Host, Level, PAGE_SIZE};
use kvm_ops_wire::{
    Challenge, Direction, Flow, MigrateError, Owner, Phase, Progress, ProtocolError, Refusal, Seal,
    StreamKey, TargetState, Wire,
};

use super::frames::Kind;
use super::{PAGES_BETWEEN_REPORTS, PART, SessionId, encode_shape, shape};
use crate::migrate::{MigrationAgent, SnpImage};
use crate::{SevVm, SwapSlot, SwapStore};

type Result<T> = core::result::Result<T, MigrateError>;

/// Sends a stopped SNP guest to a [`SnpReceiver`](super::SnpReceiver).
///
/// [`run`](Self::run) serves one link. The guest runs until the target has said that it fits, and is stopped then: it stays
/// stopped when a link breaks, and `run` over another one goes on with the record that is due, until [`cancel`](Self::cancel)
/// lets it run on here. Dropped before the guest is given up, the VM is one that [departed](SevVm::depart) and that
/// [`resume`](SevVm::resume) brings back from the same store.
pub struct SnpSender<'a, H: Host> {
    vm: &'a SevVm<H>,
    store: &'a mut (dyn SwapStore + Send),
    key: StreamKey,
    session: SessionId,
    /// Links so far.
    links: u64,
    phase: Phase,
    load: Option<Load>,
    pages: u64,
    bytes: u64,
}

/// What is to be sent of a guest that departed: records of its image, then one for each page.
struct Load {
    image: Vec<u8>,
    pages: Vec<(SwapSlot, Level)>,
}

impl Load {
    fn of(image: &SnpImage) -> Self {
        Self {
            image: image.encode(),
            pages: image.pages(),
        }
    }

    fn parts(&self) -> usize {
        self.image.len().div_ceil(PART)
    }

    fn records(&self) -> u64 {
        (self.parts() + self.pages.len()) as u64
    }

    /// Pages of 4 KiB that the records from this one on have.
    fn left(&self, due: u64) -> u64 {
        let first = (due as usize).saturating_sub(self.parts());
        let left = self.pages.iter().skip(first);
        left.map(|(_, level)| level.frames()).sum()
    }
}

impl<'a, H: Host> SnpSender<'a, H> {
    /// A guest that can be sent. `store` keeps its pages until the target runs it; `key` is the one that the migration agents agreed
    /// on; `random` fills 16 bytes with random numbers of the host, the name of the session.
    ///
    /// # Errors
    /// `random`'s.
    pub fn new(
        vm: &'a SevVm<H>,
        store: &'a mut (dyn SwapStore + Send),
        key: StreamKey,
        random: &mut dyn FnMut(&mut [u8]) -> kvm_ops::Result<()>,
    ) -> Result<Self> {
        let mut session = [0; 16];
        MigrateError::at("name of the session", random(&mut session))?;
        Ok(Self {
            vm,
            store,
            key,
            session,
            links: 0,
            phase: Phase::New,
            load: None,
            pages: 0,
            bytes: 0,
        })
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        let mut progress = Progress::new(self.phase);
        progress.pages = self.pages;
        progress.bytes = self.bytes;
        progress
    }

    /// Sends over a link: begins a session, or goes on with the one under way.
    ///
    /// # Errors
    /// See [`MigrateError`]; the guest is the source's unless the phase is [`Committed`](Phase::Committed). After an error that
    /// [can go on](MigrateError::can_go_on) another link may take the place of this one; after any other the guest can only be
    /// [taken back](Self::cancel), unless it was given up: then the target is to be asked over another link.
    /// [`MigrateError::Cancelled`] if the watcher cancelled: the guest runs on here.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        agent: &mut dyn MigrationAgent,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        let ended = matches!(self.phase, Phase::Done | Phase::Cancelled);
        // It departed in part alone.
        let is_half_out = self.phase == Phase::Stopped && self.load.is_none();
        if ended || is_half_out {
            return Err(MigrateError::WrongPhase);
        }
        let before = self.bytes;
        let mut wire = self.wire(link);
        let sent = self.all(&mut wire, before, agent, watch);
        self.bytes = before + wire.bytes;
        match sent {
            Ok(()) => Ok(self.progress()),
            Err(MigrateError::Cancelled) => {
                self.take_back(Some(&mut wire))?;
                Err(MigrateError::Cancelled)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the guest back: it runs on here. With a link the target hears of it.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] once the guest is given up; the error of [`SevVm::resume`], after which it may be called
    /// again. A target that cannot be reached is no error.
    pub fn cancel<L: Read + Write>(&mut self, link: Option<&mut L>) -> Result<()> {
        match link {
            None => self.take_back::<L>(None),
            Some(link) => {
                let mut wire = self.wire(link);
                let ready = self.greet_again(&mut wire);
                self.take_back(ready.is_ok().then_some(&mut wire))
            }
        }
    }

    fn wire<'l, L: Read + Write>(&mut self, link: &'l mut L) -> Wire<'l, L, Kind> {
        self.links += 1;
        Wire::new(link, Direction::ToTarget, Seal::new(Some(&self.key)))
    }

    fn take_back<L: Read + Write>(&mut self, wire: Option<&mut Wire<'_, L, Kind>>) -> Result<()> {
        if self.phase.owner() == Owner::Target || self.phase == Phase::Cancelled {
            return Err(MigrateError::WrongPhase);
        }
        if self.phase != Phase::New {
            MigrateError::at("resume", self.vm.resume(self.store))?;
        }
        self.phase = Phase::Cancelled;
        if let Some(wire) = wire {
            // Told or not, the guest is the source's.
            let _ = wire.send(Kind::Cancel, 0, &[]);
            let _ = wire.flush();
        }
        Ok(())
    }

    fn all<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L, Kind>,
        before: u64,
        agent: &mut dyn MigrationAgent,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        let (state, due) = match self.phase {
            Phase::New => self.greet(wire)?,
            _ => self.greet_again(wire)?,
        };
        if self.phase == Phase::New {
            self.phase = Phase::Stopped;
            self.watched(watch, 0)?;
            let image = MigrateError::at("depart", self.vm.depart(self.store, agent))?;
            self.load = Some(Load::of(&image));
            self.watched(watch, 0)?;
        }
        match (state, self.phase) {
            (TargetState::Receiving, Phase::Stopped) => {
                let sent = self.send_from(wire, due, before, watch)?;
                answered(wire, (Kind::Prepare, sent), Kind::Prepared)?;
                self.phase = Phase::Prepared;
            }
            (TargetState::Prepared, Phase::Stopped | Phase::Prepared) => {
                self.phase = Phase::Prepared;
            }
            (TargetState::Prepared, Phase::Committed) => {}
            // It was told, and only the answer was lost.
            (TargetState::Owner, Phase::Committed) => {
                self.phase = Phase::Done;
                return Ok(());
            }
            // It cannot have run ahead of what it was told, nor fallen back.
            _ => return Err(ProtocolError::Field("state of the target").into()),
        }
        if self.phase == Phase::Prepared {
            self.watched(watch, 0)?;
            MigrateError::at("hand_off", self.vm.hand_off())?;
            self.phase = Phase::Committed;
            // Too late to cancel: the answer does not matter.
            let _ = self.watched(watch, 0);
        }
        answered(wire, (Kind::Commit, 0), Kind::Done)?;
        self.phase = Phase::Done;
        let _ = self.watched(watch, 0);
        Ok(())
    }

    fn watched(&self, watch: &mut dyn FnMut(&Progress) -> Flow, left: u64) -> Result<()> {
        let mut progress = self.progress();
        progress.left = left;
        match watch(&progress) {
            Flow::GoOn => Ok(()),
            Flow::Cancel => Err(MigrateError::Cancelled),
        }
    }

    /// Sends the records from this one on, and returns how many there are.
    fn send_from<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L, Kind>,
        due: u64,
        before: u64,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<u64> {
        let load = self.load.take().ok_or(MigrateError::WrongPhase)?;
        let sent = self.send_load(wire, &load, due, before, watch);
        let records = load.records();
        self.load = Some(load);
        sent.map(|()| records)
    }

    fn send_load<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L, Kind>,
        load: &Load,
        due: u64,
        before: u64,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        if due > load.records() {
            let (due, got) = (load.records(), due);
            return Err(ProtocolError::Index { due, got }.into());
        }
        let parts = (0..).zip(load.image.chunks(PART));
        for (index, part) in parts.skip_while(|(index, _)| *index < due) {
            let kind = match index + 1 == load.parts() as u64 {
                true => Kind::ImageEnd,
                false => Kind::Image,
            };
            wire.send(kind, index, &[part])?;
        }
        let mut left = load.left(due);
        let mut contents = vec![0; PAGE_SIZE as usize];
        let mut reported = self.pages;
        let pages = (load.parts() as u64..).zip(&load.pages);
        for (index, (slot, level)) in pages.skip_while(|(index, _)| *index < due) {
            contents.resize(level.bytes() as usize, 0);
            let read = self.store.get(*slot, &mut contents);
            MigrateError::at("a page of the store", read)?;
            wire.send(Kind::Page, index, &[&contents])?;
            self.pages += level.frames();
            self.bytes = before + wire.bytes;
            left -= level.frames();
            if self.pages - reported >= PAGES_BETWEEN_REPORTS {
                reported = self.pages;
                self.watched(watch, left)?;
            }
        }
        Ok(())
    }

    fn bind<L: Read + Write>(&self, wire: &mut Wire<'_, L, Kind>, challenge: &Challenge) {
        wire.seal.bind(&self.session, self.links, challenge);
    }

    /// Begins the session. Returns the target's state and the record that is due.
    fn greet<L: Read + Write>(&self, wire: &mut Wire<'_, L, Kind>) -> Result<(TargetState, u64)> {
        let (vcpus, memory) = MigrateError::at("shape of the guest", shape(self.vm))?;
        self.greeted(wire, Kind::Hello, &encode_shape(vcpus, &memory))
    }

    /// Goes on with the session over another link.
    fn greet_again<L: Read + Write>(
        &self,
        wire: &mut Wire<'_, L, Kind>,
    ) -> Result<(TargetState, u64)> {
        self.greeted(wire, Kind::Resume, &[])
    }

    fn greeted<L: Read + Write>(
        &self,
        wire: &mut Wire<'_, L, Kind>,
        kind: Kind,
        shape: &[u8],
    ) -> Result<(TargetState, u64)> {
        let link = self.links.to_le_bytes();
        wire.send(kind, 0, &[&self.session, &link, shape])?;
        self.bind(wire, &[0; 24]);
        wire.flush()?;
        let (kind, due, payload) = wire.receive()?;
        let (state, challenge) = TargetState::parse_ready(expected(kind, payload, Kind::Ready)?)?;
        self.bind(wire, &challenge);
        Ok((state, due))
    }
}

/// Sends a record without contents, and takes the answer to it.
fn answered<L: Read + Write>(
    wire: &mut Wire<'_, L, Kind>,
    (question, index): (Kind, u64),
    answer: Kind,
) -> Result<()> {
    wire.send(question, index, &[])?;
    wire.flush()?;
    let (kind, _, payload) = wire.receive()?;
    expected(kind, payload, answer).map(drop)
}

/// The payload of a record that is due; the reason of a refusal.
fn expected(kind: Kind, payload: &[u8], due: Kind) -> Result<&[u8]> {
    match kind {
        Kind::Refuse => Err(MigrateError::Refused(Refusal::decode(payload)?)),
        kind if kind == due => Ok(payload),
        kind => Err(ProtocolError::Unexpected(kind as u8).into()),
    }
}
