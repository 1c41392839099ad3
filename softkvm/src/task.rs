//! A process in software: memory and descriptors without an operating system's.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::ioctl::Ioctl;
use kvm_ops_uapi::run::{COALESCED_MMIO_PAGE, MMAP_SIZE};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::task_event::Event;
use crate::{AddressSpace, Descriptor, EventFd, Fault, File, PinLimits, Process, Refusal, RunArea};

/// A process for tests and for programs that serve others: its memory is a map from addresses to
/// bytes, its descriptors a table. Threads of the process share the value.
pub struct Task {
    id: AddressSpace,
    state: Mutex<State>,
    signal: Arc<AtomicBool>,
}

struct State {
    /// Start and bytes of each mapping. They do not touch.
    memory: BTreeMap<u64, Vec<u8>>,
    /// Mappings that can only be read.
    read_only: BTreeSet<u64>,
    files: BTreeMap<i32, Option<File>>,
    /// Eventfds, whose numbers are reserved among those of files.
    events: BTreeMap<i32, Arc<Event>>,
    limit: i32,
    pin: PinLimits,
    next: u64,
}

/// The first address that [`Task::map`] gives out.
const FIRST: u64 = 0x1_0000_0000;
/// The number of the first descriptor.
const FIRST_FD: i32 = 3;

impl Task {
    /// A process with 1024 descriptors, of which 0 to 2 are taken.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: AddressSpace(NEXT.fetch_add(1, Ordering::Relaxed)),
            state: Mutex::new(State {
                memory: BTreeMap::new(),
                read_only: BTreeSet::new(),
                files: BTreeMap::new(),
                events: BTreeMap::new(),
                limit: 1024,
                pin: PinLimits::NONE,
                next: FIRST,
            }),
            signal: Arc::default(),
        }
    }

    /// A child: the same descriptors and a copy of the memory, in another address space.
    pub fn fork(&self) -> Self {
        let child = Self::new();
        {
            let (mut to, from) = (child.lock(), self.lock());
            to.memory = from.memory.clone();
            to.read_only = from.read_only.clone();
            to.files = from.files.clone();
            to.events = from.events.clone();
            (to.limit, to.pin, to.next) = (from.limit, from.pin, from.next);
        }
        child
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps zeros at an address of its choice: a page's, with nothing mapped around it.
    pub fn map(&self, bytes: usize) -> u64 {
        let mut state = self.lock();
        let at = state.next;
        state.next = at + (bytes as u64).next_multiple_of(4096) + 4096;
        state.memory.insert(at, vec![0; bytes]);
        at
    }

    /// Takes the right to write a mapping away.
    pub fn protect(&self, address: u64) {
        self.lock().read_only.insert(address);
    }

    /// Maps a structure.
    pub fn put<T: IntoBytes + Immutable + ?Sized>(&self, value: &T) -> u64 {
        let bytes = value.as_bytes();
        let at = self.map(bytes.len());
        let _ = self.write(at, bytes);
        at
    }

    /// Reads a structure back.
    ///
    /// # Errors
    /// EFAULT.
    pub fn get<T: FromBytes + FromZeros + IntoBytes>(&self, address: u64) -> Result<T, Refusal> {
        let mut value = T::new_zeroed();
        let read = self.read(address, value.as_mut_bytes());
        read.map_err(|Fault| Errno::EFAULT)?;
        Ok(value)
    }

    /// Sets the number of descriptors that may be open, from number 0.
    pub fn limit_descriptors(&self, limit: i32) {
        self.lock().limit = limit;
    }

    /// Sets how much memory may be pinned. No limit at first.
    pub fn limit_pins(&self, limits: PinLimits) {
        self.lock().pin = limits;
    }

    /// Makes a signal pending, or takes it away.
    pub fn set_signal(&self, pending: bool) {
        self.signal.store(pending, Ordering::Release);
    }

    /// Gives a file a number.
    ///
    /// # Errors
    /// EMFILE.
    pub fn open(&self, file: File) -> Result<i32, Refusal> {
        let number = self.reserve()?;
        self.install(number, file);
        Ok(number)
    }

    /// A second number for an open file.
    ///
    /// # Errors
    /// EBADF, EMFILE.
    pub fn dup(&self, number: i32) -> Result<i32, Refusal> {
        let file = self.file(number)?;
        self.open(file)
    }

    /// A new eventfd.
    ///
    /// # Errors
    /// EMFILE.
    pub fn open_event(&self) -> Result<i32, Refusal> {
        let number = self.reserve()?;
        self.lock().events.insert(number, Event::new());
        Ok(number)
    }

    /// Adds 1 to an eventfd's counter.
    ///
    /// # Errors
    /// EBADF, EINVAL for another file.
    pub fn signal(&self, number: i32) -> Result<(), Refusal> {
        self.event(number)?.signal();
        Ok(())
    }

    /// Takes an eventfd's counter, 0 if it was not signalled.
    ///
    /// # Errors
    /// EBADF, EINVAL for another file.
    pub fn take_signals(&self, number: i32) -> Result<u64, Refusal> {
        Ok(self.event(number)?.take())
    }

    fn event(&self, number: i32) -> Result<Arc<Event>, Errno> {
        let state = self.lock();
        match (state.events.get(&number), state.files.get(&number)) {
            (Some(event), _) => Ok(Arc::clone(event)),
            (None, Some(Some(_))) => Err(Errno::EINVAL),
            _ if (0..FIRST_FD).contains(&number) => Err(Errno::EINVAL),
            _ => Err(Errno::EBADF),
        }
    }

    /// Closes a number.
    ///
    /// # Errors
    /// EBADF.
    pub fn close(&self, number: i32) -> Result<(), Refusal> {
        // The file may end here, and with it a VM: not under the lock.
        let (closed, event) = {
            let mut state = self.lock();
            (state.files.remove(&number), state.events.remove(&number))
        };
        drop(event);
        match closed {
            Some(_) => Ok(()),
            None => Err(Errno::EBADF.into()),
        }
    }

    /// The file behind a number.
    ///
    /// # Errors
    /// EBADF.
    pub fn file(&self, number: i32) -> Result<File, Refusal> {
        let file = self.lock().files.get(&number).cloned().flatten();
        file.ok_or(Errno::EBADF.into())
    }

    /// Makes a call with a value or an address.
    ///
    /// # Errors
    /// The call's.
    pub fn ioctl(&self, number: i32, ioctl: Ioctl, argument: u64) -> Result<i64, Refusal> {
        self.file(number)?.ioctl(self, ioctl.number(), argument)
    }

    /// Makes a call with a structure, and returns the structure as the call left it.
    ///
    /// # Errors
    /// The call's.
    pub fn call<T>(&self, number: i32, ioctl: Ioctl, value: &T) -> Result<T, Refusal>
    where
        T: FromBytes + FromZeros + IntoBytes + Immutable,
    {
        let at = self.put(value);
        let done = self.ioctl(number, ioctl, at);
        let after = self.get(at);
        self.lock().memory.remove(&at);
        done?;
        after
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Default for Task {
    fn default() -> Self {
        Self::new()
    }
}

/// The mapping that holds all of a range, and where in it the range starts.
fn place(memory: &BTreeMap<u64, Vec<u8>>, address: u64, len: usize) -> Result<(u64, usize), Fault> {
    let (start, bytes) = memory.range(..=address).next_back().ok_or(Fault)?;
    let from = usize::try_from(address - start).map_err(|_| Fault)?;
    let end = from.checked_add(len).ok_or(Fault)?;
    if end <= bytes.len() {
        Ok((*start, from))
    } else {
        Err(Fault)
    }
}

impl Process for Task {
    fn address_space(&self) -> AddressSpace {
        self.id
    }

    fn pin_limits(&self) -> PinLimits {
        self.lock().pin
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        let state = self.lock();
        let (start, from) = place(&state.memory, address, into.len())?;
        into.copy_from_slice(&state.memory[&start][from..from + into.len()]);
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut state = self.lock();
        let (start, from) = place(&state.memory, address, bytes.len())?;
        if state.read_only.contains(&start) {
            return Err(Fault);
        }
        let mapping = state.memory.get_mut(&start).ok_or(Fault)?;
        mapping[from..from + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn descriptor(&self, number: i32) -> Descriptor {
        let state = self.lock();
        match state.files.get(&number) {
            Some(Some(file)) => Descriptor::File(file.clone()),
            _ if state.events.contains_key(&number) => Descriptor::Foreign,
            _ if (0..FIRST_FD).contains(&number) => Descriptor::Foreign,
            _ => Descriptor::Closed,
        }
    }

    fn reserve(&self) -> Result<i32, Errno> {
        let mut state = self.lock();
        let mut numbers = FIRST_FD..state.limit;
        let free = numbers.find(|number| !state.files.contains_key(number));
        let number = free.ok_or(Errno::EMFILE)?;
        state.files.insert(number, None);
        Ok(number)
    }

    fn install(&self, number: i32, file: File) {
        self.lock().files.insert(number, Some(file));
    }

    fn release(&self, number: i32) {
        self.lock().files.remove(&number);
    }

    fn eventfd(&self, number: i32) -> Result<Arc<dyn EventFd>, Errno> {
        let event = self.event(number)?;
        Ok(event)
    }

    fn run_area(&self, other: Option<&dyn RunArea>) -> Result<Arc<dyn RunArea>, Errno> {
        let other = other.and_then(|area| <dyn Any>::downcast_ref::<Area>(area));
        let page = || Arc::new(Mutex::new(vec![0; PAGE]));
        Ok(Arc::new(Area {
            pages: std::array::from_fn(|n| match other {
                Some(other) if n as u64 == COALESCED_MMIO_PAGE => Arc::clone(&other.pages[n]),
                _ => page(),
            }),
            signal: Arc::clone(&self.signal),
        }))
    }

    fn signal_pending(&self) -> bool {
        self.signal.load(Ordering::Acquire)
    }
}

const PAGE: usize = 4096;

/// A run area on the heap, and the process' signal.
struct Area {
    pages: [Arc<Mutex<Vec<u8>>>; MMAP_SIZE as usize / PAGE],
    signal: Arc<AtomicBool>,
}

impl Area {
    /// Calls a function for the bytes in each page that a range meets: those of the page, and where they are in the range.
    fn each(&self, offset: u64, len: usize, mut part: impl FnMut(&mut [u8], Range<usize>)) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(len);
        for (at, page) in (0..).step_by(PAGE).zip(&self.pages) {
            let (from, to) = (start.max(at), end.min(at + PAGE));
            if from < to {
                let mut page = page.lock().unwrap_or_else(PoisonError::into_inner);
                part(&mut page[from - at..to - at], from - start..to - start);
            }
        }
    }
}

impl RunArea for Area {
    fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        self.each(offset, into.len(), |page, range| {
            into[range].copy_from_slice(page);
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.each(offset, data.len(), |page, range| {
            page.copy_from_slice(&data[range]);
        });
    }

    fn signal_pending(&self) -> bool {
        self.signal.load(Ordering::Acquire)
    }
}
