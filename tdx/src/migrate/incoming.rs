//! A TD that comes.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use kvm_ops::{
    Error, Field, Gfn, Host, PAGE_SIZE, Privacy, PrivateSpte, Result, SeamPort, Step, VcpuId,
};
use kvm_ops_mmu::Mutex;

use super::adopt::ImportError;
use super::bundle::{Bundle, BundleKind};
use super::journey::{Book, Session};
use super::lane::Lanes;
use super::record::Shape;
use crate::TdxVm;
use crate::run::ExitState;
use crate::seamcall::{Calls, Failed, Outcome};
use crate::td::Td;

/// A TD that waits for a guest, and takes it bundle by bundle.
///
/// It was created for a TD that [arrives](kvm_ops::TdParams::arrives), has the guest's slots, and its
/// migration TD is bound and has exchanged the session's keys with that of the source.
///
/// What comes from the peer is judged by the module. A failure that ended the import there poisons the
/// VM, whose teardown gives everything back; the source runs on, or gets its guest back by the
/// [abort token](Self::abort). Dropped before the guest is its own, the VM is poisoned as well.
pub struct Incoming<'a, H: Host> {
    td: &'a Td<H>,
    lanes: Lanes<'a, H>,
    phase: Mutex<Phase>,
    pages: AtomicU64,
    /// Keeps other sessions away.
    _session: Session<'a>,
}

/// States of an import, as far as the host knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// UNINITIALIZED.
    New,
    /// MEMORY_IMPORT and STATE_IMPORT.
    Receiving,
    /// POST_IMPORT: the start token came.
    Started,
    /// LIVE_IMPORT: the guest runs here, and its pages still come.
    Live,
    /// The guest is this TD's.
    Own,
    /// FAILED_IMPORT.
    Ended,
}

impl<H: Host> TdxVm<H> {
    /// Makes the TD one that can take a guest over `streams` streams, at least as many as the source
    /// has.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a TD that does not wait for a guest; [`Error::Busy`] while a session
    /// is under way; [`Error::Invalid`] for a number of streams that cannot be; [`Error::NoMemory`];
    /// what the module answers to TDH.MIG.STREAM.CREATE.
    pub fn incoming(&self, streams: u16) -> Result<Incoming<'_, H>> {
        let td = self.td();
        td.life.require(Step::Initialized)?;
        if !td.journey.awaits() {
            return Err(Error::WrongState(td.life.step()));
        }
        let session = td.journey.claim()?;
        td.create_streams(streams)?;
        Ok(Incoming {
            td,
            lanes: Lanes::new(td, streams)?,
            phase: Mutex::new(Phase::New),
            pages: AtomicU64::new(0),
            _session: session,
        })
    }
}

impl<'a, H: Host> Incoming<'a, H> {
    /// The number of pages that came, with repetitions.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// The number of streams.
    pub fn streams(&self) -> u16 {
        self.lanes.streams()
    }

    fn phase(&self) -> Phase {
        *self.td.lock(&self.phase)
    }

    fn set_phase(&self, phase: Phase) {
        *self.td.lock(&self.phase) = phase;
    }

    /// Returns whether a vCPU of this number came.
    pub fn has_vcpu(&self, id: VcpuId) -> bool {
        self.td.lock(&self.td.vcpus).contains_key(&id)
    }

    /// True once the start token came: the guest is complete, and only this TD can run it.
    pub fn is_started(&self) -> bool {
        self.phase() == Phase::Started
    }

    /// The caller's error for a failed call. One that ended the import poisons the TD.
    fn failed(&self, failed: &Failed) -> Error {
        if failed.status().is_some_and(|status| status.is_fatal()) {
            self.set_phase(Phase::Ended);
            let advice = "the guest stays with its source; destroy this VM";
            let diagnosis = failed.report(&self.td.life, Some(advice));
            self.td.poison_by(diagnosis);
            return failed.leak_error();
        }
        self.td.failed(failed)
    }

    fn call(&self, call: impl FnOnce(&Calls<'_, H::Seam>) -> Outcome) -> Result<()> {
        let calls = self.td.calls()?;
        call(&calls).map_err(|failed| self.failed(&failed))
    }

    /// Succeeds if a guest of this shape fits.
    ///
    /// # Errors
    /// [`Error::Invalid`] names what does not: more streams or vCPUs than this VM has, another width of
    /// addresses, memory that no slot covers.
    pub fn accept(&self, shape: &Shape) -> Result<()> {
        if shape.streams > self.lanes.streams() {
            return Err(Error::Invalid(Field::Stream, shape.streams.into()));
        }
        if shape.vcpus > self.td.params.vcpus {
            return Err(Error::Invalid(Field::VcpuCount, shape.vcpus.into()));
        }
        if shape.gpaw != self.td.gpaw_bits() {
            return Err(Error::Invalid(Field::Gpaw, shape.gpaw.into()));
        }
        let private = self.td.read_private();
        for (first, pages) in shape.layout.ranges() {
            if private.slots.covered(first, pages) < pages {
                return Err(Error::Invalid(Field::Gfn, first.get()));
            }
        }
        Ok(())
    }

    /// Takes a bundle. Those of one stream come in the order in which the source made them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bundle that is not due, or names frames that no slot covers: nothing
    /// changed. The module's refusal as [`Error::Firmware`]; where that has bit 61 the import is
    /// over.
    pub fn take(&mut self, bundle: &Bundle) -> Result<()> {
        if bundle.kind() == BundleKind::Memory {
            return self.take_pages(bundle);
        }
        self.check_due(bundle)?;
        let tdr = self.td.tdr()?;
        let at = self.lanes.of(bundle.stream())?.put_state(bundle)?;
        match bundle.kind() {
            BundleKind::Immutable => {
                self.call(|calls| calls.import_immutable(tdr, at))?;
                self.set_phase(Phase::Receiving);
                Ok(())
            }
            BundleKind::TdState => self.call(|calls| calls.import_td(tdr, at)),
            BundleKind::VcpuState => {
                let cpu = self.td.seam()?.this_cpu();
                let vcpu = self.td.make_room_for_vcpu(bundle.vcpu, cpu)?;
                self.call(|calls| calls.import_vcpu(cpu, vcpu.tdvpr, at))
            }
            BundleKind::Token => {
                self.call(|calls| calls.import_track(tdr, at))?;
                if bundle.is_start_token() {
                    self.set_phase(Phase::Started);
                }
                Ok(())
            }
            BundleKind::Memory | BundleKind::AbortToken => Err(not_due(bundle)),
        }
    }

    fn check_due(&self, bundle: &Bundle) -> Result<()> {
        let due = match (self.phase(), bundle.kind()) {
            (Phase::New, kind) => kind == BundleKind::Immutable,
            (Phase::Receiving, kind) => {
                !matches!(kind, BundleKind::Immutable | BundleKind::AbortToken)
            }
            (Phase::Live, kind) => kind == BundleKind::Memory,
            (Phase::Started | Phase::Own | Phase::Ended, _) => false,
        };
        // State that is not a vCPU's, and tokens, have stream 0.
        let anywhere = matches!(bundle.kind(), BundleKind::Memory | BundleKind::VcpuState);
        match due && (anywhere || bundle.stream() == 0) {
            true => Ok(()),
            false => Err(not_due(bundle)),
        }
    }

    /// [Takes](Self::take) a bundle of pages. Several threads may do so at once, each those of another
    /// stream: the module imports them side by side.
    ///
    /// # Errors
    /// As `take`; [`Error::Busy`] while another thread takes a bundle of the stream.
    pub fn take_pages(&self, bundle: &Bundle) -> Result<()> {
        if bundle.kind() != BundleKind::Memory {
            return Err(not_due(bundle));
        }
        self.check_due(bundle)?;
        let lane = self.lanes.of(bundle.stream())?;
        let failed = match self.td.import_pages(&lane, bundle) {
            Ok(pages) => {
                self.pages.fetch_add(pages, Ordering::Relaxed);
                return Ok(());
            }
            Err(failed) => failed,
        };
        self.ask_again(bundle);
        Err(match failed {
            ImportError::Host(error) => error,
            ImportError::Call(failed) if self.phase() == Phase::Live => self.lost(&failed),
            ImportError::Call(failed) => self.failed(&failed),
        })
    }

    /// Asks again for pages that were sent to a guest that runs here, and were not taken.
    pub(super) fn ask_again(&self, bundle: &Bundle) {
        if self.phase() == Phase::Live {
            let mut book = self.td.lock(&self.td.journey.book);
            let sent = bundle.entries.iter().filter(|entry| entry.succeeded());
            sent.for_each(|entry| book.wanted.insert(entry.gfn()));
        }
    }

    /// Gives a vCPU that came what its source's host owed to it, before its handle is made
    /// ([`create_vcpu`](kvm_ops::Backend::create_vcpu)).
    ///
    /// # Errors
    /// [`Error::WrongState`] once the guest runs here; [`Error::Invalid`] for a vCPU that has not come, or a time that cannot
    /// be; [`Error::NotOffered`] where this machine emulates no local APIC and the source's did.
    pub fn set_exit_state(&mut self, id: VcpuId, state: &ExitState) -> Result<()> {
        if !matches!(self.phase(), Phase::Receiving | Phase::Started) {
            return Err(Error::WrongState(self.td.life.step()));
        }
        let vcpus = self.td.ready_vcpus();
        let vcpu = vcpus.iter().find(|vcpu| vcpu.id == id);
        let vcpu = vcpu.ok_or(Error::Invalid(Field::Vcpu, id.0.into()))?;
        self.td.set_exit_state(vcpu, state)
    }

    /// Takes a frame that the guest shares with the host; `None` is a page of zeros.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a frame that no slot covers; [`Error::Exists`] for one that came as a
    /// private page.
    pub fn take_shared(&mut self, gfn: Gfn, page: Option<&[u8; PAGE_SIZE as usize]>) -> Result<()> {
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        let mut private = self.td.write_private();
        if private.slots.covered(gfn, 1) == 0 {
            return Err(Error::NotFound(Field::Gfn, gfn.get()));
        }
        if private.mirror.lookup(gfn).entry != PrivateSpte::Absent {
            return Err(Error::Exists(Field::Gfn, gfn.get()));
        }
        self.td.set_shared(gfn, 1, true)?;
        private.attributes.set(gfn, 1, Privacy::Shared)?;
        let zeros = [0; PAGE_SIZE as usize];
        self.td
            .on_td_port(|port| port.write_slot(gpa, page.unwrap_or(&zeros)))
    }

    /// Makes the guest this TD's, which runs it (TDH.IMPORT.END). After a [`commit`](Self::commit): all of
    /// its pages have come. After an error it may be tried again.
    ///
    /// # Errors
    /// [`Error::WrongState`] before the start token; the module's.
    pub fn own(&mut self) -> Result<()> {
        let phase = self.phase();
        if !matches!(phase, Phase::Started | Phase::Live) {
            return Err(Error::WrongState(self.td.life.step()));
        }
        let (calls, tdr) = (self.td.calls()?, self.td.tdr()?);
        // A guest that runs here already may be in the way.
        self.td
            .without_vcpus(|| calls.import_end(tdr))
            .map_err(|failed| self.failed(&failed))?;
        self.set_phase(Phase::Own);
        if phase == Phase::Live {
            self.td.journey.set_awaits_pages(false);
            *self.td.lock(&self.td.journey.book) = Book::default();
            return Ok(());
        }
        self.begin_to_run("a guest came from another host")
    }

    fn begin_to_run(&self, how: &'static str) -> Result<()> {
        self.td.drop_scratch();
        self.td.took_step(how, None);
        self.td.life.advance(Step::Runnable)
    }

    /// Lets the guest run here before all of its pages have come (TDH.IMPORT.COMMIT): a post-copy. From here
    /// on no call brings it back to its source. Where it touches a page that has not come its vCPU waits in
    /// [`vcpu_run`](kvm_ops::VcpuOps::vcpu_run); [`wanted`](Self::wanted) names the page. Once all have come,
    /// [`own`](Self::own) ends the import.
    ///
    /// # Errors
    /// [`Error::WrongState`] before the start token; the module's.
    pub fn commit(&mut self) -> Result<()> {
        if self.phase() != Phase::Started {
            return Err(Error::WrongState(self.td.life.step()));
        }
        let tdr = self.td.tdr()?;
        self.call(|calls| calls.import_commit(tdr))?;
        self.set_phase(Phase::Live);
        self.td.journey.set_awaits_pages(true);
        self.begin_to_run("a guest runs here while its pages come from another host")
    }

    /// Returns whether a private page is there.
    pub fn has_page(&self, gfn: Gfn) -> bool {
        let found = self.td.read_private().mirror.lookup(gfn);
        found.entry != PrivateSpte::Absent
    }

    /// True if the import was given up, or a call left the TD so that it cannot go on.
    pub(super) fn is_over(&self) -> bool {
        self.phase() == Phase::Ended || self.td.require_live().is_err()
    }

    /// Takes the frames for which the guest waits since the last call.
    pub fn wanted(&self) -> Vec<Gfn> {
        let mut book = self.td.lock(&self.td.journey.book);
        let mut wanted = book.wanted.take_first(usize::MAX);
        drop(book);
        let private = self.td.read_private();
        // Some have come since.
        wanted.retain(|gfn| private.mirror.lookup(*gfn).entry == PrivateSpte::Absent);
        wanted
    }

    /// Says that the [source](super::Outgoing::has_page) has no page there: the guest gets a new one, which it
    /// must accept.
    pub fn never_had(&self, gfn: Gfn) {
        let mut book = self.td.lock(&self.td.journey.book);
        book.absent.insert(gfn);
    }

    /// A failure once the guest runs here: its other pages cannot come any more, and so it is lost, unless
    /// nothing has changed.
    fn lost(&self, failed: &Failed) -> Error {
        let error = failed.error();
        // A call that was not made has changed nothing.
        if failed.status().is_some() && !error.is_transient() {
            self.set_phase(Phase::Ended);
            let advice = "pages of the guest are lost, and it with them; destroy this VM";
            self.td
                .poison_by(failed.report(&self.td.life, Some(advice)));
        }
        error
    }

    /// Gives the guest up for good (TDH.IMPORT.ABORT), and returns the token with which the source runs
    /// it again, also after the start token. The VM is poisoned.
    ///
    /// # Errors
    /// [`Error::WrongState`] before the first bundle, where the source needs no token, and once the
    /// guest is this TD's; the module's.
    pub fn abort(&mut self) -> Result<Bundle> {
        if matches!(self.phase(), Phase::New | Phase::Live | Phase::Own) {
            return Err(Error::WrongState(self.td.life.step()));
        }
        let (at, tdr) = (self.lanes.of(0)?.at(1), self.td.tdr()?);
        self.call(|calls| calls.import_abort(tdr, at))?;
        self.set_phase(Phase::Ended);
        self.td.give_up("the guest that came was given up");
        self.lanes.of(0)?.take_token()
    }
}

impl<H: Host> Drop for Incoming<'_, H> {
    fn drop(&mut self) {
        if !matches!(self.phase(), Phase::New | Phase::Own | Phase::Ended) {
            self.td
                .give_up("the migration ended before the guest was complete");
        }
    }
}

fn not_due(bundle: &Bundle) -> Error {
    Error::Invalid(Field::Bundle, bundle.type_number().into())
}
