//! The kinds of records of the stream.

use crate::packet::{PACKET_HEADER, PAGE};

/// The most bytes that a certificate chain or a session may have.
pub const MAX_BLOB: usize = 16 << 10;

kvm_ops_wire::kinds! {
    b"KOMS", 2;
    /// Source: session and shape of the guest.
    Hello = 1, 16 + 8 + 1 + 4 + 4 + 2, 16 + 8 + 1 + 4 + 4 + 2 + 16 * kvm_ops_wire::MAX_RANGES;
    /// Source: goes on with a session.
    Resume = 2, 16 + 8, 16 + 8;
    /// Target: its challenge and certificates.
    Offer = 3, 24 + 12, 24 + 12 + 3 * MAX_BLOB;
    /// Source: the operands of RECEIVE_START.
    Start = 4, 12, 12 + 2 * MAX_BLOB;
    /// Target: its state and challenge.
    Ready = 5, 1 + 24, 1 + 24;
    /// Source: a page of private memory.
    Private = 6, 8 + PACKET_HEADER + PAGE, 8 + PACKET_HEADER + PAGE;
    /// Source: a page of shared memory; without data, zeros.
    Shared = 7, 8, 8 + PAGE;
    /// Source: a frame that holds nothing any more.
    Absent = 8, 8, 8;
    /// Source: the register state of a vCPU, encrypted for SEV-ES.
    Vcpu = 9, 5, 5 + PACKET_HEADER + PAGE;
    /// Source: a round is over.
    RoundEnd = 10, 4, 4;
    /// Target: it has all records of the round.
    RoundOk = 11, 0, 0;
    /// Source: no record comes any more.
    Prepare = 12, 0, 0;
    /// Target: the guest could run here.
    Prepared = 13, 0, 0;
    /// Source: the guest is the target's now.
    Commit = 14, 0, 0;
    /// Target: it runs the guest.
    Done = 15, 0, 0;
    /// Source: the migration is cancelled.
    Cancel = 16, 0, 0;
    /// Target: refuses and says why.
    Refuse = 17, 10, 10;
}

pub(crate) type Wire<'l, L> = kvm_ops_wire::Wire<'l, L, Kind>;
