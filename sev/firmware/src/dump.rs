//! Readable pictures of a platform.

use crate::firmware::Sp;
use crate::firmware::asid::{AsidState, GuestId};
use crate::firmware::rules::{GuestState, PlatformState, SnpState};
use crate::machine::Machine;
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::machine::region::{PAGE, PAGES};
use std::collections::BTreeMap;
use std::fmt;

/// An SEV or SEV-ES guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestInfo {
    /// Handle.
    pub handle: u32,
    /// Policy.
    pub policy: u32,
    /// ASID, if active.
    pub asid: Option<u32>,
    /// State.
    pub state: GuestState,
}

/// An SNP guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnpGuestInfo {
    /// Address of the context page.
    pub context: u64,
    /// Policy.
    pub policy: u64,
    /// ASID, if active.
    pub asid: Option<u32>,
    /// State.
    pub state: SnpState,
    /// Launch digest so far.
    pub launch_digest: [u8; 48],
}

/// Pages that lie side by side and have like entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmpRange {
    /// System physical address.
    pub spa: u64,
    /// Number of pages of the entries' size.
    pub pages: usize,
    /// Entry of the first; guest addresses rise along the range.
    pub entry: RmpEntry,
}

/// Guests, ASIDs and RMP at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// State for SEV and SEV-ES.
    pub platform: PlatformState,
    /// True if SNP is initialised.
    pub snp: bool,
    /// SEV and SEV-ES guests by handle.
    pub guests: Vec<GuestInfo>,
    /// SNP guests by context page.
    pub snp_guests: Vec<SnpGuestInfo>,
    /// ASIDs that are bound or need a flush.
    pub asids: Vec<(u32, AsidState)>,
    /// Pages that are not in hypervisor state.
    pub rmp: Vec<RmpRange>,
}

impl Snapshot {
    pub(crate) fn take(sp: &Sp, machine: &Machine) -> Self {
        Self {
            platform: sp.platform_state(),
            snp: sp.snp.is_some(),
            guests: sp
                .guests
                .iter()
                .map(|(handle, g)| GuestInfo {
                    handle: *handle,
                    policy: g.policy.bits(),
                    asid: g.asid,
                    state: g.state,
                })
                .collect(),
            snp_guests: sp
                .contexts
                .iter()
                .map(|(context, g)| SnpGuestInfo {
                    context: *context,
                    policy: g.policy.bits(),
                    asid: g.asid,
                    state: g.state,
                    launch_digest: g.digest.value(),
                })
                .collect(),
            asids: sp
                .asids
                .iter()
                .filter(|(_, s)| **s != AsidState::Free)
                .map(|(asid, s)| (asid, s.clone()))
                .collect(),
            rmp: ranges(machine),
        }
    }

    /// Number of 4 KiB pages in each state but Hypervisor.
    pub fn pages_by_state(&self) -> BTreeMap<PageState, usize> {
        let mut out = BTreeMap::new();
        for range in &self.rmp {
            let small = range.entry.size.bytes() as usize / PAGE;
            *out.entry(range.entry.state).or_default() += range.pages * small;
        }
        out
    }

    /// The guest that an ASID is bound to; the first if a key is shared.
    pub fn owner_of(&self, asid: u32) -> Option<GuestId> {
        self.asids.iter().find_map(|(a, state)| match state {
            AsidState::Bound(guests) if *a == asid => guests.first().copied(),
            _ => None,
        })
    }
}

fn ranges(machine: &Machine) -> Vec<RmpRange> {
    let mut out: Vec<RmpRange> = Vec::new();
    for (base, region) in machine.memory.regions() {
        let region = region.lock();
        if region.is_hypervisor() {
            continue;
        }
        let entries = if region.is_large() { 1 } else { PAGES };
        for index in 0..entries {
            let entry = region.entry(index);
            if entry.state != PageState::Hypervisor {
                append(&mut out, base + (index * PAGE) as u64, entry);
            }
        }
    }
    out
}

fn append(out: &mut Vec<RmpRange>, spa: u64, entry: RmpEntry) {
    if let Some(last) = out.last_mut() {
        let len = last.pages as u64 * last.entry.size.bytes();
        let gpa = if entry.asid == 0 {
            0
        } else {
            last.entry.gpa + len
        };
        if last.spa + len == spa && (RmpEntry { gpa, ..last.entry }) == entry {
            last.pages += 1;
            return;
        }
    }
    out.push(RmpRange {
        spa,
        pages: 1,
        entry,
    });
}

impl fmt::Display for RmpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.pages as u64 * self.entry.size.bytes();
        let what = match self.entry.size {
            PageSize::Size4K => "pages",
            PageSize::Size2M => "large pages",
        };
        let end = self.spa + len - 1;
        write!(
            f,
            "{:#012x}-{end:#012x} {:>5} {what} {}",
            self.spa, self.pages, self.entry
        )
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let snp = if self.snp { "INIT" } else { "UNINIT" };
        writeln!(f, "platform {}, snp {snp}", self.platform)?;
        let asid = |a: Option<u32>| a.map_or("-".to_owned(), |a| format!("{a:#x}"));
        for g in &self.guests {
            let GuestInfo {
                handle,
                policy,
                state,
                ..
            } = g;
            writeln!(
                f,
                "  handle {handle:#x} {state} policy {policy:#x} asid {}",
                asid(g.asid)
            )?;
        }
        for g in &self.snp_guests {
            let SnpGuestInfo {
                context,
                policy,
                state,
                ..
            } = g;
            writeln!(
                f,
                "  gctx {context:#x} {state} policy {policy:#x} asid {}",
                asid(g.asid)
            )?;
        }
        let dirty = self
            .asids
            .iter()
            .filter(|(_, s)| *s == AsidState::Dirty)
            .count();
        writeln!(f, "asids: {dirty} need a flush")?;
        for (asid, state) in &self.asids {
            if let AsidState::Bound(guests) = state {
                write!(f, "  asid {asid:#x}:")?;
                for guest in guests {
                    write!(f, " {guest}")?;
                }
                writeln!(f)?;
            }
        }
        writeln!(f, "rmp: {} ranges outside hypervisor state", self.rmp.len())?;
        for range in &self.rmp {
            writeln!(f, "  {range}")?;
        }
        Ok(())
    }
}
