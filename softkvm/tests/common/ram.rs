//! Memory that a process can lend to its guests: pages of this process at their own addresses.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::Mutex;

use kvm_ops::HostRange;
use kvm_ops_softkvm::Fault;

const PAGE: usize = 4096;

/// Pages that live as long as the value.
#[derive(Default)]
pub(crate) struct Ram(Mutex<Vec<Piece>>);

struct Piece {
    address: u64,
    layout: Layout,
}

impl Ram {
    /// Zeros, and their address.
    pub(crate) fn map(&self, bytes: usize) -> u64 {
        let layout = Layout::from_size_align(bytes.next_multiple_of(PAGE), PAGE).unwrap();
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        let address = start.expose_provenance() as u64;
        self.0.lock().unwrap().push(Piece { address, layout });
        address
    }

    /// The pointer to a range that lies in one piece.
    fn find(&self, address: u64, bytes: usize) -> Option<*mut u8> {
        let end = address.checked_add(bytes as u64)?;
        let pieces = self.0.lock().unwrap();
        let inside = |piece: &Piece| {
            piece.address <= address && end <= piece.address + piece.layout.size() as u64
        };
        let found = pieces.iter().any(inside);
        found.then(|| std::ptr::with_exposed_provenance_mut(address as usize))
    }

    /// Reads, byte by byte: a guest may be writing. `None` for an address that is not here.
    pub(crate) fn read(&self, address: u64, into: &mut [u8]) -> Option<Result<(), Fault>> {
        let from = self.find(address, into.len())?;
        for (index, byte) in into.iter_mut().enumerate() {
            // SAFETY: `find` says that the range is in a piece, which lives as long as `self`.
            *byte = unsafe { from.add(index).read_volatile() };
        }
        Some(Ok(()))
    }

    /// Writes, byte by byte.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Option<Result<(), Fault>> {
        let to = self.find(address, bytes.len())?;
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { to.add(index).write_volatile(*byte) };
        }
        Some(Ok(()))
    }

    pub(crate) fn lend(&self, address: u64, bytes: u64) -> Option<HostRange> {
        self.find(address, usize::try_from(bytes).ok()?)?;
        // SAFETY: a piece is never referenced, only read and written by pointer, and ends with its world,
        // whose files and VMs end before it.
        unsafe { HostRange::new(address, bytes) }.ok()
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        for piece in self.0.get_mut().unwrap() {
            let start = std::ptr::with_exposed_provenance_mut(piece.address as usize);
            // SAFETY: allocated with this layout, and freed once.
            unsafe { dealloc(start, piece.layout) };
        }
    }
}
