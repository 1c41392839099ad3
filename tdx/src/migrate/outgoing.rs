//! A TD that leaves.

use alloc::sync::Arc;
use alloc::vec::Vec;

use kvm_ops::moves;
use kvm_ops::{
    Diagnosis, Error, Field, Gfn, Gpaw, Host, PAGE_SIZE, PrivateSpte, Result, SeamPort, Step,
    VcpuId,
};
use kvm_ops_mmu::Mutex;

use kvm_ops_wire::Layout;

use super::bundle::Bundle;
use super::journey::Session;
use super::lane::{Lanes, Scratch};
use super::pages::Work;
use super::record::Shape;
use crate::TdxVm;
use crate::run::ExitState;
use crate::seamcall::{BundleAt, Calls, Failed, Outcome};
use crate::td::{Held, PATIENCE, Td};
use crate::vcpu::{Tried, VcpuRecord};

/// A TD that is being sent, bundle by bundle. Its vCPUs run on, on their own threads, until
/// [`stop`](Self::stop).
///
/// The order of calls is that of the states of the module: [`begin`](Self::begin), then
/// [`pages`](Self::pages) and [`end_round`](Self::end_round) as often as wanted, `stop`, the pages
/// that are left, [`td_state`](Self::td_state), [`vcpu_state`](Self::vcpu_state) of each vCPU,
/// [`start_token`](Self::start_token), [`leave`](Self::leave). [`abort`](Self::abort) is possible
/// everywhere before `leave`. The bundles of one stream must reach the target in the order in which they
/// were made, and a token after all bundles before it.
///
/// Dropped before the start token, it aborts: the TD runs on. Dropped after it, the TD can never run
/// here, because only the target's word would let it.
pub struct Outgoing<'a, H: Host> {
    pub(super) td: &'a Td<H>,
    pub(super) lanes: Lanes<'a, H>,
    /// For lists of pages that are blocked for writing.
    pub(super) scratch: Scratch<'a, H>,
    pub(super) phase: Phase,
    /// Taken before the TD's book.
    pub(super) work: Mutex<Work>,
    held: Option<Held<'a>>,
    /// Keeps other sessions and conversions away.
    _session: Session<'a>,
}

/// Counts of a migration at its source.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Epochs, each of which ended with a token.
    pub rounds: u32,
    /// Bundles, tokens among them.
    pub bundles: u64,
    /// Pages of guest memory, with repetitions.
    pub pages: u64,
    /// Pages that were sent while the TD was stopped.
    pub pages_stopped: u64,
    /// Pages that were sent after the start token, with repetitions.
    pub pages_late: u64,
    /// Pages that the guest waited for at its target.
    pub pages_on_demand: u64,
    /// Bytes of the bundles.
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No session yet.
    New,
    /// LIVE_EXPORT: the TD runs.
    Live,
    /// PAUSED_EXPORT.
    Paused,
    /// POST_EXPORT: the start token exists.
    Posted,
    /// The TD is the target's, or runs on here.
    Over,
}

impl<H: Host> TdxVm<H> {
    /// Makes the TD one that can be sent over `streams` streams, 1 to
    /// [`MAX_STREAMS`](super::MAX_STREAMS). Its migration TD is bound and has exchanged the session's
    /// keys with that of the target before [`Outgoing::begin`].
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that does not run yet; [`Error::Busy`] while another migration is
    /// under way; [`Error::Invalid`] for a number of streams that cannot be; [`Error::NoMemory`];
    /// what the module answers to TDH.MIG.STREAM.CREATE, and to the end of an earlier migration that could
    /// not be cleaned up then.
    pub fn outgoing(&self, streams: u16) -> Result<Outgoing<'_, H>> {
        let td = self.td();
        td.life.require(Step::Runnable)?;
        let session = td.journey.claim()?;
        td.settle()?;
        td.create_streams(streams)?;
        Ok(Outgoing {
            td,
            lanes: Lanes::new(td, streams)?,
            scratch: Scratch::new(td)?,
            phase: Phase::New,
            work: Mutex::default(),
            held: None,
            _session: session,
        })
    }
}

impl<'a, H: Host> Outgoing<'a, H> {
    pub(super) fn require(&self, wanted: &[Phase]) -> Result<()> {
        match wanted.contains(&self.phase) && !self.td.lock(&self.work).broken {
            true => Ok(()),
            false => Err(Error::WrongState(self.td.life.step())),
        }
    }

    /// Makes a call with the vCPUs out if they are in the way.
    pub(super) fn call<T>(&self, call: impl Fn(&Calls<'_, H::Seam>) -> Outcome<T>) -> Result<T> {
        let calls = self.td.calls()?;
        self.td
            .without_vcpus(|| call(&calls))
            .map_err(|failed| self.td.failed(&failed))
    }

    /// The same with faults out as well, for leaves that take a lock of the TD alone.
    fn call_alone<T>(&self, call: impl Fn(&Calls<'_, H::Seam>) -> Outcome<T>) -> Result<T> {
        let _alone = self.td.write_private();
        self.call(call)
    }

    /// Counts a bundle that the module made. One that cannot be read is lost, and the session with it.
    pub(super) fn made(&self, bundle: Result<Bundle>) -> Result<Bundle> {
        let mut work = self.td.lock(&self.work);
        let bundle = bundle.inspect_err(|_| work.broken = true)?;
        let (pages, carried) = (bundle.guest_pages() as u64, &mut work.carried);
        carried.bundles += 1;
        carried.pages += pages;
        carried.bytes += bundle.len() as u64;
        match self.phase {
            Phase::Paused => carried.pages_stopped += pages,
            Phase::Posted => carried.pages_late += pages,
            _ => {}
        }
        Ok(bundle)
    }

    /// The counts so far.
    pub fn carried(&self) -> Carried {
        self.td.lock(&self.work).carried
    }

    /// The number of streams.
    pub fn streams(&self) -> u16 {
        self.lanes.streams()
    }

    /// The facts on which a target accepts or refuses the TD.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more slots than a layout has ranges.
    pub fn shape(&self) -> Result<Shape> {
        Ok(Shape {
            streams: self.streams(),
            vcpus: self.vcpus().len() as u32,
            gpaw: self.td.gpaw_bits(),
            layout: self.td.layout()?,
        })
    }

    /// Begins the session: the immutable state (TDH.EXPORT.STATE.IMMUTABLE). From here on the guest's
    /// writes are followed. Pages of 2 MiB are split first (TDH.MEM.PAGE.DEMOTE), because the module exports pages of 4 KiB
    /// alone; they stay so after an abort, and at the target.
    ///
    /// # Errors
    /// The module's, such as MIGRATION_DECRYPTION_KEY_NOT_SET where the migration TD has not done its
    /// part, or TD_NOT_MIGRATABLE; to the split of pages of 2 MiB; [`Error::NoMemory`] for the tables that this needs.
    pub fn begin(&mut self) -> Result<Bundle> {
        self.require(&[Phase::New])?;
        let (at, tdr) = (self.lanes.of(0)?.offer_buffers()?, self.td.tdr()?);
        self.td.follow()?;
        let begun = self.call_alone(|calls| calls.export_immutable(tdr, at));
        let pages = begun.inspect_err(|_| self.td.stop_following())?;
        self.phase = Phase::Live;
        let bundle = self.lanes.of(0)?.take_state(VcpuId(0), pages);
        self.made(bundle)
    }

    /// Ends a round with an epoch token. What was sent before may be sent again after it.
    ///
    /// # Errors
    /// The module's.
    pub fn end_round(&mut self) -> Result<Bundle> {
        self.require(&[Phase::Live, Phase::Paused])?;
        self.token(false)
    }

    fn token(&mut self, start: bool) -> Result<Bundle> {
        let (at, tdr) = (self.lanes.of(0)?.at(1), self.td.tdr()?);
        self.call_alone(|calls| calls.export_track(tdr, at, start))?;
        if start {
            self.phase = Phase::Posted;
        }
        {
            let mut work = self.td.lock(&self.work);
            work.carried.rounds += 1;
            work.sent = false;
        }
        let bundle = self.lanes.of(0)?.take_token();
        self.made(bundle)
    }

    /// Stops the TD: every vCPU comes out, and [`vcpu_run`](kvm_ops::VcpuOps::vcpu_run) answers
    /// [`Error::Busy`] from then on. On an error the TD runs on.
    ///
    /// # Errors
    /// The module's to TDH.EXPORT.PAUSE.
    pub fn stop(&mut self) -> Result<()> {
        self.require(&[Phase::Live])?;
        self.td.journey.set_stopped(true);
        let held = self.td.hold_out();
        let tdr = self.td.tdr()?;
        let paused = self.call_alone(|calls| calls.export_pause(tdr));
        if paused.is_err() {
            self.td.journey.set_stopped(false);
            return paused;
        }
        self.held = Some(held);
        self.phase = Phase::Paused;
        Ok(())
    }

    /// The TD's state.
    ///
    /// # Errors
    /// The module's.
    pub fn td_state(&mut self) -> Result<Bundle> {
        self.require(&[Phase::Paused])?;
        let (at, tdr) = (self.lanes.of(0)?.offer_buffers()?, self.td.tdr()?);
        let pages = self.call_alone(|calls| calls.export_td(tdr, at))?;
        let bundle = self.lanes.of(0)?.take_state(VcpuId(0), pages);
        self.made(bundle)
    }

    /// The numbers of the TD's vCPUs.
    pub fn vcpus(&self) -> Vec<VcpuId> {
        let ready = self.td.ready_vcpus();
        ready.iter().map(|vcpu| vcpu.id).collect()
    }

    /// The state of a vCPU.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a vCPU that is not there; the module's.
    pub fn vcpu_state(&mut self, id: VcpuId, stream: u16) -> Result<Bundle> {
        self.require(&[Phase::Paused])?;
        let at = self.lanes.of(stream)?.offer_buffers()?;
        let pages = self.export_vcpu(id, at)?;
        let bundle = self.lanes.of(stream)?.take_state(id, pages);
        self.made(bundle)
    }

    fn export_vcpu(&self, id: VcpuId, at: BundleAt) -> Result<u64> {
        let vcpu = self.vcpu(id)?;
        let (calls, cpu) = (self.td.calls()?, self.td.seam()?.this_cpu());
        self.td
            .on_cpu_of(&vcpu, cpu, || calls.export_vcpu(cpu, vcpu.tdvpr, at))
            .map_err(|failed: Failed| self.td.failed(&failed))
    }

    /// What the host owes to a vCPU ([`ExitState`]), which is between two runs. A run that is under way ends soon, as the TD is
    /// stopped, and a thread that serves an exit gives its answer: this waits for them.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the TD is stopped; [`Error::Invalid`] for a vCPU that is not there; [`Error::Busy`] where an
    /// exit keeps waiting for its answer: give it and run the vCPU, or ask its handle
    /// ([`TdxVcpu::exit_state`](crate::TdxVcpu::exit_state)).
    pub fn exit_state(&self, id: VcpuId) -> Result<ExitState> {
        self.require(&[Phase::Paused])?;
        let vcpu = self.vcpu(id)?;
        for tries in 0..PATIENCE {
            match vcpu.seat.look(|| self.td.relax()) {
                Tried::Done(resume) => return self.td.exit_state_of(&vcpu, resume),
                Tried::Wait | Tried::No => (0..1u32 << tries).for_each(|_| self.td.relax()),
            }
        }
        Err(Error::Busy)
    }

    fn vcpu(&self, id: VcpuId) -> Result<Arc<VcpuRecord>> {
        let vcpus = self.td.ready_vcpus();
        let found = vcpus.into_iter().find(|vcpu| vcpu.id == id);
        found.ok_or(Error::Invalid(Field::Vcpu, id.0.into()))
    }

    /// The start token, the last bundle of all. From here on the TD can run here only with the
    /// [abort token](super::Incoming::abort) of the target.
    ///
    /// # Errors
    /// The module's, such as EXPORTED_DIRTY_PAGES_REMAIN where pages are left to be sent; the TD is
    /// still here then.
    pub fn start_token(&mut self) -> Result<Bundle> {
        self.require(&[Phase::Paused])?;
        // Not all pages that are left make the module refuse: it knows no page that never travelled.
        match self.pages_left() {
            0 => self.token(true),
            left => Err(Error::Invalid(Field::Size, left * PAGE_SIZE)),
        }
    }

    /// Puts off the pages that never travelled, for the time after an
    /// [early start token](Self::early_start_token). What is left to be sent before it are those that were sent and
    /// written again, which the module demands.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless the TD is stopped, and before the start token.
    pub fn put_off(&mut self) -> Result<()> {
        self.require(&[Phase::Paused])?;
        let mut work = self.td.lock(&self.work);
        let mut book = self.td.lock(&self.td.journey.book);
        book.put_off(&mut work.window);
        Ok(())
    }

    /// The start token of a post-copy: pages are left that never travelled, and follow by
    /// [`pages`](Self::pages) and [`wanted_pages`](Self::wanted_pages) while the guest runs at the
    /// target. [`leave`](Self::leave) once all have arrived.
    ///
    /// # Errors
    /// As [`start_token`](Self::start_token), where pages are left that were sent and then written again.
    pub fn early_start_token(&mut self) -> Result<Bundle> {
        self.require(&[Phase::Paused])?;
        let token = self.token(true);
        if self.phase == Phase::Posted {
            self.td.lock(&self.td.journey.book).take_up();
        }
        token
    }

    /// Frames that the guest shares with the host, as ranges. They are not among the bundles.
    pub fn shared(&self) -> Vec<(Gfn, u64)> {
        let private = self.td.read_private();
        private.attributes.exceptions().collect()
    }

    /// Reads a shared frame. The contents are final once the TD is stopped.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a frame that no slot covers.
    pub fn read_shared(&self, gfn: Gfn, page: &mut [u8; PAGE_SIZE as usize]) -> Result<()> {
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        self.td.on_td_port(|port| port.read_slot(gpa, page))
    }

    /// Gives the TD up: the target runs it. Everything but its teardown answers `Poisoned`.
    ///
    /// # Errors
    /// [`Error::WrongState`] before the start token.
    pub fn leave(&mut self) -> Result<()> {
        self.require(&[Phase::Posted])?;
        self.phase = Phase::Over;
        moves::mark_left(&self.td.life);
        self.td.stop_for_good();
        Ok(())
    }

    /// Gives the TD up, because it is lost at its target.
    pub(super) fn lose(&mut self) {
        self.phase = Phase::Over;
        self.td
            .give_up("it runs at its target, which cannot take the pages that are left");
    }

    /// Ends the migration; the TD runs on here. After the start token that needs the target's abort
    /// token.
    ///
    /// # Errors
    /// The module's, such as INVALID_MBMD or INCORRECT_MBMD_MAC for another token: nothing changed then,
    /// and the call may come again. [`Error::WrongState`] after the start token without a token, and
    /// after [`leave`](Self::leave).
    pub fn abort(&mut self, token: Option<&Bundle>) -> Result<()> {
        let tdr = self.td.tdr()?;
        let at = match (self.phase, token) {
            (Phase::New, _) => {
                self.phase = Phase::Over;
                return Ok(());
            }
            (Phase::Live | Phase::Paused, _) => None,
            (Phase::Posted, Some(token)) => Some(self.lanes.of(0)?.put_state(token)?),
            (Phase::Posted, None) | (Phase::Over, _) => {
                return Err(Error::WrongState(self.td.life.step()));
            }
        };
        self.call_alone(|calls| calls.export_abort(tdr, at))?;
        self.phase = Phase::Over;
        self.td.journey.set_stopped(false);
        self.held = None;
        // The guest runs already. What cannot be cleaned up now is when it is touched, or before the next
        // migration.
        let _ = self.td.settle();
        Ok(())
    }
}

impl<H: Host> Drop for Outgoing<'_, H> {
    fn drop(&mut self) {
        let lost = match self.phase {
            Phase::New | Phase::Over => false,
            Phase::Live | Phase::Paused => self.abort(None).is_err(),
            Phase::Posted => true,
        };
        if lost {
            self.td
                .give_up("the migration ended without the target's word");
        }
    }
}

impl<H: Host> Td<H> {
    pub(super) fn gpaw_bits(&self) -> u8 {
        match self.lock(&self.td_params).gpaw {
            Gpaw::Bits48 => 48,
            Gpaw::Bits52 => 52,
        }
    }

    /// The TD's memory: its slots.
    pub(super) fn layout(&self) -> Result<Layout> {
        let private = self.read_private();
        let slots = private.slots.iter();
        Layout::new(slots.map(|slot| (Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE)))
    }

    /// From now on written pages are noted. All pages are to be sent.
    fn follow(&self) -> Result<()> {
        // Pages that are mapped from here on are noted by their faults, all others found below.
        self.journey.set_follows(true);
        // The module exports pages of 4 KiB alone.
        let noted = self.split_large_pages().and_then(|()| self.note_all());
        noted.inspect_err(|_| self.stop_following())
    }

    fn note_all(&self) -> Result<()> {
        let mut half_removed = Vec::new();
        let private = self.read_private();
        let mut book = self.lock(&self.journey.book);
        private.mirror.for_each(|gfn, _, entry| match entry {
            PrivateSpte::Mapped(_) => book.pending.insert(gfn),
            PrivateSpte::Blocked(_) => half_removed.push(gfn),
            _ => {}
        });
        drop(book);
        drop(private);
        for gfn in half_removed {
            // A removal that failed left it behind: the page is still the guest's.
            self.write_private().mirror.unblock(self, gfn, 1)?;
            self.page_came(gfn);
        }
        Ok(())
    }

    fn stop_following(&self) {
        *self.lock(&self.journey.book) = super::journey::Book::default();
        self.journey.set_follows(false);
    }

    /// Lets the TD run here no more.
    pub(super) fn give_up(&self, why: &'static str) {
        let diagnosis = Diagnosis::of(self.life.tech(), self.life.id(), Error::Poisoned);
        self.life
            .poison_by(diagnosis.because(why).advise(crate::td::POISONED));
        self.stop_for_good();
    }

    /// Ends the runs of a poisoned TD's vCPUs.
    fn stop_for_good(&self) {
        self.kick_all();
        self.journey.set_follows(false);
    }
}
