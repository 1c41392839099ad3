//! Pages of a TD that leaves: which travel next, and their bundles.

use alloc::vec::Vec;

use kvm_ops::{Gfn, Host, PrivateSpte, Result};

use super::bundle::Bundle;
use super::frames::Frames;
use super::lane::{BATCH, Lane};
use super::outgoing::{Carried, Outgoing, Phase};

/// Frames that are blocked for writing together, after which all vCPUs are kicked out once.
const WINDOW: usize = 512;

/// The state that threads share which make bundles of several streams.
#[derive(Default)]
pub(super) struct Work {
    /// A bundle was lost: only the way back is left.
    pub(super) broken: bool,
    /// Pages were taken for bundles since the last token.
    pub(super) sent: bool,
    /// Frames that are blocked for writing and tracked, and travel next.
    pub(super) window: Frames,
    pub(super) carried: Carried,
}

impl<H: Host> Outgoing<'_, H> {
    /// The number of pages that are to be sent, as far as it is known.
    pub fn pages_left(&self) -> u64 {
        let due = self.pages_due();
        due + self.td.lock(&self.td.journey.book).later.len()
    }

    /// Of those, the number of pages that are not [put off](Self::put_off).
    pub(super) fn pages_due(&self) -> u64 {
        let window = self.td.lock(&self.work).window.len();
        window + self.td.lock(&self.td.journey.book).due()
    }

    /// The next bundle of pages of this round, at most [`BATCH`] of them. `None` if the round has no page
    /// left; then end it, and see whether [more are left](Self::pages_left).
    ///
    /// Several threads may ask at once, each for another stream: the module exports the pages of
    /// different streams side by side.
    ///
    /// # Errors
    /// The module's. Pages whose entries were locked are left for the next round.
    /// [`Error::Busy`](kvm_ops::Error::Busy) while another thread makes a bundle of the stream.
    pub fn pages(&self, stream: u16) -> Result<Option<Bundle>> {
        self.require(&[Phase::Live, Phase::Paused, Phase::Posted])?;
        let lane = self.lanes.of(stream)?;
        let frames = self.next_frames()?;
        self.bundle_of(&lane, frames)
    }

    /// After the start token: a bundle of the pages that the guest waits for at the target, of the first
    /// [`BATCH`] of these frames. `None` if the TD [has](Self::has_page) none of them.
    ///
    /// # Errors
    /// As [`pages`](Self::pages).
    pub fn wanted_pages(&self, stream: u16, wanted: &[Gfn]) -> Result<Option<Bundle>> {
        self.require(&[Phase::Posted])?;
        let lane = self.lanes.of(stream)?;
        let there = wanted.iter().copied().filter(|gfn| self.has_page(*gfn));
        let frames: Vec<Gfn> = there.take(BATCH).collect();
        let new = self.take_out(&frames);
        let bundle = self.bundle_of(&lane, frames)?;
        if let Some(bundle) = &bundle {
            let sent = bundle.entries.iter().filter(|entry| entry.succeeded());
            let on_demand = sent.filter(|entry| new.contains(&entry.gfn())).count();
            self.td.lock(&self.work).carried.pages_on_demand += on_demand as u64;
        }
        Ok(bundle)
    }

    /// Takes frames out of those that are to be sent. Returns the ones that never travelled.
    fn take_out(&self, frames: &[Gfn]) -> Vec<Gfn> {
        let mut work = self.td.lock(&self.work);
        let mut book = self.td.lock(&self.td.journey.book);
        for gfn in frames {
            work.window.remove(*gfn);
            book.round.remove(*gfn);
            book.pending.remove(*gfn);
        }
        let new = |gfn: &Gfn| !book.exported.contains(*gfn);
        frames.iter().copied().filter(new).collect()
    }

    /// Returns whether the TD has a private page there.
    pub fn has_page(&self, gfn: Gfn) -> bool {
        let found = self.td.read_private().mirror.lookup(gfn);
        matches!(found.entry, PrivateSpte::Mapped(_))
    }

    fn bundle_of(&self, lane: &Lane<'_, H>, frames: Vec<Gfn>) -> Result<Option<Bundle>> {
        if frames.is_empty() {
            return Ok(None);
        }
        let (reached, exported) = self.export(lane, &frames);
        let bundle = match exported {
            Ok(bundle) => bundle,
            Err(error) => {
                // Pages that left in a bundle that was not finished are not where they were. After the start
                // token they may leave again.
                self.td.lock(&self.work).broken |= reached > 0 && self.phase != Phase::Posted;
                let mut book = self.td.lock(&self.td.journey.book);
                // In this round still: nothing of them has travelled.
                for gfn in frames {
                    book.round.insert(gfn);
                    book.exported.insert(gfn);
                }
                return Err(error);
            }
        };
        self.note_exported(&bundle);
        self.made(Ok(bundle)).map(Some)
    }

    fn note_exported(&self, bundle: &Bundle) {
        let mut book = self.td.lock(&self.td.journey.book);
        for entry in &bundle.entries {
            if !entry.succeeded() {
                // Written meanwhile, or another thread is at its entry.
                match self.phase {
                    Phase::Posted => book.round.insert(entry.gfn()),
                    _ => book.pending.insert(entry.gfn()),
                }
                continue;
            }
            book.exported.insert(entry.gfn());
            if self.phase == Phase::Paused {
                // It was written after it was blocked, and travels as it is now.
                book.pending.remove(entry.gfn());
            }
        }
    }

    fn export(&self, lane: &Lane<'_, H>, frames: &[Gfn]) -> (u16, Result<Bundle>) {
        let prepared = lane
            .ask_for(frames)
            .and_then(|at| Ok((at, self.td.tdr()?, self.td.calls()?)));
        let (at, tdr, calls) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return (0, Err(error)),
        };
        let (reached, done) = calls.export_mem(tdr, at);
        let bundle = done
            .map_err(|failed| self.td.failed(&failed))
            .and_then(|()| lane.take_memory(frames.len()));
        (reached, bundle)
    }

    /// Takes the frames of the next bundle.
    fn next_frames(&self) -> Result<Vec<Gfn>> {
        let mut work = self.td.lock(&self.work);
        if work.window.is_empty() {
            self.next_window(&mut work)?;
        }
        let frames = work.window.take_first(BATCH);
        work.sent |= !frames.is_empty();
        Ok(frames)
    }

    /// Takes the next frames to be sent; while the TD runs they are blocked for writing first.
    fn next_window(&self, work: &mut Work) -> Result<()> {
        let frames = {
            let mut book = self.td.lock(&self.td.journey.book);
            if !work.sent {
                // Nothing of this epoch has travelled, so everything may.
                book.begin_round();
            }
            book.round.take_first(WINDOW)
        };
        if self.phase == Phase::Live
            && !frames.is_empty()
            && let Err(error) = self.block(&frames)
        {
            let mut book = self.td.lock(&self.td.journey.book);
            frames.iter().for_each(|gfn| book.round.insert(*gfn));
            return Err(error);
        }
        frames.iter().for_each(|gfn| work.window.insert(*gfn));
        Ok(())
    }

    /// Blocks frames for writing, and waits until no processor has an old translation.
    fn block(&self, frames: &[Gfn]) -> Result<()> {
        let tdr = self.td.tdr()?;
        {
            let mut book = self.td.lock(&self.td.journey.book);
            let list = self.scratch.list(frames)?;
            let done = self.call(|calls| calls.export_blockw(tdr, list));
            // Also after an error some are.
            frames.iter().for_each(|gfn| book.blocked.insert(*gfn));
            done?;
        }
        let calls = self.td.calls()?;
        self.td
            .without_vcpus(|| calls.mem_track(tdr))
            .map_err(|failed| self.td.failed(&failed))?;
        self.td.empty_epoch();
        Ok(())
    }
}
