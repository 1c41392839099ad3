//! `KVM_IOEVENTFD`: eventfds that writes of the guest signal.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_uapi::checks::{ioeventfd, ioeventfd_end};
use kvm_ops_uapi::irq::{IoEventFd as Args, MAX_BUS_DEVICES, ioeventfd_flags};

use super::irqfd::event;
use super::is_same;
use crate::refusal::{Result, ensure};
use crate::vm::Vm;
use crate::{EventFd, Process, arg};

/// The place of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Port(u64),
    Memory(u64),
    /// A bus that x86 does not have.
    Ccw(u64),
}

impl At {
    fn of(args: &Args) -> Self {
        let (flags, address) = (args.flags.get(), args.addr.get());
        match () {
            () if flags & ioeventfd_flags::PIO != 0 => Self::Port(address),
            () if flags & ioeventfd_flags::VIRTIO_CCW_NOTIFY != 0 => Self::Ccw(address),
            () => Self::Memory(address),
        }
    }

    pub(super) fn shares_bus(self, other: Self) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&other)
    }

    pub(super) const fn address(self) -> u64 {
        match self {
            Self::Port(address) | Self::Memory(address) | Self::Ccw(address) => address,
        }
    }
}

struct IoEvent {
    event: Arc<dyn EventFd>,
    at: At,
    /// Bytes of the write; 0 for any.
    len: u32,
    /// The value; `None` for any.
    value: Option<u64>,
}

impl IoEvent {
    fn matches(&self, at: At, data: &[u8]) -> bool {
        if self.at != at {
            return false;
        }
        if self.len == 0 {
            return true;
        }
        let mut bytes = [0; 8];
        let len = data.len().min(8);
        bytes[..len].copy_from_slice(&data[..len]);
        let written = u64::from_le_bytes(bytes);
        data.len() == self.len as usize
            && self
                .value
                .is_none_or(|value| truncated(value, self.len) == written)
    }

    /// True if a write could signal both.
    fn collides(&self, other: &Self) -> bool {
        let values = || self.value.is_none() || other.value.is_none() || self.value == other.value;
        self.at == other.at
            && (self.len == 0 || other.len == 0 || self.len == other.len && values())
    }
}

/// The bytes of a value that a write has.
fn truncated(value: u64, len: u32) -> u64 {
    match len {
        1 | 2 | 4 => value & ((1 << (8 * len)) - 1),
        _ => value,
    }
}

/// All of a VM.
#[derive(Default)]
pub(super) struct IoEvents {
    list: Mutex<Vec<IoEvent>>,
    /// How many there are, so that a VM without pays nothing for an exit.
    count: AtomicUsize,
}

impl IoEvents {
    fn lock(&self) -> MutexGuard<'_, Vec<IoEvent>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_write(&self, at: At, data: &[u8]) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let found = {
            let list = self.lock();
            let entry = list.iter().find(|entry| entry.matches(at, data));
            entry.map(|entry| Arc::clone(&entry.event))
        };
        let Some(event) = found else { return false };
        event.signal();
        true
    }
}

/// `KVM_IOEVENTFD`.
pub(crate) fn ioeventfd(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: Args = arg::read(process, argument, ioeventfd::COPY)?;
    match args.flags.get() & ioeventfd_flags::DEASSIGN {
        0 => assign(vm, process, &args),
        _ => deassign(vm, process, &args),
    }
}

fn value(args: &Args) -> Option<u64> {
    let matches = args.flags.get() & ioeventfd_flags::DATAMATCH != 0;
    matches.then_some(args.datamatch.get())
}

fn assign(vm: &Vm, process: &dyn Process, args: &Args) -> Result<i64> {
    use ioeventfd::{DESCRIPTOR, EVENT, FLAGS, LENGTH, MATCH, ROOM, UNUSED, WRAP};
    let len = args.len.get();
    ensure(matches!(len, 0 | 1 | 2 | 4 | 8), LENGTH)?;
    ensure(args.addr.get().checked_add(len.into()).is_some(), WRAP)?;
    ensure(args.flags.get() & !ioeventfd_flags::ALL == 0, FLAGS)?;
    ensure(len != 0 || value(args).is_none(), MATCH)?;
    let new = IoEvent {
        event: event(process, args.fd.get(), DESCRIPTOR, EVENT)?,
        at: At::of(args),
        len,
        value: value(args),
    };
    let events = &vm.irq().ioevents;
    let mut list = events.lock();
    ensure(!list.iter().any(|old| old.collides(&new)), UNUSED)?;
    // Numbers of descriptors limit eventfds already.
    let others = vm.irq().coalesced.on_bus(new.at);
    ensure(others < MAX_BUS_DEVICES, ROOM)?;
    list.push(new);
    events.count.store(list.len(), Ordering::Release);
    Ok(0)
}

fn deassign(vm: &Vm, process: &dyn Process, args: &Args) -> Result<i64> {
    use ioeventfd_end::{DESCRIPTOR, EVENT, FOUND};
    let event = event(process, args.fd.get(), DESCRIPTOR, EVENT)?;
    let (at, len, value) = (At::of(args), args.len.get(), value(args));
    let events = &vm.irq().ioevents;
    let mut list = events.lock();
    let found = list.iter().position(|old| {
        (old.at, old.len, old.value) == (at, len, value) && is_same(&old.event, &event)
    });
    let gone = list.remove(found.ok_or(FOUND)?);
    events.count.store(list.len(), Ordering::Release);
    drop(list);
    drop(gone);
    Ok(0)
}
