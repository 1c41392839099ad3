//! A program as calls see it that are recorded: all that they read and write is noted.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use kvm_ops::HostRange;
use kvm_ops_uapi::Errno;

use super::canon;
use super::fields::Field;
use super::format::{NewFile, Step};
use super::places::{Bases, Place};
use super::record::Recorder;
use crate::{
    AddressSpace, Descriptor, EventFd, Fault, File, FileKind, FileMemory, PinLimits, Process,
    RunArea, Watch,
};

thread_local! {
    /// Eventfds that the run of this thread signalled.
    pub(super) static SIGNALLED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// The program, with an eye on what the call does to it.
pub(super) struct Traced<'a> {
    pub(super) inner: &'a dyn Process,
    pub(super) recorder: &'a Recorder,
    pub(super) call: RefCell<Traces>,
    /// The number of the file that is called.
    pub(super) maker: u32,
}

pub(super) struct Traces {
    pub(super) bases: Bases,
    pub(super) steps: Vec<Step>,
    /// What the call wrote, of which it may read parts again.
    pub(super) written: Vec<Range<u64>>,
    /// An address that nothing led to.
    pub(super) lost: Option<u64>,
}

/// Memory that a call uses.
enum Used {
    /// What the call's argument leads to.
    Place(Place),
    /// The guest's, at an offset of a slot.
    Slot(u32, u64),
}

impl Traced<'_> {
    /// What an address is. `None` is noted: a replay could not find it.
    fn used(&self, call: &mut Traces, address: u64) -> Option<Used> {
        let place = call.bases.place(address);
        if let Some(near) = place.as_ref().filter(|place| Bases::is_near(place)) {
            return Some(Used::Place(near.clone()));
        }
        if let Some((slot, at)) = self.recorder.lock().slot_at(self.maker, address) {
            return Some(Used::Slot(slot, at));
        }
        if place.is_none() {
            call.lost.get_or_insert(address);
        }
        place.map(Used::Place)
    }

    fn file_number(&self, number: i32) -> u32 {
        match self.inner.descriptor(number) {
            Descriptor::Closed => canon::CLOSED,
            Descriptor::Foreign => canon::FOREIGN,
            Descriptor::File(file) => self.recorder.lock().number(&file),
        }
    }
}

impl Process for Traced<'_> {
    fn address_space(&self) -> AddressSpace {
        self.inner.address_space()
    }

    fn pin_limits(&self) -> PinLimits {
        self.inner.pin_limits()
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        let read = self.inner.read(address, into);
        let mut call = self.call.borrow_mut();
        let end = address.saturating_add(into.len() as u64);
        let mut written = call.written.iter();
        if written.any(|range| range.start < end && address < range.end) {
            return read;
        }
        // Guest memory is not compared.
        if let Some(Used::Place(place)) = self.used(&mut call, address) {
            let step = match read {
                Ok(()) => {
                    let bytes = {
                        let number = |number| self.file_number(number);
                        // The command decides which fields there are.
                        call.bases.learn(&place, into);
                        canon::read(&call.bases, &place, into, number)
                    };
                    Step::Read(place, bytes)
                }
                Err(Fault) => Step::ReadFault(place, into.len()),
            };
            call.steps.push(step);
        }
        read
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let written = self.inner.write(address, bytes);
        let mut call = self.call.borrow_mut();
        let step = match (self.used(&mut call, address), written) {
            (None, _) | (Some(Used::Slot(..)), Err(Fault)) => return written,
            (Some(Used::Slot(slot, at)), Ok(())) => Step::Memory(slot, at, bytes.to_vec()),
            (Some(Used::Place(place)), Err(Fault)) => Step::WriteFault(place),
            (Some(Used::Place(place)), Ok(())) => {
                let end = address.saturating_add(bytes.len() as u64);
                call.written.push(address..end);
                let bytes = canon::written(&call.bases, &place, bytes);
                Step::Write(place, bytes)
            }
        };
        call.steps.push(step);
        written
    }

    // Questions are not part of a record: only their answer counts, and that is the call's.
    fn is_mapped(&self, address: u64, bytes: u64) -> bool {
        self.inner.is_mapped(address, bytes)
    }

    fn is_writable(&self, address: u64, bytes: u64) -> bool {
        self.inner.is_writable(address, bytes)
    }

    fn descriptor(&self, number: i32) -> Descriptor {
        self.inner.descriptor(number)
    }

    fn reserve(&self) -> Result<i32, Errno> {
        self.inner.reserve()
    }

    fn install(&self, number: i32, file: File) {
        let new = match file.kind() {
            FileKind::Vcpu => NewFile::Vcpu,
            FileKind::Stats => NewFile::Stats,
            FileKind::GuestMemfd => {
                let (size, flags) = file.guest_memfd().unwrap_or_default();
                NewFile::GuestMemfd { size, flags }
            }
            FileKind::Vm | FileKind::System | FileKind::Sev => NewFile::Vm,
        };
        let own = self.recorder.lock().name_made(&file, self.maker);
        self.call.borrow_mut().steps.push(Step::New(own, new));
        self.inner.install(number, file);
    }

    fn release(&self, number: i32) {
        self.inner.release(number);
    }

    fn eventfd(&self, number: i32) -> Result<Arc<dyn EventFd>, Errno> {
        let inner = self.inner.eventfd(number)?;
        let mut call = self.call.borrow_mut();
        let own = {
            let mut state = self.recorder.lock();
            state.events += 1;
            state.events - 1
        };
        if let Some(at) = event_field(&call.bases, &call.steps, number, self) {
            call.steps.push(Step::Event(own, at));
        }
        Ok(Arc::new(TracedEvent { inner, own }))
    }

    fn run_area(&self, other: Option<&dyn RunArea>) -> Result<Arc<dyn RunArea>, Errno> {
        self.inner.run_area(other)
    }

    fn signal_pending(&self) -> bool {
        self.inner.signal_pending()
    }

    fn lend(&self, address: u64, bytes: u64, writable: bool) -> Option<HostRange> {
        self.inner.lend(address, bytes, writable)
    }

    fn lend_file(&self, number: i32, offset: u64, bytes: u64) -> Option<Arc<dyn FileMemory>> {
        self.inner.lend_file(number, offset, bytes)
    }
}

/// The field of the argument that has a descriptor.
fn event_field(bases: &Bases, steps: &[Step], number: i32, process: &Traced<'_>) -> Option<usize> {
    let (place, bytes) = steps.iter().find_map(|step| match step {
        Step::Read(place, bytes) => Some((place, bytes)),
        _ => None,
    })?;
    let argument = bases.resolve(place)?;
    let fields = bases.fields_in(place, bytes.len()).into_iter();
    let mut descriptors = fields.filter_map(|field| match field {
        Field::Descriptor(at) => Some(at),
        Field::Address(_) | Field::Time(_) => None,
    });
    descriptors.find(|at| {
        let mut value = [0; 4];
        let read = process
            .inner
            .read(argument.wrapping_add(*at as u64), &mut value);
        read.is_ok() && i32::from_le_bytes(value) == number
    })
}

/// An eventfd whose signals are part of the record.
struct TracedEvent {
    inner: Arc<dyn EventFd>,
    own: u32,
}

impl EventFd for TracedEvent {
    fn id(&self) -> u64 {
        self.inner.id()
    }

    fn signal(&self) {
        SIGNALLED.with_borrow_mut(|signalled| signalled.push(self.own));
        self.inner.signal();
    }

    fn watch(&self, wake: Box<dyn Fn() + Send + Sync>) -> Result<Box<dyn Watch>, Errno> {
        self.inner.watch(wake)
    }
}
