//! A VM: slots, the second-level table, and the mailboxes of its vCPUs. For a confidential VM this is
//! the part that it shares with the host.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_ops::{
    Error, Field, Gfn, Gpa, Irqchip, Kick, Level, MemSlot, PAGE_SIZE, Result, SevPort,
    SharedMemory, SlotId, Step, TdPort, Tech, VcpuId, VmParams, VmPort,
};

use crate::access::{Copy, host_access};
use crate::frame_set::FrameSet;
use crate::host::Machine;
use crate::irq::Wake;
use crate::table::{FRAMES, GPA_BITS, Mapping, Table};
use crate::{SimVcpu, TableStats};

/// A VM of the software platform: a normal one, or what a confidential one shares with the host.
///
/// [`close`](VmPort::close), and dropping this value, deletes every slot and ends all runs; a vCPU
/// that is left answers [`Error::WrongState`] from then on.
pub struct SimVm {
    pub(crate) inner: Arc<VmInner>,
}

/// The part of a VM that its vCPUs hold too.
pub(crate) struct VmInner {
    pub(crate) machine: Arc<Machine>,
    pub(crate) tech: Tech,
    /// Empty but for a SEV guest.
    pub(crate) sev: crate::sev::Guest,
    params: VmParams,
    /// One lock for slots and table: an access holds it shared while it copies, so a deleted slot
    /// is out of use when the deletion returns.
    memory: RwLock<Memory>,
    vcpus: Mutex<BTreeMap<VcpuId, Arc<Wake>>>,
    /// Set when the VM is closed: no vCPU runs afterwards.
    closed: AtomicBool,
}

#[derive(Default)]
pub(crate) struct Memory {
    slots: BTreeMap<SlotId, MemSlot>,
    dirty: BTreeMap<SlotId, Vec<u64>>,
    /// The frames of a confidential VM that it does not share with the host. See
    /// [`set_shared`](Memory::set_shared) for its size.
    private: FrameSet,
    table: Table,
}

impl SimVm {
    pub(crate) fn new(machine: Arc<Machine>, tech: Tech, params: VmParams) -> Self {
        machine.vm_created();
        Self {
            inner: Arc::new(VmInner {
                machine,
                tech,
                sev: crate::sev::Guest::default(),
                params,
                memory: RwLock::default(),
                vcpus: Mutex::default(),
                closed: AtomicBool::new(false),
            }),
        }
    }

    /// The state of the second-level table.
    pub fn table_stats(&self) -> TableStats {
        self.inner.read().table.stats
    }
}

impl VmInner {
    pub(crate) fn irqchip(&self) -> Irqchip {
        self.params.irqchip
    }

    pub(crate) fn is_sev(&self) -> bool {
        matches!(self.tech, Tech::Sev | Tech::SevEs | Tech::SevSnp)
    }

    /// # Errors
    /// [`Error::WrongState`] once the VM is closed.
    pub(crate) fn require_open(&self) -> Result<()> {
        match self.closed.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::WrongState(Step::Drained)),
        }
    }

    /// Deletes the slots and all mappings, and ends the runs of vCPUs that are left. An access
    /// copies under the memory's lock, so none is under way when this returns.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        *self.write() = Memory::default();
        self.sev.close();
        self.vcpus().values().for_each(|wake| wake.kick());
    }

    fn vcpus(&self) -> MutexGuard<'_, BTreeMap<VcpuId, Arc<Wake>>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mailbox of a TD vCPU, made on first use: the vCPU itself is in the TDX module.
    pub(crate) fn td_wake(&self, vcpu: VcpuId) -> Result<Arc<Wake>> {
        if vcpu.0 >= self.params.vcpus {
            return Err(Error::NotFound(Field::Vcpu, vcpu.0.into()));
        }
        Ok(Arc::clone(self.vcpus().entry(vcpu).or_default()))
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VmInner {
    fn drop(&mut self) {
        self.machine.vm_gone();
    }
}

impl Memory {
    pub(crate) fn lookup(&self, gfn: Gfn) -> Option<Mapping> {
        self.table.lookup(gfn)
    }

    /// True for memory that is not shared with the host. A frame without a slot is MMIO, and one of a
    /// read-only slot cannot be private.
    pub(crate) fn is_private(&self, gfn: Gfn) -> bool {
        self.private.contains(gfn.get()) && self.slot_page(gfn, true).is_some()
    }

    /// Fails unless this very slot was set: number, place and memory. Its flags may have changed.
    fn find(&self, slot: &MemSlot) -> Result<()> {
        match self.slots.get(&slot.id) {
            Some(known) if is_same(known, slot) => Ok(()),
            _ => Err(Error::NotFound(Field::Slot, slot.id.0.into())),
        }
    }

    /// Takes frames out of what is shared, or puts them back.
    ///
    /// Only the frames that slots back change, so that a guest that asks for conversions elsewhere
    /// does not make the set larger than its memory. A range with every slot and half of the
    /// address space, as a back end makes it when the VM starts, also holds for later slots.
    fn set_shared(&mut self, first: Gfn, pages: u64, shared: bool) {
        let range = first.get()..first.get().saturating_add(pages);
        let frames_of = |slot: &MemSlot| {
            let first = Gfn::containing(slot.gpa).get();
            first..first + slot.bytes() / PAGE_SIZE
        };
        let contains = |slot: &MemSlot| {
            let frames = frames_of(slot);
            range.start <= frames.start && frames.end <= range.end
        };
        if pages >= FRAMES / 2 && self.slots.values().all(contains) {
            self.private = FrameSet::default();
            if !shared {
                self.private.insert(0, FRAMES);
            }
        }
        for frames in self.slots.values().map(frames_of) {
            let start = range.start.max(frames.start);
            let pages = range.end.min(frames.end).saturating_sub(start);
            if shared {
                self.private.remove(start, pages);
            } else {
                self.private.insert(start, pages);
            }
        }
        if !shared {
            self.table.zap(first, pages);
        }
    }

    fn slot_at(&self, gpa: Gpa) -> Option<&MemSlot> {
        self.slots.values().find(|slot| contains(slot, gpa))
    }

    /// The host address of a page of a slot. `None` for a write to a read-only one.
    pub(crate) fn slot_page(&self, gfn: Gfn, write: bool) -> Option<u64> {
        let gpa = gfn.base()?;
        let slot = self.slot_at(gpa)?;
        let allowed = !write || !slot.flags.read_only;
        allowed.then(|| slot.host.address() + (gpa.get() - slot.gpa.get()))
    }

    /// Resolves a violation from the slots. `None` means MMIO: no slot is there, or the write goes
    /// to a read-only slot.
    pub(crate) fn resolve(&mut self, gfn: Gfn, write: bool) -> Option<Mapping> {
        // Another vCPU may have resolved it while this one waited for the lock.
        if let Some(mapping) = self.lookup(gfn).filter(|m| m.writable || !write) {
            return Some(mapping);
        }
        self.table.stats.violations += 1;
        let gpa = gfn.base()?;
        let slot = *self.slot_at(gpa)?;
        if write && slot.flags.read_only {
            return None;
        }
        let offset = gpa.get() - slot.gpa.get();
        if !slot.flags.log_dirty && self.map_2m(&slot, gfn) {
            return self.table.lookup(gfn);
        }
        if write {
            if let Some(bitmap) = self.dirty.get_mut(&slot.id) {
                let page = offset / PAGE_SIZE;
                bitmap[(page / 64) as usize] |= 1 << (page % 64);
            }
        }
        let writable = !slot.flags.read_only && (write || !slot.flags.log_dirty);
        let mapping = Mapping {
            host: slot.host.address() + offset,
            writable,
        };
        self.table
            .map(gfn, Level::Size4K, mapping)
            .then_some(mapping)
    }

    /// Maps the whole 2 MiB around `gfn`, where slot and host memory allow it.
    fn map_2m(&mut self, slot: &MemSlot, gfn: Gfn) -> bool {
        let first = Gfn::new(gfn.get() & !(Level::Size2M.frames() - 1));
        let Some(gpa) = first.base() else {
            return false;
        };
        let last = gpa.get() + (Level::Size2M.bytes() - 1);
        if gpa < slot.gpa || !slot.last().is_ok_and(|end| last <= end.get()) {
            return false;
        }
        let host = slot.host.address() + (gpa.get() - slot.gpa.get());
        if host % Level::Size2M.bytes() != 0 {
            return false;
        }
        let mapping = Mapping {
            host,
            writable: !slot.flags.read_only,
        };
        self.table.map(first, Level::Size2M, mapping)
    }

    fn zap(&mut self, slot: &MemSlot) {
        self.table
            .zap(Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE);
    }
}

/// Compares number, place and memory.
fn is_same(a: &MemSlot, b: &MemSlot) -> bool {
    (a.id, a.gpa, a.host, a.private) == (b.id, b.gpa, b.host, b.private)
}

fn contains(slot: &MemSlot, gpa: Gpa) -> bool {
    slot.gpa <= gpa && slot.last().is_ok_and(|last| gpa <= last)
}

impl VmPort for SimVm {
    type Vcpu = SimVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<SimVcpu> {
        if id.0 >= self.inner.params.vcpus {
            return Err(Error::Invalid(Field::Vcpu, id.0.into()));
        }
        let mut vcpus = self.inner.vcpus();
        if vcpus.contains_key(&id) {
            return Err(Error::Exists(Field::Vcpu, id.0.into()));
        }
        let wake = Arc::new(Wake::default());
        vcpus.insert(id, Arc::clone(&wake));
        Ok(SimVcpu::new(id, Arc::clone(&self.inner), wake))
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        let last = slot.last()?;
        if last.get() >> GPA_BITS != 0 {
            return Err(Error::Invalid(Field::Gpa, last.get()));
        }
        if slot.private.is_some() {
            static GUEST_MEMFD: kvm_ops::OpName = kvm_ops::OpName("guest_memfd");
            return Err(Error::HostLacks(&GUEST_MEMFD));
        }
        let mut memory = self.inner.write();
        if memory.slots.contains_key(&slot.id) && memory.find(slot).is_err() {
            return Err(Error::Exists(Field::Slot, slot.id.0.into()));
        }
        if let Some(other) = memory
            .slots
            .values()
            .find(|o| o.id != slot.id && o.overlaps(slot))
        {
            return Err(Error::Invalid(Field::OverlappedSlot, other.id.0.into()));
        }
        if let Some(old) = memory.slots.insert(slot.id, *slot) {
            memory.zap(&old);
        }
        if slot.flags.log_dirty {
            // A log that goes on keeps what it has, as on KVM.
            memory
                .dirty
                .entry(slot.id)
                .or_insert_with(|| vec![0; slot.dirty_words()]);
        } else {
            memory.dirty.remove(&slot.id);
        }
        Ok(())
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        let mut memory = self.inner.write();
        memory.find(slot)?;
        memory.slots.remove(&slot.id);
        memory.dirty.remove(&slot.id);
        memory.zap(slot);
        Ok(())
    }

    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        let mut memory = self.inner.write();
        memory.find(slot)?;
        let Memory { dirty, table, .. } = &mut *memory;
        let Some(log) = dirty.get_mut(&slot.id) else {
            return Err(Error::NotFound(Field::Slot, slot.id.0.into()));
        };
        if bitmap.len() != log.len() {
            return Err(Error::Invalid(Field::BufferLength, bitmap.len() as u64));
        }
        bitmap.copy_from_slice(log);
        log.fill(0);
        table.write_protect(Gfn::containing(slot.gpa), slot.bytes() / PAGE_SIZE);
        Ok(())
    }

    /// Does nothing: guest programs have no real mode that would need pages.
    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    /// Does nothing: guest programs have no real mode that would need pages.
    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        crate::registers::has_msr(index)
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        let wake = match self.inner.tech {
            Tech::Tdx => self.inner.td_wake(vcpu)?,
            _ => {
                let vcpus = self.inner.vcpus();
                let wake = vcpus.get(&vcpu);
                Arc::clone(wake.ok_or(Error::NotFound(Field::Vcpu, vcpu.0.into()))?)
            }
        };
        wake.post(vector);
        Ok(())
    }

    fn td(&self) -> Option<&dyn TdPort> {
        crate::tdx::port(self)
    }

    fn sev(&self) -> Option<&dyn SevPort> {
        crate::sev::port(self)
    }

    /// Never fails.
    fn close(self) -> Result<()> {
        Ok(())
    }
}

impl SharedMemory for SimVm {
    fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()> {
        self.inner.write().set_shared(first, pages, shared);
        Ok(())
    }

    fn read_slot(&self, gpa: Gpa, data: &mut [u8]) -> Result<()> {
        host_access(&self.inner, gpa, Copy::FromGuest(data))
    }

    fn write_slot(&self, gpa: Gpa, data: &[u8]) -> Result<()> {
        host_access(&self.inner, gpa, Copy::ToGuest(data))
    }
}

impl Drop for SimVm {
    fn drop(&mut self) {
        self.inner.close();
    }
}

impl fmt::Debug for SimVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimVm")
            .field("params", &self.inner.params)
            .field("table", &self.table_stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use kvm_ops::{Host, HostRange, Vendor};

    #[test]
    fn a_violation_that_another_vcpu_resolved_first_is_no_mmio() {
        let host = crate::SimHost::new(Vendor::Intel);
        let vm = host.create_vm(Tech::Vmx, &VmParams::new(2)).unwrap();
        // Aligned, so that one mapping covers 2 MiB.
        let large = Level::Size2M.bytes();
        // SAFETY: nothing is read or written through the range: only the table is looked at.
        let range = unsafe { HostRange::new(16 * large, large) }.unwrap();
        vm.set_memory_slot(&MemSlot::new(SlotId(0), Gpa::new(0), range))
            .unwrap();
        let mut memory = vm.inner.write();
        let first = memory.resolve(Gfn::new(1), true);
        assert!(first.is_some());
        assert_eq!(memory.resolve(Gfn::new(1), true), first);
        assert!(memory.resolve(Gfn::new(2), false).is_some());
        assert_eq!(memory.table.stats.violations, 1);
    }

    #[test]
    fn the_set_of_private_frames_is_no_larger_than_the_memory() {
        let mut memory = Memory::default();
        // SAFETY: only the frame set is looked at.
        let range = unsafe { HostRange::new(0x10_0000, 16 * PAGE_SIZE) }.unwrap();
        let slot = MemSlot::new(SlotId(0), Gpa::new(0x4000), range);
        memory.set_shared(Gfn::new(0), FRAMES / 2, false);
        memory.slots.insert(slot.id, slot);
        assert!(memory.is_private(Gfn::new(4)), "a slot that came later");
        let ranges = |memory: &Memory| memory.private.ranges();
        assert_eq!(ranges(&memory), 1);
        for page in 0..100_000 {
            memory.set_shared(Gfn::new(100 + 2 * page), 1, true);
        }
        assert_eq!(ranges(&memory), 1, "nothing lies there");
        for first in (0..100).step_by(2) {
            memory.set_shared(Gfn::new(first), 1, true);
        }
        let shared = (4..20).filter(|gfn| !memory.is_private(Gfn::new(*gfn)));
        assert_eq!(shared.collect::<Vec<_>>(), [4, 6, 8, 10, 12, 14, 16, 18]);
        assert_eq!(ranges(&memory), 9);
        // A range that a guest may ask for, too short to be the back end's, in any order.
        for first in (0..50_000).rev() {
            memory.set_shared(Gfn::new(0), first, first % 2 == 0);
        }
        assert!(ranges(&memory) <= 10);
        memory.set_shared(Gfn::new(0), FRAMES, true);
        assert_eq!(ranges(&memory), 0);
    }
}
