//! Pages that follow a guest to its target: a post-copy over a byte stream.
//!
//! The ends take turns. The source says how many pages are left, or that it has sent every one; the target names
//! the pages for which the guest waits, or ends the import; the source sends those, and some of the others.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Gfn, Host};
use kvm_ops_wire::{Flow, MigrateError, Phase, Progress, ProtocolError, Reason, Refusal};

use super::lane::BATCH;
use super::receiver::Receiver;
use super::record::{self, Kind, MOST_FRAMES, Wire};
use super::sending::Sending;

type Result<T> = core::result::Result<T, MigrateError>;

/// Bundles of a turn on each stream, beside those that the guest waits for: a page that it touches comes after
/// as many at the latest.
const TURN: usize = 4;

impl<H: Host, L: Read + Write> Sending<'_, '_, '_, '_, H, L> {
    /// Sends the pages that are left, those for which the guest waits first, until the target has all of them.
    pub(super) fn follow(&mut self, watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        loop {
            // Too late to cancel: the answer does not matter.
            let _ = self.report(watch);
            let left = self.sender.source.pages_left();
            let next = self.sender.sent.next();
            match left {
                0 => self.wire.send(Kind::Complete, next, &[])?,
                left => self.wire.send(Kind::Left, next, &[&left.to_le_bytes()])?,
            }
            let (kind, index, payload) = self.hear()?;
            match kind {
                Kind::Wanted => {
                    self.sender.sent.confirm(index)?;
                    self.turn(&record::parse_frames(&payload)?, watch)?;
                }
                Kind::Done if left == 0 => return self.done(),
                kind => return Err(ProtocolError::Unexpected(kind as u8).into()),
            }
        }
    }

    fn turn(&mut self, wanted: &[Gfn], watch: &mut dyn FnMut(&Progress) -> Flow) -> Result<()> {
        let source = &self.sender.source;
        let frames = wanted.iter().copied();
        let (there, absent): (Vec<_>, Vec<_>) = frames.partition(|gfn| source.has_page(*gfn));
        if !absent.is_empty() {
            self.send(Kind::Absent, record::frames(&absent))?;
        }
        let streams = (0..self.sender.source.streams()).cycle();
        for (frames, stream) in there.chunks(BATCH).zip(streams) {
            let made = self.sender.source.wanted_pages(stream, frames);
            if let Some(bundle) = MigrateError::at("TDH.EXPORT.MEM", made)? {
                self.bundle(bundle)?;
            }
        }
        self.pages(TURN, watch)
    }

    /// The guest cannot run any more.
    pub(super) fn lost(&mut self, why: Refusal) -> MigrateError {
        self.sender.source.lose();
        self.sender.phase = Phase::Lost;
        MigrateError::Lost(why)
    }

    /// The target has the guest, and says that it has all of its pages.
    pub(super) fn done(&mut self) -> Result<()> {
        if self.sender.source.pages_left() > 0 {
            return Err(self.lost(Refusal {
                reason: Reason::Damaged,
                status: 0,
            }));
        }
        MigrateError::at("end of the source", self.sender.source.leave())?;
        self.sender.phase = Phase::Done;
        Ok(())
    }
}

/// A target's side of a post-copy.
#[derive(Default)]
pub(super) struct Following {
    /// This end takes a guest before its pages.
    pub(super) offered: bool,
    /// The guest of this session comes before its pages.
    pub(super) agreed: bool,
    /// Pages that had come when the guest began to run.
    before: u64,
    /// Pages that the source has still to send, as it said last.
    left: u64,
    /// Frames that were asked for and have not come.
    asked: BTreeSet<Gfn>,
    on_demand: u64,
    /// The reason why the guest is lost, for a source that asks again.
    pub(super) lost: Option<Refusal>,
}

impl Following {
    /// Adds what concerns the pages that follow.
    pub(super) fn fill_in(&self, progress: &mut Progress) {
        if self.agreed && progress.phase >= Phase::PostCopy {
            progress.late = progress.pages - self.before;
            progress.on_demand = self.on_demand;
            progress.left = self.left;
        }
    }
}

impl<H: Host> Receiver<'_, H> {
    /// Lets the guest run here.
    pub(super) fn commit(&mut self) -> Result<()> {
        MigrateError::at("TDH.IMPORT.COMMIT", self.target.commit())?;
        self.following.before = self.target.pages();
        self.phase = Phase::PostCopy;
        Ok(())
    }

    /// The source has no page for these frames. Only those that were asked for count.
    pub(super) fn absent(&mut self, frames: &[Gfn]) {
        for gfn in frames {
            if self.following.asked.remove(gfn) {
                self.target.never_had(*gfn);
            }
        }
    }

    /// A turn of the source is over. Returns whether all pages are here, which ends the import.
    pub(super) fn turn<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        left: Option<u64>,
    ) -> Result<bool> {
        self.budget.spend(1)?;
        self.following.left = left.unwrap_or_default();
        self.look_what_came();
        if left.is_none() && self.following.asked.is_empty() {
            MigrateError::at("TDH.IMPORT.END", self.target.own())?;
            self.phase = Phase::Done;
            wire.send(Kind::Done, self.next, &[])?;
            wire.flush()?;
            return Ok(true);
        }
        let asked = self.following.asked.iter().take(MOST_FRAMES);
        wire.send(Kind::Wanted, self.next, &[&record::frames(asked)])?;
        wire.flush()?;
        Ok(false)
    }

    /// Takes note of pages that were asked for and have come, and of those for which the guest waits now.
    fn look_what_came(&mut self) {
        let Self {
            target, following, ..
        } = self;
        let before = following.asked.len();
        following.asked.retain(|gfn| !target.has_page(*gfn));
        following.on_demand += (before - following.asked.len()) as u64;
        following.asked.extend(target.wanted());
    }

    /// The reason why the guest is lost, if this error lost it or says that it is.
    pub(super) fn loss(&mut self, error: &MigrateError) -> Option<Refusal> {
        if let MigrateError::Lost(why) = error {
            return Some(*why);
        }
        if self.phase != Phase::PostCopy || !self.target.is_over() {
            return None;
        }
        self.phase = Phase::Lost;
        self.following.lost = Some(Refusal::of(error));
        self.following.lost
    }

    /// Tells the source that the guest is lost, and why.
    pub(super) fn send_lost<L: Read + Write>(
        &self,
        wire: &mut Wire<'_, L>,
        why: &Refusal,
    ) -> Result<()> {
        wire.send(Kind::Lost, self.next, &[&why.encode()])?;
        Ok(wire.flush()?)
    }
}
