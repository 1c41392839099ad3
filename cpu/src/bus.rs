//! The processor's surroundings: memory below the page tables, devices and ports.

use core::ptr::NonNull;

/// Bytes in a frame.
pub const FRAME: usize = 4096;

/// The reason for which the processor asks for a guest-physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Data will be written.
    pub write: bool,
    /// Instructions will be fetched.
    pub execute: bool,
    /// The page holds a paging structure that is walked.
    pub walk: bool,
    /// Paging is on, with entries of 8 bytes: only these have room for an encryption bit.
    pub wide: bool,
}

/// One frame of host memory behind a guest-physical page.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub(crate) host: NonNull<u8>,
    pub(crate) writable: bool,
}

impl Frame {
    /// A frame that the processor may read, and write if `writable`.
    ///
    /// # Safety
    ///
    /// * `host` is aligned to 8 bytes, and the start of [`FRAME`] bytes that stay readable, and writable if `writable`,
    ///   until the [`Bus`] that returned it is dropped or its [`Bus::generation`] changes.
    /// * No Rust reference to these bytes is alive while a method of the processor runs, and who uses them at the same
    ///   time, as another processor of the machine does with [`Cpu::set_parallel`](crate::Cpu::set_parallel), does so
    ///   with atomic accesses.
    pub const unsafe fn new(host: NonNull<u8>, writable: bool) -> Self {
        Self { host, writable }
    }
}

/// Answer of [`Bus::map`].
#[derive(Clone, Copy, Debug)]
pub enum Mapping {
    /// Memory; the processor keeps the pointer until [`Bus::generation`] changes or [`Cpu::flush`](crate::Cpu::flush).
    Frame(Frame),
    /// Not memory: each access goes through [`Bus::read`] and [`Bus::write`].
    Device,
    /// The second stage of translation refuses. The processor leaves with
    /// [`Cause::Violation`](crate::Cause::Violation); `code` is handed through.
    Refused {
        /// Meaning is the bus': bits 5:3 of an EPT qualification, an RMP fault's bits.
        code: u64,
    },
}

/// Memory and devices of a machine, as one processor sees them.
///
/// Guest-physical addresses come with all bits of the page-table entry up to the physical width:
/// the shared bit of a TD and the C-bit of an SEV guest are the implementor's to look at.
pub trait Bus: Send {
    /// Translates the page at `gpa` (4096-byte aligned). The processor asks once per page and kind of access as a rule,
    /// and again for what it has no room to keep.
    fn map(&mut self, gpa: u64, access: Access) -> Mapping;

    /// Reads a device, 1 to 8 bytes, never across a page. `false` leaves the processor with
    /// [`Cause::Violation`](crate::Cause::Violation), code 0.
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> bool;

    /// Writes a device; like [`Bus::read`].
    fn write(&mut self, gpa: u64, data: &[u8]) -> bool;

    /// IN from a port; `size` is 1, 2 or 4. `None` leaves the processor with
    /// [`Cause::Io`](crate::Cause::Io).
    fn port_in(&mut self, port: u16, size: u8) -> Option<u32>;

    /// OUT to a port; like [`Bus::port_in`].
    fn port_out(&mut self, port: u16, size: u8, value: u32) -> Option<()>;

    /// An interrupt command of the local APIC with number `from` that concerns other processors,
    /// in x2APIC format: vector in bits 7:0, delivery mode 10:8, destination mode 11, shorthand
    /// 19:18, destination 63:32. Ignored unless implemented.
    fn ipi(&mut self, from: u32, command: u64) {
        let _ = (from, command);
    }

    /// End of an interrupt, which I/O APICs wait for.
    fn end_of_interrupt(&mut self, vector: u8) {
        let _ = vector;
    }

    /// The time of the host in ticks, for processors that run at the same time
    /// ([`Cpu::set_parallel`](crate::Cpu::set_parallel)): the same clock for all of them, which never goes back.
    /// Without one, each processor counts its instructions.
    fn clock(&mut self) -> Option<u64> {
        None
    }

    /// A number that changes when an answer of [`Bus::map`] is taken back. The processor looks at
    /// it whenever it is entered; if it changed, it asks again for every page, and compares decoded code
    /// with memory.
    fn generation(&self) -> u64 {
        0
    }
}
