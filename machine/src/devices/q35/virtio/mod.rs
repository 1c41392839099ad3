//! Virtio devices on PCI (virtio 1.2). Device code sees requests; the transport is one for all devices.
//!
//! | file | part |
//! |---|---|
//! | `pci` | the function: capabilities, memory, interrupts |
//! | `msix` | the table of interrupt messages |
//! | `registers` | the common configuration: features, status, queues |
//! | `guest` | memory and queues, which are the guest's and may be anything |
//! | `block` | the disk |
//! | `disk` | the file behind it |
//! | `console` | the console |

mod block;
mod console;
mod disk;
mod guest;
mod msix;
mod pci;
mod registers;

use super::cards::Card;
use crate::ConsoleSink;
use guest::{Broken, VirtQueue, Watched};

pub(super) use disk::SharedCounts;
pub use disk::{Disk, DiskCounts};

/// The block device of a disk image.
pub(super) fn block(disk: Disk) -> Box<dyn Card> {
    Box::new(pci::VirtioPci::new(block::Block::new(disk)))
}

/// A console that prints there, and gets what is typed.
pub(super) fn console(output: ConsoleSink) -> Box<dyn Card> {
    Box::new(pci::VirtioPci::new(console::Console::new(output)))
}

/// A kind of virtio device.
trait Device: Send {
    /// Its number (5).
    const ID: u16;
    /// PCI class, subclass and programming interface.
    const CLASS: u32;
    const QUEUES: u16;

    /// The features of this kind that it offers.
    fn features(&self) -> u64;

    /// Its configuration structure.
    fn config(&self) -> &[u8];

    /// The queue on which it hands out what is typed, if anything can be typed.
    const INPUT: Option<usize> = None;

    /// Takes what is typed, until the driver gives room for it. Returns how many bytes it takes.
    fn type_in(&mut self, input: &[u8]) -> usize {
        let _ = input;
        0
    }

    /// Serves a queue, which the driver has put requests into, or for which something was typed.
    fn notified(
        &mut self,
        number: usize,
        queue: &mut VirtQueue,
        memory: &Watched<'_>,
    ) -> Result<(), Broken>;

    /// Is told that the driver broke the protocol; the transport waits for a reset.
    fn broken(&mut self, why: &Broken);
}

#[cfg(test)]
mod tests;
