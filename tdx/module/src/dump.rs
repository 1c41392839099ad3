//! Looking at the module's tables from outside, and holding its locks as another agent would.

use crate::call::owner_of;
use crate::kot::HkidState;
use crate::lock::{LockMode, Sharex, Side};
use crate::measure::Digest384;
use crate::op_state::OpState;
use crate::pamt::{PageSize, PageType};
use crate::platform::Platform;
use crate::sept::{self, Content, SeptState};
use crate::td::{Lifecycle, Td};
use crate::vcpu::VcpuState;
use std::fmt::{self, Write as _};
use std::sync::atomic::Ordering::Acquire;

/// A row of the key ownership table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HkidView {
    /// Key id.
    pub hkid: u16,
    /// Its state.
    pub state: HkidState,
    /// Packages that still have caches to write back.
    pub wbinvd_bitmap: u64,
}

/// A PAMT entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageView {
    /// Use of the page.
    pub page_type: PageType,
    /// PA of the owning TDR; 0 for a TDR; kept by a page that has been freed.
    pub owner: u64,
    /// TD epoch of the last blocking.
    pub bepoch: u64,
}

/// TDR and TDCS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the field names are the architecture's
pub struct TdView {
    pub tdr: u64,
    pub fatal: bool,
    pub num_tdcx: u32,
    pub chldcnt: u64,
    pub lifecycle: Lifecycle,
    pub hkid: u16,
    pub pkg_bitmap: u64,
    pub op_state: OpState,
    pub num_vcpus: u32,
    pub num_assoc: u32,
    pub epoch: u64,
    pub refcount: [u64; 2],
    pub mrtd: Digest384,
    pub rtmr: [Digest384; 4],
}

/// The counters of a TD's migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the field names are the architecture's
pub struct MigrationView {
    pub export_count: u32,
    pub import_count: u32,
    pub mig_epoch: u32,
    pub bw_epoch: u64,
    pub total_mb_count: u64,
    pub dirty_count: u64,
    pub mig_count: u64,
    pub num_migs: u16,
    pub num_migrated_vcpus: u32,
    pub dec_key_set: bool,
    pub version: u16,
    pub working_version: u16,
}

/// TDVPS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuView {
    /// PA of the owning TDR.
    pub tdr: u64,
    /// State.
    pub state: VcpuState,
    /// TDVPR and TDCX pages.
    pub pages: u32,
    /// Processor the vCPU is associated with.
    pub assoc_lp: Option<usize>,
    /// Index in the TD.
    pub index: u32,
}

/// Entry at which a walk to a GPA ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeptView {
    /// Level of the entry.
    pub level: u8,
    /// State of the entry.
    pub state: SeptState,
    /// The entry as TDH.MEM.SEPT.RD shows it.
    pub entry: u64,
}

/// A lock of the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the fields locate the object
pub enum LockTarget {
    /// The module's global lock.
    Global,
    /// The key ownership table.
    Kot,
    /// A package's write-back state.
    Wbt { package: usize },
    /// A TDMR, by its position in the configuration.
    Tdmr { index: usize },
    /// One PAMT entry.
    Pamt { pa: u64, size: PageSize },
    /// A TD's op_state.
    OpState { tdr: u64 },
    /// A TD's Secure-EPT tree.
    SeptTree { tdr: u64 },
    /// A TD's epoch.
    TdEpoch { tdr: u64 },
    /// A TD's RTMRs.
    Rtmr { tdr: u64 },
    /// A TD's migration state.
    Mig { tdr: u64 },
    /// A TD's bindings of service TDs.
    Servtd { tdr: u64 },
    /// One Secure-EPT entry (a mutex, whatever the mode).
    SeptEntry { tdr: u64, gpa: u64, level: u8 },
}

impl Platform {
    pub(crate) fn td_at(&self, tdr: u64) -> Option<&Td> {
        let entry = self.pamt.get()?.entry(tdr, PageSize::Size4K)?;
        (entry.page_type() == PageType::Tdr).then(|| self.tds.get(entry.slot()))?
    }

    fn sharex(&self, target: LockTarget) -> Option<&Sharex> {
        Some(match target {
            LockTarget::Global => &self.global,
            LockTarget::Kot => &self.kot.lock,
            LockTarget::Wbt { package } => &self.packages.get(package)?.wbt,
            LockTarget::Tdmr { index } => &self.pamt.get()?.tdmrs.get(index)?.lock,
            LockTarget::Pamt { pa, size } => &self.pamt.get()?.entry(pa, size)?.lock,
            LockTarget::OpState { tdr } => &self.td_at(tdr)?.op_state_lock,
            LockTarget::SeptTree { tdr } => &self.td_at(tdr)?.tree,
            LockTarget::TdEpoch { tdr } => &self.td_at(tdr)?.epoch_lock,
            LockTarget::Rtmr { tdr } => &self.td_at(tdr)?.rtmr_lock,
            LockTarget::Mig { tdr } => &self.td_at(tdr)?.mig_lock,
            LockTarget::Servtd { tdr } => &self.td_at(tdr)?.servtd_lock,
            LockTarget::SeptEntry { .. } => return None,
        })
    }

    /// Takes a lock as another agent of the host does, and keeps it until [`Platform::release`]. False if
    /// it is taken, or does not exist.
    pub fn hold(&self, target: LockTarget, mode: LockMode) -> bool {
        if let LockTarget::SeptEntry { tdr, gpa, level } = target {
            let walked = self
                .td_at(tdr)
                .and_then(|td| td.walk(&self.tables, gpa, level));
            return walked.is_some_and(|w| w.level == level && w.entry.word().try_lock(Side::Host));
        }
        self.sharex(target)
            .is_some_and(|lock| lock.try_lock(mode, Side::Host))
    }

    /// Gives back a lock taken with [`Platform::hold`] in the same mode. Giving back what was not taken
    /// breaks the platform's locking, though nothing else.
    pub fn release(&self, target: LockTarget, mode: LockMode) {
        if let LockTarget::SeptEntry { tdr, gpa, level } = target {
            if let Some(w) = self
                .td_at(tdr)
                .and_then(|td| td.walk(&self.tables, gpa, level))
            {
                w.entry.word().unlock();
            }
        } else if let Some(lock) = self.sharex(target) {
            lock.unlock(mode);
        }
    }

    /// The key ownership table's row of a private key id.
    #[must_use]
    pub fn hkid(&self, hkid: u16) -> Option<HkidView> {
        let state = self.kot.state(hkid)?;
        Some(HkidView {
            hkid,
            state,
            wbinvd_bitmap: self.kot.wbinvd_bitmap(hkid),
        })
    }

    /// The metadata of a page at a size; `None` outside all TDMRs.
    #[must_use]
    pub fn page(&self, pa: u64, size: PageSize) -> Option<PageView> {
        let entry = self.pamt.get()?.entry(pa, size)?;
        Some(PageView {
            page_type: entry.page_type(),
            owner: owner_of(self, entry),
            bepoch: entry.bepoch(),
        })
    }

    /// Writes memory as its user would: a TD's page under the TD's key, if its lines are the TD's already, and all
    /// else as the host does. For transcripts of flat memory, where a store needs no key.
    ///
    /// # Errors
    /// The range is not RAM.
    #[cfg(feature = "conform")]
    pub(crate) fn poke_memory(&self, pa: u64, data: &[u8]) -> Result<(), crate::MemoryError> {
        const PAGE: usize = 4096;
        let mut at = self.host_access(pa, data.len())?;
        let mut rest = data;
        while !rest.is_empty() {
            let n = (PAGE - at as usize % PAGE).min(rest.len());
            let (part, after) = rest.split_at(n);
            let key = self.owner_key(at);
            if key.is_none() || self.mem.private_write(at, part, key.as_deref()).is_err() {
                self.mem.host_write(at, part);
            }
            at += n as u64;
            rest = after;
        }
        Ok(())
    }

    /// The key of the TD that a private page of any size belongs to.
    #[cfg(feature = "conform")]
    fn owner_key(&self, pa: u64) -> Option<std::sync::Arc<crate::memory::LineKey>> {
        let sizes = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
        let owner = sizes.into_iter().find_map(|size| {
            let page = self.page(pa & !(size.bytes() - 1), size)?;
            (page.page_type == PageType::Reg).then_some(page.owner)
        })?;
        self.td_at(owner)?.key()
    }

    /// A TD, by the PA of its TDR.
    #[must_use]
    pub fn td(&self, tdr: u64) -> Option<TdView> {
        let td = self.td_at(tdr)?;
        let measurement = td.measurement();
        Some(TdView {
            tdr,
            fatal: td.is_fatal(),
            num_tdcx: td.num_tdcx.load(Acquire),
            chldcnt: td.chldcnt.load(Acquire),
            lifecycle: td.lifecycle(),
            hkid: td.hkid(),
            pkg_bitmap: td.pkg_bitmap.load(Acquire),
            op_state: td.op_state(),
            num_vcpus: td.num_vcpus.load(Acquire),
            num_assoc: td.num_assoc.load(Acquire),
            epoch: td.current_epoch(),
            refcount: [0, 1].map(|i| td.refcount[i].load(Acquire)),
            mrtd: measurement.mrtd.0,
            rtmr: measurement.rtmr.map(|r| r.0),
        })
    }

    /// The migration counters of a TD, by the PA of its TDR.
    #[must_use]
    pub fn migration(&self, tdr: u64) -> Option<MigrationView> {
        let m = *self.td_at(tdr)?.migration();
        Some(MigrationView {
            export_count: m.export_count,
            import_count: m.import_count,
            mig_epoch: m.mig_epoch,
            bw_epoch: m.bw_epoch,
            total_mb_count: m.total_mb_count,
            dirty_count: m.dirty_count,
            mig_count: m.mig_count,
            num_migs: m.num_migs,
            num_migrated_vcpus: m.num_migrated_vcpus,
            dec_key_set: m.dec_key_set,
            version: m.version,
            working_version: m.working_version,
        })
    }

    /// A vCPU, by the PA of its TDVPR.
    #[must_use]
    pub fn vcpu(&self, tdvpr: u64) -> Option<VcpuView> {
        let entry = self.pamt.get()?.entry(tdvpr, PageSize::Size4K)?;
        if entry.page_type() != PageType::Tdvpr {
            return None;
        }
        let vcpu = self.vcpus.get(entry.slot())?;
        Some(VcpuView {
            tdr: vcpu.td_pa(),
            state: vcpu.state(),
            pages: vcpu.pages.load(Acquire),
            assoc_lp: usize::try_from(vcpu.assoc_lp.load(Acquire)).ok(),
            index: vcpu.index.load(Acquire),
        })
    }

    /// The entry at which a walk of a TD's Secure EPT to `level` ends; `None` without such a TD or before its
    /// TDH.MNG.INIT.
    #[must_use]
    pub fn sept(&self, tdr: u64, gpa: u64, level: u8) -> Option<SeptView> {
        let td = self
            .td_at(tdr)
            .filter(|td| td.op_state() != OpState::Uninitialized)?;
        let w = td.walk(&self.tables, gpa, level)?;
        Some(SeptView {
            level: w.level,
            state: w.content.state(),
            entry: w.content.architectural(),
        })
    }

    /// The key ownership table, one line for each key id that is not free.
    #[must_use]
    pub fn dump_kot(&self) -> String {
        let mut out = String::from("hkid  state     wbinvd\n");
        for row in self.kot.hkids().filter_map(|h| self.hkid(h)) {
            if row.state != HkidState::Free {
                let _ = writeln!(
                    out,
                    "{:>4}  {:<8}  {:#x}",
                    row.hkid,
                    row.state.name(),
                    row.wbinvd_bitmap
                );
            }
        }
        out
    }

    /// The pages in use, in runs of equal type and owner.
    #[must_use]
    pub fn dump_pamt(&self) -> String {
        let mut out = String::from("range                                 size type   owner\n");
        for t in self.pamt.get().into_iter().flat_map(|p| &p.tdmrs) {
            let mut run: Option<(u64, u64, PageSize, PageType, u64)> = None;
            let mut flush = |run: &mut Option<(u64, u64, PageSize, PageType, u64)>| {
                if let Some((from, to, size, page_type, owner)) = run.take() {
                    let size = ["4K", "2M", "1G"][size as usize];
                    let name = page_type.name();
                    let _ = writeln!(out, "{from:#018x}-{to:#018x}  {size}  {name:<6} {owner:#x}");
                }
            };
            t.for_each_used(|pa, size, entry| {
                let owner = owner_of(self, entry);
                let end = pa + size.bytes();
                match &mut run {
                    Some((_, to, s, ty, o))
                        if *to == pa && *s == size && *ty == entry.page_type() && *o == owner =>
                    {
                        *to = end;
                    }
                    _ => {
                        flush(&mut run);
                        run = Some((pa, end, size, entry.page_type(), owner));
                    }
                }
            });
            flush(&mut run);
        }
        out
    }

    /// A TD's Secure EPT, an indented line for each table and each run of like leaves; empty without such a
    /// TD.
    #[must_use]
    pub fn dump_sept(&self, tdr: u64) -> String {
        let mut out = String::new();
        if let Some(td) = self
            .td_at(tdr)
            .filter(|td| td.op_state() != OpState::Uninitialized)
        {
            let top = td.levels().saturating_sub(1);
            self.dump_table(&mut out, td.root.load(Acquire), top, top, 0);
        }
        out
    }

    fn dump_table(&self, out: &mut String, slot: u32, level: u8, top: u8, base: u64) {
        let Some(table) = self.tables.get(slot) else {
            return;
        };
        let indent = usize::from(top - level) * 2;
        let step = 1u64 << (12 + 9 * u32::from(level));
        let mut i = 0;
        while i < 512 {
            let content = table.entries[i].get();
            let gpa = base + i as u64 * step;
            let state = content.state();
            let is_table = state.is_table();
            let mut run = 1;
            if state.is_leaf() {
                let follows = |k: usize| {
                    let next: Content = table.entries[i + k].get();
                    next.state() == state && next.hpa() == content.hpa() + k as u64 * step
                };
                while i + run < 512 && follows(run) {
                    run += 1;
                }
                let _ = writeln!(
                    out,
                    "{:indent$}L{level} {gpa:#014x} x{run:<3} {:<15} hpa {:#x}",
                    "",
                    state.name(),
                    content.hpa()
                );
            } else if is_table && level > 0 {
                let child = content.slot();
                let hpa = self.tables.get(child).map_or(0, sept::Table::hpa);
                let _ = writeln!(
                    out,
                    "{:indent$}L{level} {gpa:#014x}      {:<15} table {hpa:#x}",
                    "",
                    state.name()
                );
                self.dump_table(out, child, level - 1, top, gpa);
            }
            i += run;
        }
    }
}

impl fmt::Display for TdView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "TDR {:#x}{}",
            self.tdr,
            if self.fatal { " FATAL" } else { "" }
        )?;
        writeln!(
            f,
            "  lifecycle {}  hkid {}  pkg_bitmap {:#x}",
            self.lifecycle.name(),
            self.hkid,
            self.pkg_bitmap
        )?;
        writeln!(f, "  num_tdcx {}  chldcnt {}", self.num_tdcx, self.chldcnt)?;
        writeln!(
            f,
            "TDCS op_state {}  vcpus {} ({} associated)  epoch {}  refcount {:?}",
            self.op_state.name(),
            self.num_vcpus,
            self.num_assoc,
            self.epoch,
            self.refcount
        )?;
        writeln!(f, "  MRTD  {}", hex::encode(self.mrtd))?;
        for (i, rtmr) in self.rtmr.iter().enumerate() {
            writeln!(f, "  RTMR{i} {}", hex::encode(rtmr))?;
        }
        Ok(())
    }
}

impl fmt::Display for VcpuView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "TDVPS of TDR {:#x}: {}, index {}, {} pages, ",
            self.tdr,
            self.state.name(),
            self.index,
            self.pages
        )?;
        match self.assoc_lp {
            Some(lp) => write!(f, "on lp {lp}"),
            None => f.write_str("not associated"),
        }
    }
}
