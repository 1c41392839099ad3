//! One link's part of a session, at the end that a TD comes to.

use alloc::vec::Vec;

use embedded_io::{Read, Write};
use kvm_ops::{Error, Host};
use kvm_ops_mmu::Mutex;
use kvm_ops_wire::{Fields, Flow, MigrateError, Phase, Progress, ProtocolError};

use super::bundle::{Bundle, BundleKind};
use super::receiver::{Budget, Receiver, progress};
use super::record::{self, Kind, Wire};

type Result<T> = core::result::Result<T, MigrateError>;

/// A record with the number that was due.
enum Record {
    Bundle(Bundle),
    Other(Kind, Vec<u8>),
}

impl Record {
    fn receive<L: Read + Write>(wire: &mut Wire<'_, L>, due: u64) -> Result<Self> {
        let (kind, index, payload) = wire.receive()?;
        if index != due {
            return Err(ProtocolError::Index { due, got: index }.into());
        }
        Ok(match kind {
            Kind::Bundle => Self::Bundle(record::parse_bundle(payload)?),
            kind => Self::Other(kind, Vec::from(payload)),
        })
    }
}

impl<H: Host> Receiver<'_, H> {
    pub(super) fn serve<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        before: u64,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        // A link that is not the source's changes nothing.
        self.greet(wire)?;
        if self.returned.is_some() {
            return Err(MigrateError::Cancelled);
        }
        if let Some(why) = self.following.lost {
            return Err(MigrateError::Lost(why));
        }
        if self.phase == Phase::Done {
            return Ok(());
        }
        let ended = self.records(wire, before, watch);
        self.failed |=
            self.phase == Phase::Copying && ended.is_err_and(|error| !error.is_of_the_link());
        ended
    }

    fn records<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        before: u64,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<()> {
        // A record that came behind pages.
        let mut behind = None;
        loop {
            let record = match behind.take() {
                Some(record) => record,
                None => Record::receive(wire, self.next)?,
            };
            let answer = match record {
                Record::Other(Kind::Start, payload) => {
                    let token = record::parse_bundle(&payload)?;
                    self.start(wire, &token, watch)?;
                    match self.phase {
                        Phase::PostCopy => continue,
                        _ => return Ok(()),
                    }
                }
                Record::Other(kind @ (Kind::Left | Kind::Complete), payload)
                    if self.phase == Phase::PostCopy =>
                {
                    let left = match kind {
                        Kind::Left => Some(Fields::of(&payload).u64()?),
                        _ => None,
                    };
                    self.bytes = before + wire.bytes;
                    match self.turn(wire, left)? {
                        // Too late to cancel: the answer does not matter.
                        true => {
                            let _ = watch(&self.progress());
                            return Ok(());
                        }
                        false => continue,
                    }
                }
                Record::Other(Kind::Cancel, _) if self.phase < Phase::Committed => {
                    self.phase = Phase::Cancelled;
                    return Err(MigrateError::Cancelled);
                }
                Record::Other(kind, payload) => self.take(kind, &payload)?,
                Record::Bundle(bundle)
                    if bundle.kind() == BundleKind::Memory
                        && matches!(self.phase, Phase::Copying | Phase::PostCopy) =>
                {
                    behind = Some(self.pages(wire, before, bundle, watch)?);
                    continue;
                }
                Record::Bundle(bundle) if self.phase == Phase::Copying => {
                    self.take_bundle(&bundle)?;
                    None
                }
                Record::Bundle(_) => {
                    return Err(ProtocolError::Unexpected(Kind::Bundle as u8).into());
                }
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

    /// Takes bundles of pages, on all streams, the first of which has come. Returns the record that came
    /// behind them, once all of them are taken.
    fn pages<L: Read + Write>(
        &mut self,
        wire: &mut Wire<'_, L>,
        before: u64,
        first: Bundle,
        watch: &mut dyn FnMut(&Progress) -> Flow,
    ) -> Result<Record> {
        let Self {
            target,
            threads,
            phase,
            next,
            budget,
            round,
            bytes,
            following,
            ..
        } = self;
        let target = &*target;
        let failed = Mutex::new(None::<Error>);
        let has_failed = || failed.lock(core::hint::spin_loop).is_some();
        let mut came = Some(first);
        let mut receive = || -> Result<core::result::Result<Bundle, Record>> {
            let record = match came.take() {
                Some(bundle) => Record::Bundle(bundle),
                None => Record::receive(wire, *next)?,
            };
            let bundle = match record {
                Record::Bundle(bundle) if bundle.kind() == BundleKind::Memory => bundle,
                behind => return Ok(Err(behind)),
            };
            budget.spend(cost(&bundle))?;
            *next += 1;
            *bytes = before + wire.bytes;
            let mut progress = progress(target, *phase, *round, *bytes);
            following.fill_in(&mut progress);
            match watch(&progress) {
                Flow::Cancel if *phase < Phase::Prepared => Err(MigrateError::Cancelled),
                _ => Ok(Ok(bundle)),
            }
        };
        let mut behind = Err(MigrateError::Truncated);
        threads.take(
            target.streams(),
            &mut || {
                if has_failed() {
                    return None;
                }
                match receive() {
                    Ok(Ok(bundle)) => return Some(bundle),
                    Ok(Err(record)) => behind = Ok(record),
                    Err(error) => behind = Err(error),
                }
                None
            },
            &|bundle| {
                if has_failed() {
                    target.ask_again(&bundle);
                    return;
                }
                if let Err(error) = target.take_pages(&bundle) {
                    failed.lock(core::hint::spin_loop).get_or_insert(error);
                }
            },
        );
        if let Some(error) = failed.into_inner() {
            return MigrateError::at("TDH.IMPORT.MEM", Err(error));
        }
        if matches!(behind, Err(MigrateError::Cancelled)) {
            self.phase = Phase::Cancelled;
        }
        behind
    }

    fn greet<L: Read + Write>(&mut self, wire: &mut Wire<'_, L>) -> Result<()> {
        let (kind, _, payload) = wire.receive()?;
        let (id, link) = record::parse_session(payload)?;
        match (kind, self.session) {
            // A source that has not heard the answer says it again.
            (Kind::Hello | Kind::HelloPostCopy, session)
                if self.next == 0 && session.is_none_or(|known| known == id) =>
            {
                let shape = record::parse_hello(payload)?;
                wire.seal.bind(&id, link, &[0; 24]);
                self.following.agreed = kind == Kind::HelloPostCopy;
                if self.following.agreed && !self.following.offered {
                    return Err(ProtocolError::NoPostCopy.into());
                }
                MigrateError::at("shape of the guest", self.target.accept(&shape))?;
                let each = shape.layout.frames().saturating_add(shape.vcpus.into());
                self.budget = Budget::of(each.saturating_mul(self.limits.times.into()));
                self.session = Some(id);
                self.phase = Phase::Copying;
            }
            (Kind::Resume, Some(session)) if session == id => {
                wire.seal.bind(&id, link, &[0; 24]);
                if self.returned.is_some() {
                    return self.send_returned(wire);
                }
                if self.following.lost.is_some() {
                    return Ok(());
                }
            }
            (Kind::Hello | Kind::HelloPostCopy | Kind::Resume, _) => {
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
        match (kind, self.phase) {
            (Kind::Absent, Phase::PostCopy) => {
                self.budget.spend(1)?;
                self.absent(&record::parse_frames(payload)?);
                return Ok(None);
            }
            (Kind::Sync, Phase::PostCopy) | (_, Phase::Copying) => {}
            _ => return Err(ProtocolError::Unexpected(kind as u8).into()),
        }
        match kind {
            Kind::Shared => {
                self.budget.spend(1)?;
                let (gfn, page) = record::parse_shared(payload)?;
                MigrateError::at("shared page", self.target.take_shared(gfn, page))?;
                Ok(None)
            }
            Kind::ExitState => {
                self.budget.spend(1)?;
                let (vcpu, state) = record::parse_exit_state(payload)?;
                if !self.target.has_vcpu(vcpu) {
                    return Err(ProtocolError::Field("vCPU").into());
                }
                MigrateError::at("exit state", self.target.set_exit_state(vcpu, &state))?;
                Ok(None)
            }
            Kind::Sync => {
                self.budget.spend(1)?;
                Ok(Some(Kind::Synced))
            }
            Kind::RoundEnd => {
                self.budget.spend(1)?;
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

    /// Takes a bundle that has no pages of memory.
    fn take_bundle(&mut self, bundle: &Bundle) -> Result<()> {
        if bundle.is_start_token() {
            return Err(ProtocolError::Field("bundle").into());
        }
        self.budget.spend(cost(bundle))?;
        MigrateError::at(operation(bundle.kind()), self.target.take(bundle))
    }
}

/// A bundle costs as many records as it has pages, and one.
fn cost(bundle: &Bundle) -> u64 {
    1 + bundle.guest_pages() as u64
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
