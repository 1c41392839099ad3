//! ASIDs: who has which, and which must be flushed before anyone else may have it.

use super::{Firmware, Outcome};
use crate::cipher::MemoryKey;
use crate::machine::{Owner, Slot};
use crate::status::Status;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Identity of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GuestId {
    /// An SEV or SEV-ES guest, by handle.
    Handle(u32),
    /// An SNP guest, by the address of its context page.
    Context(u64),
}

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestId::Handle(handle) => write!(f, "handle {handle:#x}"),
            GuestId::Context(spa) => write!(f, "gctx {spa:#x}"),
        }
    }
}

/// State of an ASID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AsidState {
    /// May be bound.
    #[default]
    Free,
    /// Was released, or never used since the platform was initialised: needs WBINVD and DF_FLUSH.
    Dirty,
    /// Bound. More than one guest only if they share a key.
    Bound(Vec<GuestId>),
}

/// Kind of guest, which limits the ASIDs it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AsidKind {
    Sev,
    SevEs,
    Snp,
}

pub(crate) struct Asids(Vec<AsidState>);

impl Asids {
    pub(crate) fn new(max: u32) -> Self {
        Self(vec![AsidState::Free; max as usize + 1])
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &AsidState)> {
        (0..).zip(&self.0).skip(1)
    }

    fn state(&self, asid: u32) -> Option<&AsidState> {
        self.0.get(asid as usize)
    }

    fn bind(&mut self, asid: u32, guest: GuestId) {
        match &mut self.0[asid as usize] {
            AsidState::Bound(guests) => guests.push(guest),
            other => *other = AsidState::Bound(vec![guest]),
        }
    }

    /// Returns true if this was the last guest of the ASID, which then needs a flush.
    pub(crate) fn release(&mut self, asid: u32, guest: GuestId) -> bool {
        let Some(AsidState::Bound(guests)) = self.0.get_mut(asid as usize) else {
            return false;
        };
        guests.retain(|g| *g != guest);
        let last = guests.is_empty();
        if last {
            self.0[asid as usize] = AsidState::Dirty;
        }
        last
    }

    /// After initialisation nothing is known about the caches of any free ASID.
    pub(crate) fn soil(&mut self) {
        for state in self.0.iter_mut().filter(|s| **s == AsidState::Free) {
            *state = AsidState::Dirty;
        }
    }

    pub(crate) fn clean(&mut self) {
        for state in self.0.iter_mut().filter(|s| **s == AsidState::Dirty) {
            *state = AsidState::Free;
        }
    }

    /// Returns true if an ASID that an SNP guest had, or may have, waits for a flush.
    pub(super) fn any_dirty(&self, range: RangeInclusive<u32>) -> bool {
        range
            .into_iter()
            .any(|a| self.state(a) == Some(&AsidState::Dirty))
    }
}

impl Firmware<'_> {
    /// The ASIDs of a kind of guest; may be empty.
    pub(super) fn asid_range(&self, kind: AsidKind) -> RangeInclusive<u32> {
        let config = &self.machine.config;
        let split = self.sp.snp.and_then(|s| s.max_snp_asid);
        match kind {
            AsidKind::Sev => config.min_sev_asid..=config.max_asid,
            AsidKind::SevEs => split.map_or(1, |s| s + 1)..=config.min_sev_asid - 1,
            AsidKind::Snp => 1..=split.unwrap_or(config.min_sev_asid - 1),
        }
    }

    /// Binds a guest to an ASID, with the checks of ACTIVATE and SNP_ACTIVATE in their order.
    pub(super) fn bind_asid(
        &mut self,
        asid: u32,
        kind: AsidKind,
        guest: GuestId,
        current: Option<u32>,
        key: Arc<MemoryKey>,
    ) -> Outcome {
        if !self.asid_range(kind).contains(&asid) {
            return Err(Status::INVALID_ASID);
        }
        if current.is_some() {
            return Err(Status::ACTIVE);
        }
        match self.sp.asids.state(asid) {
            None => return Err(Status::INVALID_ASID),
            Some(AsidState::Bound(guests)) if !self.all_share(guests, &key) => {
                return Err(Status::ASID_OWNED);
            }
            Some(AsidState::Dirty) => return Err(Status::DFFLUSH_REQUIRED),
            Some(_) => {}
        }
        self.sp.asids.bind(asid, guest);
        let owner = match kind {
            AsidKind::Snp => Owner::Snp,
            _ => Owner::Legacy,
        };
        self.machine.set_slot(asid, Some(Slot::new(key, owner)));
        Ok(())
    }

    fn all_share(&self, guests: &[GuestId], key: &Arc<MemoryKey>) -> bool {
        guests.iter().all(|id| match id {
            GuestId::Handle(handle) => self
                .sp
                .guests
                .get(handle)
                .is_some_and(|g| Arc::ptr_eq(&g.key, key)),
            GuestId::Context(_) => false,
        })
    }

    /// The core list of the EX forms: identifiers of existing cores.
    pub(super) fn check_core_list(&self, count: u32, address: u64) -> Outcome {
        let cores = self.machine.config.cores;
        if count > cores {
            return Err(Status::INVALID_PARAM);
        }
        let mut list = vec![0; count as usize * 4];
        self.read(address, &mut list)?;
        let known = |id: &[u8]| crate::wire::u32_at(id, 0) < cores;
        if list.chunks(4).all(known) {
            Ok(())
        } else {
            Err(Status::INVALID_PARAM)
        }
    }
}
