//! The end that a guest comes to.

use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Error, Field, Host, Level};
use kvm_ops_wire::{
    Challenge, Direction, Fields, Flow, Layout, MigrateError, Phase, Progress, ProtocolError,
    Reason, Refusal, Seal, StreamKey, TargetState, Wire, next_challenge,
};

use super::frames::Kind;
use super::{PAGES_BETWEEN_REPORTS, SessionId, image_limit, shape};
use crate::migrate::{MigrationAgent, SnpImage};
use crate::{SevVm, SwapSlot, SwapStore};

type Result<T> = core::result::Result<T, MigrateError>;

/// Takes an SNP guest from a [`SnpSender`](super::SnpSender), for a VM that is initialised and has the guest's slots and vCPUs.
///
/// [`run`](Self::run) serves one link, to the end of the journey or of the link; after an error that
/// [can go on](MigrateError::can_go_on) it serves another. It takes what fits what is due: each length, number and order is checked
/// before it is used, and the guest is put into memory only when all of it came.
///
/// The guest runs here once the source has said that it gave it up, and not before. Dropped when everything is here and that word
/// is missing, the VM is one whose guest never runs: only the teardown is left.
pub struct SnpReceiver<'a, H: Host> {
    vm: &'a SevVm<H>,
    store: &'a mut (dyn SwapStore + Send),
    key: StreamKey,
    challenge: Challenge,
    session: Option<Session>,
    phase: Phase,
    pages: u64,
    bytes: u64,
}

struct Session {
    id: SessionId,
    /// The most bytes of the image, and the most pages of 4 KiB that it may name.
    room: u64,
    most_pages: u64,
    /// The record that is due.
    due: u64,
    load: Load,
}

/// What came of the guest.
enum Load {
    /// Parts of the image.
    Image(Vec<u8>),
    /// The image, the pages that it names, and the number of those that came.
    Pages {
        image: SnpImage,
        pages: Vec<(SwapSlot, Level)>,
        came: usize,
    },
}

impl<'a, H: Host> SnpReceiver<'a, H> {
    /// A VM that waits for its guest. `store` keeps the pages until all came; `key` is the one that the migration agents agreed on;
    /// `nonce` is 16 random bytes, which keep the links of another session from being replayed.
    pub fn new(
        vm: &'a SevVm<H>,
        store: &'a mut (dyn SwapStore + Send),
        key: StreamKey,
        nonce: [u8; 16],
    ) -> Self {
        let mut challenge = [0; 24];
        challenge[..16].copy_from_slice(&nonce);
        Self {
            vm,
            store,
            key,
            challenge,
            session: None,
            phase: Phase::New,
            pages: 0,
            bytes: 0,
        }
    }

    /// The progress so far.
    pub fn progress(&self) -> Progress {
        let mut progress = Progress::new(self.phase);
        progress.pages = self.pages;
        progress.bytes = self.bytes;
        progress
    }

    /// Serves a link until the guest runs here, the source cancels, or the link fails. The watcher cancels as long as this end has
    /// not said that it is prepared.
    ///
    /// # Errors
    /// See [`MigrateError`]; the peer gets the reason if the link still carries it. [`MigrateError::Cancelled`] if the source or the
    /// watcher cancelled. The phase is [`Cancelled`](Phase::Cancelled) after that, and when the guest could not be put into
    /// memory: then this end takes no more. While it is [`Prepared`](Phase::Prepared) nobody but the source knows who has the
    /// guest.
    pub fn run<L: Read + Write>(
        &mut self,
        link: &mut L,
        agent: &mut dyn MigrationAgent,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Progress> {
        next_challenge(&mut self.challenge);
        let seal = Seal::new(Some(&self.key));
        let mut wire = Wire::new(link, Direction::ToSource, seal);
        let before = self.bytes;
        let served = self.serve(&mut wire, before, agent, watch);
        self.bytes = before + wire.bytes;
        let told = match served {
            Ok(()) => return Ok(self.progress()),
            // A refusal by the watcher.
            Err(MigrateError::Cancelled) if self.phase != Phase::Cancelled => {
                self.give_up();
                let (reason, status) = (Reason::Host, 0);
                Some(Refusal { reason, status })
            }
            Err(MigrateError::Cancelled) => None,
            Err(error) if error.is_of_the_link() => None,
            Err(MigrateError::Refused(refusal)) => Some(refusal),
            Err(error) => Some(Refusal::of(&error)),
        };
        if let Some(refusal) = told {
            // The error counts, told or not.
            let _ = wire.send(Kind::Refuse, 0, &[&refusal.encode()]);
            let _ = wire.flush();
        }
        served.map(|()| self.progress())
    }

    /// Runs a guest that is prepared here although its source never said that it gave it up.
    ///
    /// Only right when the source's machine is known not to run the guest any more and never will again (it is fenced): otherwise
    /// the guest runs twice.
    ///
    /// # Errors
    /// [`MigrateError::WrongPhase`] unless everything is here; the error of [`SevVm::resume`].
    pub fn take_over_from_fenced_source(&mut self) -> Result<()> {
        match self.phase {
            Phase::Prepared => self.own(),
            _ => Err(MigrateError::WrongPhase),
        }
    }

    /// The guest is this end's.
    fn own(&mut self) -> Result<()> {
        self.phase = Phase::Committed;
        MigrateError::at("resume", self.vm.resume(self.store))?;
        self.phase = Phase::Done;
        Ok(())
    }

    /// The guest is not this end's: it never runs here.
    fn give_up(&mut self) {
        if matches!(self.phase, Phase::Prepared | Phase::Committed) {
            // A VM that is poisoned already does not run it either.
            let _ = self.vm.hand_off();
        }
        self.session = None;
        self.phase = Phase::Cancelled;
    }

    fn serve<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L, Kind>,
        before: u64,
        agent: &mut dyn MigrationAgent,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        self.greet(wire)?;
        // A source that asks who has the guest has heard it.
        while self.phase != Phase::Done {
            let (kind, index, payload) = wire.receive()?;
            let mut is_to_report = true;
            match (self.phase, kind) {
                (phase, Kind::Cancel) if phase < Phase::Committed => {
                    self.give_up();
                    return Err(MigrateError::Cancelled);
                }
                (Phase::Stopped, Kind::Image | Kind::ImageEnd | Kind::Page) => {
                    let pages = self.pages;
                    self.take(kind, index, payload)?;
                    let every = PAGES_BETWEEN_REPORTS;
                    is_to_report = self.pages / every != pages / every;
                }
                (Phase::Stopped, Kind::Prepare) => {
                    self.require_due(index)?;
                    self.arrive(agent)?;
                    answer(wire, Kind::Prepared)?;
                }
                (Phase::Prepared | Phase::Committed, Kind::Commit) => {
                    self.own()?;
                    answer(wire, Kind::Done)?;
                }
                _ => return Err(ProtocolError::Unexpected(kind as u8).into()),
            }
            self.bytes = before + wire.bytes;
            // Once it said Prepared, only the source knows who has the guest.
            let is_too_late = self.phase >= Phase::Prepared;
            if is_to_report && watch(&self.progress()) == Flow::Cancel && !is_too_late {
                return Err(MigrateError::Cancelled);
            }
        }
        Ok(())
    }

    /// Takes the first record of a link: a new session, or the one under way.
    fn greet<L: Read + Write>(&mut self, wire: &mut Wire<'_, L, Kind>) -> Result<()> {
        let (kind, _, payload) = wire.receive()?;
        if !matches!(kind, Kind::Hello | Kind::Resume) {
            return Err(ProtocolError::Unexpected(kind as u8).into());
        }
        let mut fields = Fields::of(payload);
        let (id, link) = (fields.array()?, fields.u64()?);
        if kind == Kind::Hello {
            let (vcpus, memory) = (fields.u32()?, fields.layout()?);
            fields.end()?;
            wire.seal.bind(&id, link, &[0; 24]);
            self.begin(id, vcpus, &memory)?;
        } else {
            fields.end()?;
            wire.seal.bind(&id, link, &[0; 24]);
        }
        let session = self.session.as_ref().filter(|session| session.id == id);
        let due = session.ok_or(ProtocolError::Session)?.due;
        let state = match self.phase {
            Phase::Prepared | Phase::Committed => TargetState::Prepared,
            Phase::Done => TargetState::Owner,
            _ => TargetState::Receiving,
        };
        wire.send(Kind::Ready, due, &[&state.ready(&self.challenge)])?;
        wire.seal.bind(&id, link, &self.challenge);
        Ok(wire.flush()?)
    }

    /// Begins a session, or the same again whose first answer was lost.
    fn begin(&mut self, id: SessionId, vcpus: u32, memory: &Layout) -> Result<()> {
        match &self.session {
            None if self.phase == Phase::New => {}
            Some(session) if session.id == id && session.due == 0 => {}
            _ => return Err(MigrateError::WrongPhase),
        }
        let (own_vcpus, own_memory) = MigrateError::at("shape of the VM", shape(self.vm))?;
        let wrong = match (vcpus == own_vcpus, *memory == own_memory) {
            (true, true) => None,
            (false, _) => Some(Error::Invalid(Field::VcpuCount, vcpus.into())),
            (_, false) => Some(Error::Invalid(Field::Size, memory.frames())),
        };
        if let Some(error) = wrong {
            return Err(MigrateError::Refused(Refusal {
                reason: Reason::Shape,
                status: error.errno() as u64,
            }));
        }
        self.session = Some(Session {
            id,
            room: image_limit(vcpus, memory),
            most_pages: memory.frames() + u64::from(vcpus),
            due: 0,
            load: Load::Image(Vec::new()),
        });
        self.phase = Phase::Stopped;
        Ok(())
    }

    fn require_due(&self, index: u64) -> Result<()> {
        let session = self.session.as_ref().ok_or(ProtocolError::Session)?;
        match session.due {
            due if due == index => Ok(()),
            due => Err(ProtocolError::Index { due, got: index }.into()),
        }
    }

    /// Takes a record of the guest.
    fn take(&mut self, kind: Kind, index: u64, payload: &[u8]) -> Result<()> {
        self.require_due(index)?;
        let session = self.session.as_mut().ok_or(ProtocolError::Session)?;
        match (&mut session.load, kind) {
            (Load::Image(bytes), Kind::Image | Kind::ImageEnd) => {
                if (bytes.len() + payload.len()) as u64 > session.room {
                    return Err(ProtocolError::TooManyRecords.into());
                }
                bytes.extend_from_slice(payload);
                if kind == Kind::ImageEnd {
                    let image = match readable(bytes, session.most_pages) {
                        Ok(image) => image,
                        Err(error) => {
                            // It would not be better over another link.
                            self.give_up();
                            return Err(error);
                        }
                    };
                    session.load = Load::Pages {
                        pages: image.pages(),
                        image,
                        came: 0,
                    };
                }
            }
            (Load::Pages { pages, came, .. }, Kind::Page) => {
                let next = pages.get(*came);
                let (slot, level) = *next.ok_or(ProtocolError::TooManyRecords)?;
                if payload.len() as u64 != level.bytes() {
                    return Err(ProtocolError::Field("length of a page").into());
                }
                MigrateError::at("a page of the store", self.store.put(slot, payload))?;
                *came += 1;
                self.pages += level.frames();
            }
            _ => return Err(ProtocolError::Unexpected(kind as u8).into()),
        }
        session.due += 1;
        Ok(())
    }

    /// Puts the guest into memory, where it waits. An error leaves nothing of it here.
    fn arrive(&mut self, agent: &mut dyn MigrationAgent) -> Result<()> {
        let session = self.session.as_ref().ok_or(ProtocolError::Session)?;
        let Load::Pages { image, pages, came } = &session.load else {
            return Err(ProtocolError::Unexpected(Kind::Prepare as u8).into());
        };
        let missing = pages.iter().skip(*came);
        let frames = missing.map(|(_, level)| level.frames()).sum();
        if frames > 0 {
            return Err(ProtocolError::Incomplete { frames, vcpus: 0 }.into());
        }
        match self.vm.arrive(image, self.store, agent) {
            Ok(()) => {
                self.phase = Phase::Prepared;
                Ok(())
            }
            Err(error) => {
                // The agents' packet is good once.
                self.give_up();
                Err(MigrateError::Failed {
                    operation: "arrive",
                    error,
                })
            }
        }
    }
}

/// The image in these bytes, if it names no more pages than the guest can have.
fn readable(bytes: &[u8], most_pages: u64) -> Result<SnpImage> {
    let image = SnpImage::decode(bytes)?;
    match image.totals().pages <= most_pages {
        true => Ok(image),
        false => Err(ProtocolError::Field("number of pages").into()),
    }
}

fn answer<L: Read + Write>(wire: &mut Wire<'_, L, Kind>, kind: Kind) -> Result<()> {
    wire.send(kind, 0, &[])?;
    Ok(wire.flush()?)
}

impl<H: Host> Drop for SnpReceiver<'_, H> {
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Prepared | Phase::Committed) {
            self.give_up();
        }
    }
}
