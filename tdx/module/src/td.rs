//! A TD: what hardware keeps in TDR and TDCS.

use crate::arena::lock;
use crate::config::PlatformConfig;
use crate::l2;
use crate::lock::Sharex;
use crate::measure::{Measurement, Mr};
use crate::memory::LineKey;
use crate::migrate::Streams;
use crate::op_state::OpState;
use crate::sept::{self, Content, Tables};
use crate::servtd::Bindings;
use crate::status::Status;
use crate::virt::cpuid::Flags;
use crate::virt::tables::Quad;
use crate::virt::tsc::VirtualTsc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Life cycle of a TD, which follows the life of its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Lifecycle {
    /// Has a key id without key.
    HkidAssigned = 0,
    /// The key is configured on every package.
    KeysConfigured = 1,
    /// No vCPU may run any more; caches are being written back.
    Blocked = 2,
    /// The key id is free; pages can be reclaimed.
    Teardown = 3,
}

impl Lifecycle {
    /// The name in the manuals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Lifecycle::HkidAssigned => "HKID_ASSIGNED",
            Lifecycle::KeysConfigured => "KEYS_CONFIGURED",
            Lifecycle::Blocked => "BLOCKED",
            Lifecycle::Teardown => "TEARDOWN",
        }
    }
}

/// ATTRIBUTES.DEBUG.
pub(crate) const ATTR_DEBUG: u64 = 1;
/// ATTRIBUTES.SEPT_VE_DISABLE.
pub(crate) const ATTR_SEPT_VE_DISABLE: u64 = 1 << 28;
/// ATTRIBUTES.MIGRATABLE.
pub(crate) const ATTR_MIGRATABLE: u64 = 1 << 29;
/// ATTRIBUTES.PKS.
pub(crate) const ATTR_PKS: u64 = 1 << 30;
/// ATTRIBUTES.PERFMON.
pub(crate) const ATTR_PERFMON: u64 = 1 << 63;
/// CONFIG_FLAGS.GPAW.
pub(crate) const FLAG_GPAW: u64 = 1;
/// CONFIG_FLAGS.FLEXIBLE_PENDING_VE.
pub(crate) const FLAG_FLEXIBLE_PENDING_VE: u64 = 1 << 1;
/// CONFIG_FLAGS.NO_RBP_MOD.
pub(crate) const FLAG_NO_RBP_MOD: u64 = 1 << 2;

/// TD_CTLS.PENDING_VE_DISABLE.
pub(crate) const CTLS_PENDING_VE_DISABLE: u64 = 1;
/// TD_CTLS.ENUM_TOPOLOGY.
pub(crate) const CTLS_ENUM_TOPOLOGY: u64 = 1 << 1;
/// HP_LOCK_TIMEOUT unless the host sets another, in microseconds.
const HP_LOCK_TIMEOUT_US: u64 = 1_000_000;
const US_PER_SECOND: u128 = 1_000_000;

/// Fields of a TD that TDH.MNG.INIT sets and nothing changes later.
#[derive(Clone, Debug, Default)]
pub(crate) struct TdConfig {
    pub(crate) attributes: u64,
    pub(crate) xfam: u64,
    pub(crate) max_vcpus: u16,
    pub(crate) l2_vms: u8,
    pub(crate) eptp_controls: u64,
    pub(crate) config_flags: u64,
    pub(crate) tsc_frequency: u16,
    /// MRCONFIGID, MROWNER, MROWNERCONFIG.
    pub(crate) mr_config_id: [Mr; 3],
    /// CPUID values by row of the table of leaves.
    pub(crate) cpuid: Vec<Quad>,
    pub(crate) flags: Flags,
    pub(crate) arch_capabilities: u64,
    /// The MSR bitmaps page.
    pub(crate) msr_bitmaps: Vec<u64>,
    pub(crate) tsc: VirtualTsc,
}

/// Counters and keys of a TD's migration, as TDCS keeps them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Migration {
    pub(crate) export_count: u32,
    pub(crate) import_count: u32,
    pub(crate) mig_epoch: u32,
    pub(crate) bw_epoch: u64,
    pub(crate) total_mb_count: u64,
    pub(crate) dirty_count: u64,
    pub(crate) mig_count: u64,
    pub(crate) num_migs: u16,
    pub(crate) num_migrated_vcpus: u32,
    pub(crate) dec_key_set: bool,
    pub(crate) version: u16,
    pub(crate) working_version: u16,
    /// MIG_ENC_KEY: what this TD encrypts its exports with.
    pub(crate) enc_key: [u64; 4],
    pub(crate) enc_working_key: [u64; 4],
    /// MIG_DEC_KEY: what the other side encrypts with.
    pub(crate) dec_key: [u64; 4],
    pub(crate) dec_working_key: [u64; 4],
    /// TD_UUID before the import replaced it.
    pub(crate) pre_import_uuid: [u64; 4],
}

/// A TD. Padded, so that TDs do not share cache lines.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Td {
    // TDR; changed with the TDR page held exclusively, counters atomically.
    pub(crate) pa: AtomicU64,
    pub(crate) fatal: AtomicBool,
    lifecycle: AtomicU8,
    pub(crate) hkid: AtomicU32,
    pub(crate) pkg_bitmap: AtomicU64,
    pub(crate) num_tdcx: AtomicU32,
    pub(crate) tdcx: [AtomicU64; 9],
    pub(crate) chldcnt: AtomicU64,
    pub(crate) key: Mutex<Option<Arc<LineKey>>>,
    uuid: Mutex<[u64; 4]>,
    // TDCS: its locks,
    pub(crate) op_state_lock: Sharex,
    pub(crate) tree: Sharex,
    pub(crate) epoch_lock: Sharex,
    pub(crate) rtmr_lock: Sharex,
    /// Migration state as a whole: taken by leaves that create streams or start a session.
    pub(crate) mig_lock: Sharex,
    /// The bindings of service TDs.
    pub(crate) servtd_lock: Sharex,
    // its state,
    op_state: AtomicU8,
    pub(crate) num_vcpus: AtomicU32,
    pub(crate) num_assoc: AtomicU32,
    pub(crate) epoch: AtomicU64,
    pub(crate) refcount: [AtomicU64; 2],
    /// Slot of the root table; [`NO_ROOT`] before MNG.INIT.
    pub(crate) root: AtomicU32,
    /// The same of each L2 VM's tree.
    pub(crate) l2_roots: [AtomicU32; l2::MAX_VMS],
    pub(crate) td_ctls: AtomicU64,
    /// VM_CTLS of L1, which has none, and of the L2 VMs.
    pub(crate) vm_ctls: [AtomicU64; 4],
    /// Every vCPU has been given an x2APIC id.
    pub(crate) topology_configured: AtomicBool,
    /// HP_LOCK_TIMEOUT in native TSC ticks.
    pub(crate) hp_lock_timeout: AtomicU64,
    pub(crate) notify_enables: AtomicU64,
    // and its configuration, the hot part of it apart.
    pub(crate) attributes: AtomicU64,
    pub(crate) config_flags: AtomicU64,
    levels: AtomicU8,
    pub(crate) l2_vms: AtomicU8,
    config: Mutex<Arc<TdConfig>>,
    migration: Mutex<Migration>,
    pub(crate) streams: Streams,
    bindings: Mutex<Bindings>,
    pub(crate) measurement: Mutex<Measurement>,
    /// x2APIC id of each vCPU index; absent ones count as 0.
    pub(crate) x2apic_ids: Mutex<Vec<u32>>,
}

/// Slot of no table.
const NO_ROOT: u32 = u32::MAX;

const ACQ: Ordering = Ordering::Acquire;
const REL: Ordering = Ordering::Release;

impl Td {
    /// Makes the slot a fresh TD.
    pub(crate) fn create(&self, pa: u64, hkid: u16, uuid: [u64; 4]) {
        self.pa.store(pa, REL);
        self.fatal.store(false, REL);
        self.set_lifecycle(Lifecycle::HkidAssigned);
        self.hkid.store(u32::from(hkid), REL);
        self.pkg_bitmap.store(0, REL);
        self.num_tdcx.store(0, REL);
        self.chldcnt.store(0, REL);
        *lock(&self.key) = None;
        self.set_op_state(OpState::Uninitialized);
        self.num_vcpus.store(0, REL);
        self.num_assoc.store(0, REL);
        lock(&self.x2apic_ids).clear();
        *lock(&self.uuid) = uuid;
        *lock(&self.migration) = Migration::default();
        self.tdcx.iter().for_each(|pa| pa.store(0, REL));
        self.root.store(NO_ROOT, REL);
        self.set_config(TdConfig::default());
        self.streams.reset();
        *lock(&self.bindings) = Bindings::default();
        self.epoch.store(0, REL);
        self.refcount.iter().for_each(|r| r.store(0, REL));
        *lock(&self.measurement) = Measurement::default();
    }

    /// Enters op_state INITIALIZED with a root table of L1 and one of each L2 VM.
    pub(crate) fn initialize(&self, config: TdConfig, root: u32, l2_roots: &[u32], tsc_hz: u64) {
        self.root.store(root, REL);
        for (slot, root) in self.l2_roots.iter().zip(l2_roots) {
            slot.store(*root, REL);
        }
        self.td_ctls.store(
            u64::from(config.attributes & ATTR_SEPT_VE_DISABLE != 0),
            REL,
        );
        self.vm_ctls.iter().for_each(|ctls| ctls.store(0, REL));
        self.topology_configured.store(true, REL);
        self.set_hp_lock_timeout_us(HP_LOCK_TIMEOUT_US, tsc_hz);
        self.notify_enables.store(0, REL);
        self.num_vcpus.store(0, REL);
        self.num_assoc.store(0, REL);
        self.epoch.store(1, REL);
        self.refcount.iter().for_each(|r| r.store(0, REL));
        *lock(&self.measurement) = Measurement::default();
        self.set_config(config);
        self.set_op_state(OpState::Initialized);
    }

    /// Makes the TD of an import that has brought the immutable state. Measurements and number of vCPUs are the
    /// imported ones.
    pub(crate) fn begin_import(&self, config: TdConfig) {
        let disables_ve = config.attributes & ATTR_SEPT_VE_DISABLE != 0;
        self.td_ctls.store(u64::from(disables_ve), REL);
        self.num_assoc.store(0, REL);
        self.epoch.store(1, REL);
        self.refcount.iter().for_each(|r| r.store(0, REL));
        self.set_config(config);
    }

    /// Takes a root table if the TD has none. False if there is no room for one.
    pub(crate) fn ensure_root(&self, tables: &Tables) -> bool {
        if self.root.load(ACQ) == NO_ROOT {
            let root = sept::new_table(tables, 0);
            self.root.store(root.unwrap_or(NO_ROOT), REL);
        }
        self.root.load(ACQ) != NO_ROOT
    }

    /// Replaces the configuration, the hot parts of it included.
    pub(crate) fn set_config(&self, config: TdConfig) {
        self.attributes.store(config.attributes, REL);
        self.config_flags.store(config.config_flags, REL);
        self.levels
            .store((config.eptp_controls >> 3 & 7) as u8 + 1, REL);
        self.l2_vms.store(config.l2_vms, REL);
        *lock(&self.config) = Arc::new(config);
    }

    /// A word of the imported TD_UUID; the TD's own moves to PRE_IMPORT_UUID.
    pub(crate) fn import_uuid(&self, i: usize, word: u64) {
        let mut uuid = lock(&self.uuid);
        if let (Some(own), Some(before)) =
            (uuid.get_mut(i), self.migration().pre_import_uuid.get_mut(i))
        {
            *before = core::mem::replace(own, word);
        }
    }

    /// Returns true if TDCS has the pages that `l2_vms` L2 VMs need.
    pub(crate) fn has_l2_pages(&self, l2_vms: u8) -> bool {
        self.num_tdcx.load(ACQ) >= crate::config::TDCS_BASE_PAGES + u32::from(l2_vms)
    }

    /// The x2APIC id of a vCPU, if topology is enumerated and another vCPU has the same.
    pub(crate) fn shared_x2apic_id(&self, index: u32) -> Option<u32> {
        let ids = lock(&self.x2apic_ids);
        let id = ids.get(index as usize).copied().unwrap_or(0);
        let used = ids.iter().take(self.num_vcpus.load(ACQ) as usize);
        let shared = used.filter(|other| **other == id).count() > 1;
        (shared && self.topology_configured.load(ACQ)).then_some(id)
    }

    pub(crate) fn lifecycle(&self) -> Lifecycle {
        match self.lifecycle.load(ACQ) {
            0 => Lifecycle::HkidAssigned,
            1 => Lifecycle::KeysConfigured,
            2 => Lifecycle::Blocked,
            _ => Lifecycle::Teardown,
        }
    }

    pub(crate) fn set_lifecycle(&self, to: Lifecycle) {
        self.lifecycle.store(to as u8, REL);
    }

    pub(crate) fn op_state(&self) -> OpState {
        OpState::from_number(self.op_state.load(ACQ))
    }

    pub(crate) fn set_op_state(&self, to: OpState) {
        self.op_state.store(to as u8, REL);
    }

    pub(crate) fn is_fatal(&self) -> bool {
        self.fatal.load(ACQ)
    }

    pub(crate) fn pa(&self) -> u64 {
        self.pa.load(ACQ)
    }

    pub(crate) fn hkid(&self) -> u16 {
        self.hkid.load(ACQ) as u16
    }

    pub(crate) fn attributes(&self) -> u64 {
        self.attributes.load(ACQ)
    }

    pub(crate) fn is_debug(&self) -> bool {
        self.attributes() & ATTR_DEBUG != 0
    }

    pub(crate) fn config(&self) -> Arc<TdConfig> {
        lock(&self.config).clone()
    }

    pub(crate) fn measurement(&self) -> MutexGuard<'_, Measurement> {
        lock(&self.measurement)
    }

    pub(crate) fn migration(&self) -> MutexGuard<'_, Migration> {
        lock(&self.migration)
    }

    pub(crate) fn bindings(&self) -> MutexGuard<'_, Bindings> {
        lock(&self.bindings)
    }

    /// TD_UUID
    pub(crate) fn uuid(&self) -> [u64; 4] {
        *lock(&self.uuid)
    }

    /// Content of a Secure-EPT entry after its page is removed. An import in progress records the epoch of the
    /// removal, so that no older copy of the page is imported in its place.
    pub(crate) fn emptied(&self) -> Content {
        if self.op_state().is_import_in_progress() {
            Content::removed(self.migration().mig_epoch)
        } else {
            Content::FREE
        }
    }

    /// Ends an import for good; the status says so with the fatal flag.
    pub(crate) fn import_failed(&self, status: Status) -> Status {
        self.set_op_state(OpState::FailedImport);
        status.fatal()
    }

    pub(crate) fn has_flag(&self, flag: u64) -> bool {
        self.config_flags.load(ACQ) & flag != 0
    }

    /// HP_LOCK_TIMEOUT in microseconds, for a native TSC of this frequency.
    pub(crate) fn hp_lock_timeout_us(&self, tsc_hz: u64) -> u64 {
        let ticks = u128::from(self.hp_lock_timeout.load(ACQ));
        (ticks * US_PER_SECOND / u128::from(tsc_hz.max(1))) as u64
    }

    pub(crate) fn set_hp_lock_timeout_us(&self, us: u64, tsc_hz: u64) {
        // The module keeps 32 bits of them.
        let ticks = u128::from(us) * u128::from(tsc_hz) / US_PER_SECOND;
        self.hp_lock_timeout.store(u64::from(ticks as u32), REL);
    }

    /// Address of the page that holds the root of the Secure EPT.
    pub(crate) fn root_pa(&self) -> u64 {
        self.tdcx[3].load(ACQ)
    }

    /// The address under which the processor reaches a page of the TD: with its key id.
    pub(crate) fn private_pa(&self, cfg: &PlatformConfig, pa: u64) -> u64 {
        pa | u64::from(self.hkid()) << (52 - cfg.keyid_bits)
    }

    /// 48 or 52.
    pub(crate) fn gpa_width(&self) -> u32 {
        if self.has_flag(FLAG_GPAW) { 52 } else { 48 }
    }

    pub(crate) fn shared_bit(&self) -> u64 {
        1 << (self.gpa_width() - 1)
    }

    /// Levels of the Secure EPT, 4 or 5.
    pub(crate) fn levels(&self) -> u8 {
        self.levels.load(ACQ)
    }

    /// Private and within the GPA width.
    pub(crate) fn is_valid_private_gpa(&self, gpa: u64) -> bool {
        gpa >> self.gpa_width() == 0 && gpa & self.shared_bit() == 0
    }

    pub(crate) fn walk<'a>(
        &self,
        tables: &'a Tables,
        gpa: u64,
        level: u8,
    ) -> Option<sept::Walked<'a>> {
        sept::walk(
            tables,
            self.root.load(ACQ),
            self.levels().saturating_sub(1),
            gpa,
            level,
        )
    }

    /// L2 VMs of the TD, at most 3.
    pub(crate) fn num_l2_vms(&self) -> usize {
        usize::from(self.l2_vms.load(ACQ)).min(l2::MAX_VMS)
    }

    /// VM_CTLS of an L2 VM: TDG.MEM.PAGE.ATTR.WR exits to the host if a table is missing.
    pub(crate) fn exits_on_l2_walk_failure(&self, vm: usize) -> bool {
        self.vm_ctls
            .get(vm)
            .is_some_and(|ctls| ctls.load(ACQ) & 1 != 0)
    }

    /// Walks the tree of an L2 VM; `None` for one the TD does not have.
    pub(crate) fn walk_l2<'a>(
        &self,
        tables: &'a Tables,
        vm: usize,
        gpa: u64,
        level: u8,
    ) -> Option<l2::L2Walked<'a>> {
        let roots = self.l2_roots.get(..self.num_l2_vms())?;
        let root = roots.get(vm.checked_sub(1)?)?;
        let top = self.levels().saturating_sub(1);
        l2::walk(tables, root.load(ACQ), top, gpa, level)
    }

    pub(crate) fn key(&self) -> Option<Arc<LineKey>> {
        lock(&self.key).clone()
    }

    pub(crate) fn current_epoch(&self) -> u64 {
        self.epoch.load(ACQ)
    }

    /// Returns true if no vCPU can still use a translation blocked in epoch `b`.
    pub(crate) fn is_tracked(&self, b: u64) -> bool {
        let epoch = self.current_epoch();
        b.checked_add(1).is_some_and(|next| {
            next < epoch || next == epoch && self.refcount[(b & 1) as usize].load(ACQ) == 0
        })
    }

    /// Gives the slots of all tables back; no table of the TD may be in use.
    pub(crate) fn free_tables(&self, tables: &Tables) {
        if self.root.load(ACQ) == NO_ROOT {
            return;
        }
        // Levels bound the depth, so this cannot recurse far.
        fn free(tables: &Tables, slot: u32, level: u8) {
            if let Some(table) = tables.get(slot) {
                for content in table.entries.iter().map(|e| e.get()) {
                    if content.state().is_table() && level > 0 {
                        free(tables, content.slot(), level - 1);
                    }
                }
            }
            tables.free(slot);
        }
        let top = self.levels().saturating_sub(1);
        free(tables, self.root.load(ACQ), top);
        for root in &self.l2_roots[..self.num_l2_vms()] {
            l2::free_tree(tables, root.load(ACQ), top);
        }
    }

    pub(crate) fn add_children(&self, pages: u64) {
        self.chldcnt.fetch_add(pages, Ordering::AcqRel);
    }

    pub(crate) fn remove_children(&self, pages: u64) {
        self.chldcnt.fetch_sub(pages, Ordering::AcqRel);
    }
}
