//! The guest's memory and queues, as a device meets them: nothing there is to be trusted.

use std::cell::Cell;

use kvm_ops::Gpa;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};

use crate::{DeviceMemory, MachineError, Written};

/// The number of descriptors that a queue has at most.
pub(super) const QUEUE_MAX: u16 = 128;

/// Memory that a device may not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("page at {0} is private to the guest")]
    Private(Gpa),
    #[error("no memory at {0}")]
    Outside(Gpa),
}

impl Refused {
    fn new(error: &MachineError, gpa: Gpa) -> Self {
        match error {
            MachineError::Private { gpa } => Self::Private(*gpa),
            _ => Self::Outside(gpa),
        }
    }
}

/// The reason why a device cannot go on: the driver broke the protocol.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Memory(Refused),
    #[error(
        "descriptor chain {head:#x} has a loop, a link to nowhere, or a readable part behind a writable one"
    )]
    Chain { head: u16 },
    #[error("request of descriptor chain {head:#x} has no room for header or status")]
    Short { head: u16 },
    #[error("descriptor chain {head:#x} has {bytes:#x} bytes, more than are taken at once")]
    Long { head: u16, bytes: usize },
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
}

/// Guest memory that remembers the first access that it refused, which virtio-queue does not always hand on.
pub(super) struct Watched<'m> {
    memory: DeviceMemory<'m>,
    refused: Cell<Option<Refused>>,
}

impl<'m> Watched<'m> {
    pub(super) const fn new(memory: DeviceMemory<'m>) -> Self {
        Self {
            memory,
            refused: Cell::new(None),
        }
    }

    fn note(&self, refused: Refused) {
        self.refused.set(self.refused.get().or(Some(refused)));
    }

    /// The refused access, or else the other reason.
    fn broken(&self, otherwise: Broken) -> Broken {
        self.refused.get().map_or(otherwise, Broken::Memory)
    }
}

impl<'m> GuestMemory for Watched<'m> {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = Written<'m>;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let gpa = Gpa::new(addr.0);
        let checked = self.memory.check(gpa, count, access.has_write());
        checked
            .inspect_err(|error| self.note(Refused::new(error, gpa)))
            .is_ok()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        let slices = self.memory.get_slices(addr, count, access);
        slices.inspect_err(|error| {
            let gpa = Gpa::new(addr.0);
            let refused = match error {
                GuestMemoryError::IOError(error) => error
                    .get_ref()
                    .and_then(|error| error.downcast_ref())
                    .map(|error| Refused::new(error, gpa)),
                _ => None,
            };
            self.note(refused.unwrap_or(Refused::Outside(gpa)));
        })
    }
}

/// A request of the driver: the bytes for the device, and the room for its answer.
pub(super) struct Chain<'a, 'm> {
    pub(super) head: u16,
    pub(super) reader: Reader<'a, Written<'m>>,
    pub(super) writer: Writer<'a, Written<'m>>,
}

/// A queue, with the vector of its interrupt.
pub(super) struct VirtQueue {
    pub(super) ring: Queue,
    pub(super) vector: u16,
    /// True if the device has used buffers since the driver was last told.
    used: bool,
}

impl VirtQueue {
    pub(super) fn new(vector: u16) -> Self {
        Self {
            ring: Queue::new(QUEUE_MAX).expect("a power of two"),
            vector,
            used: false,
        }
    }

    /// Opens the queue, if its rings lie in memory that the device may use.
    pub(super) fn enable(&mut self, memory: &Watched<'_>) -> Result<(), Broken> {
        self.ring.set_ready(true);
        self.check(memory)
            .inspect_err(|_| self.ring.set_ready(false))
    }

    /// Checks that the rings lie in memory that the device may use, of which a guest can take pages back.
    pub(super) fn check(&self, memory: &Watched<'_>) -> Result<(), Broken> {
        match self.ring.is_valid(memory) {
            true => Ok(()),
            false => Err(memory.broken(Broken::Ring(virtio_queue::Error::QueueNotReady))),
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.ring.ready()
    }

    /// Serves the requests that are there. `serve` returns the number of bytes that it wrote to the guest.
    pub(super) fn each(
        &mut self,
        memory: &Watched<'_>,
        mut serve: impl FnMut(&mut Chain<'_, '_>) -> Result<u32, Broken>,
    ) -> Result<(), Broken> {
        // A queue has no more requests at once; who adds others meanwhile notifies again.
        for _ in 0..QUEUE_MAX {
            let Some(mut chain) = self.take(memory)? else {
                break;
            };
            let written = serve(&mut chain)?;
            self.give_back(memory, chain.head, written)?;
        }
        Ok(())
    }

    /// Takes the next request.
    pub(super) fn take<'a, 'm>(
        &mut self,
        memory: &'a Watched<'m>,
    ) -> Result<Option<Chain<'a, 'm>>, Broken> {
        let next = self.ring.iter(memory).map(|mut chains| chains.next());
        let Some(chain) = next.map_err(|error| memory.broken(error.into()))? else {
            return memory
                .refused
                .get()
                .map_or(Ok(None), |why| Err(Broken::Memory(why)));
        };
        let head = chain.head_index();
        let malformed = || memory.broken(Broken::Chain { head });
        if !is_whole(chain.clone()) {
            return Err(malformed());
        }
        let reader = chain.clone().reader(memory).map_err(|_| malformed())?;
        let writer = chain.writer(memory).map_err(|_| malformed())?;
        Ok(Some(Chain {
            head,
            reader,
            writer,
        }))
    }

    /// Gives a request back, with the number of bytes that were written to it.
    pub(super) fn give_back(
        &mut self,
        memory: &Watched<'_>,
        head: u16,
        written: u32,
    ) -> Result<(), Broken> {
        let given = self.ring.add_used(memory, head, written);
        given.map_err(|error| memory.broken(error.into()))?;
        self.used = true;
        Ok(())
    }

    /// True if the driver is to be interrupted, which it may have suppressed.
    pub(super) fn take_interrupt(&mut self, memory: &Watched<'_>) -> bool {
        let flags = memory.read_obj::<u16>(GuestAddress(self.ring.avail_ring()));
        let silent = flags
            .is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0);
        std::mem::take(&mut self.used) && !silent
    }
}

/// True if a chain has an end, and its readable parts come first.
fn is_whole<'a, 'm>(chain: DescriptorChain<&'a Watched<'m>>) -> bool {
    let (mut ended, mut writable) = (false, false);
    for part in chain {
        if writable && !part.is_write_only() {
            return false;
        }
        writable = part.is_write_only();
        ended = !part.has_next();
    }
    ended
}
