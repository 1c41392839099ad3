//! `KVM_REGISTER_COALESCED_MMIO`: writes of the guest that wait in a ring until user space looks at it.

use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ops_uapi::checks::coalesced_mmio::{COPY, MEMORY, PIO, ROOM};
use kvm_ops_uapi::irq::{
    COALESCED_MMIO_MAX, CoalescedMmio, CoalescedMmioRing, CoalescedMmioZone, MAX_BUS_DEVICES,
};
use kvm_ops_uapi::run::COALESCED_MMIO_PAGE;
use kvm_ops_uapi::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::ioevents::At;
use crate::refusal::{Result, ensure};
use crate::vm::Vm;
use crate::{Process, RunArea, arg};

/// Where the ring is in a vCPU's run area.
const RING: u64 = COALESCED_MMIO_PAGE * 4096;

/// A range of addresses or ports.
#[derive(Clone, Copy)]
struct Zone {
    at: At,
    size: u64,
}

impl Zone {
    /// `None` if the structure names neither of the two buses.
    fn of(args: &CoalescedMmioZone) -> Option<Self> {
        let at = match args.pio.get() {
            0 => At::Memory(args.addr.get()),
            1 => At::Port(args.addr.get()),
            _ => return None,
        };
        let size = args.size.get().into();
        Some(Self { at, size })
    }

    /// True if all of the other one is in it.
    fn contains(&self, other: &Self) -> bool {
        let (start, from) = (self.at.address(), other.at.address());
        let ends = (start.checked_add(self.size), from.checked_add(other.size));
        let fits = matches!(ends, (Some(end), Some(to)) if start <= from && to <= end);
        self.at.shares_bus(other.at) && fits
    }
}

/// The zones of a VM. Their lock is also the ring's, which all vCPUs share.
#[derive(Default)]
pub(super) struct Coalesced {
    zones: Mutex<Vec<Zone>>,
    /// How many there are, so that a VM without pays nothing for an exit.
    count: AtomicUsize,
}

impl Coalesced {
    fn lock(&self) -> MutexGuard<'_, Vec<Zone>> {
        self.zones.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Zone>) -> Result<()>) -> Result<()> {
        let mut zones = self.lock();
        change(&mut zones)?;
        self.count.store(zones.len(), Ordering::Release);
        Ok(())
    }

    /// The devices on a place's bus that are no eventfds.
    pub(super) fn on_bus(&self, at: At) -> usize {
        let zones = self.lock();
        zones.iter().filter(|zone| zone.at.shares_bus(at)).count()
    }

    /// Puts a write of the guest into the ring, in the run area of any vCPU. False if it is in no zone, or the ring is full.
    pub(super) fn take_write(&self, at: At, data: &[u8], area: &dyn RunArea) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let write = Zone {
            at,
            size: data.len() as u64,
        };
        let zones = self.lock();
        zones.iter().any(|zone| zone.contains(&write)) && put(at, data, area)
    }
}

/// Both numbers are the program's to write, too.
fn put(at: At, data: &[u8], area: &dyn RunArea) -> bool {
    let mut ring = CoalescedMmioRing::new_zeroed();
    area.read(RING, ring.as_mut_bytes());
    let (first, last) = (ring.first.get(), ring.last.get());
    let mut entry = CoalescedMmio {
        phys_addr: U64::new(at.address()),
        len: U32::new(data.len() as u32),
        pio: U32::new(matches!(at, At::Port(_)).into()),
        ..CoalescedMmio::default()
    };
    let next = last.wrapping_add(1) % COALESCED_MMIO_MAX;
    if last >= COALESCED_MMIO_MAX || next == first || data.len() > entry.data.len() {
        return false;
    }
    entry.data[..data.len()].copy_from_slice(data);
    let place = size_of::<CoalescedMmioRing>() + last as usize * size_of::<CoalescedMmio>();
    area.write(RING + place as u64, entry.as_bytes());
    // The program may look at any time: the number comes after what it counts.
    fence(Ordering::Release);
    let number = std::mem::offset_of!(CoalescedMmioRing, last);
    area.write(RING + number as u64, &next.to_le_bytes());
    true
}

/// `KVM_REGISTER_COALESCED_MMIO`.
pub(crate) fn coalesce(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: CoalescedMmioZone = arg::read(process, argument, COPY)?;
    let new = Zone::of(&args).ok_or(PIO)?;
    vm.kernel().faults().allocate(MEMORY)?;
    vm.irq().coalesced.change(|zones| {
        let on_bus = zones.iter().filter(|zone| zone.at.shares_bus(new.at));
        ensure(on_bus.count() < MAX_BUS_DEVICES, ROOM)?;
        zones.push(new);
        Ok(())
    })?;
    Ok(0)
}

/// `KVM_UNREGISTER_COALESCED_MMIO`: zones that contain the range go.
pub(crate) fn do_not_coalesce(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: CoalescedMmioZone = arg::read(process, argument, COPY)?;
    let gone = Zone::of(&args).ok_or(PIO)?;
    vm.irq().coalesced.change(|zones| {
        zones.retain(|zone| !zone.contains(&gone));
        Ok(())
    })?;
    Ok(0)
}
