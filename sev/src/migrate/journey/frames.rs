//! The records of a journey.

use kvm_ops::{Level, PAGE_SIZE};
use kvm_ops_wire::{MAX_RANGES, Refusal};

use super::PART;

/// Session and number of the link.
const SESSION: usize = 24;

kvm_ops_wire::kinds! {
    b"KOMN", 1;
    /// Source: begins a session, with the number of vCPUs and the memory.
    Hello = 1, SESSION + 6, SESSION + 6 + 16 * MAX_RANGES;
    /// Source: goes on with a session over another link.
    Resume = 2, SESSION, SESSION;
    /// Target: its state, the record that is due, and the challenge of the link.
    Ready = 3, 25, 25;
    /// Source: a part of the image, and more follow.
    Image = 4, 1, PART;
    /// Source: the last part of the image.
    ImageEnd = 5, 1, PART;
    /// Source: the next page of those that the image names.
    Page = 6, PAGE_SIZE as usize, Level::Size2M.bytes() as usize;
    /// Source: all is sent.
    Prepare = 7, 0, 0;
    /// Target: the guest is there, stopped.
    Prepared = 8, 0, 0;
    /// Source: the guest never runs there again.
    Commit = 9, 0, 0;
    /// Target: the guest runs.
    Done = 10, 0, 0;
    /// Source: the guest stays.
    Cancel = 11, 0, 0;
    /// Either end: why it stops.
    Refuse = 12, Refusal::BYTES, Refusal::BYTES;
}
