//! Operands that migration leaves share.

use super::mbmd;
use crate::call::{Leaf, busy, invalid, shared_operand};
use crate::lock::{Guard, LockMode, Side};
use crate::platform::Platform;
use crate::status::{Code, Operand};
use crate::td::Td;

/// Source or destination of an MBMD.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MbmdBuffer {
    pa: u64,
}

impl MbmdBuffer {
    /// R8: PA and, in bits 63:52, the buffer's size.
    pub(crate) fn parse(p: &Platform, r8: u64) -> Leaf<Self> {
        const ALIGNMENT: u64 = 128;
        const PA: u64 = (1 << 52) - 1;
        if r8 >> 52 < mbmd::SIZE as u64 {
            return Err(invalid(Operand::R8));
        }
        let pa = shared_operand(p, r8 & PA, ALIGNMENT, Operand::R8)?;
        Ok(MbmdBuffer { pa })
    }

    pub(crate) fn read(self, p: &Platform) -> [u8; mbmd::SIZE] {
        let mut bytes = [0; mbmd::SIZE];
        p.mem.host_read(self.pa, &mut bytes);
        bytes
    }

    pub(crate) fn write(self, p: &Platform, bytes: &[u8; mbmd::SIZE]) {
        p.mem.host_write(self.pa, bytes);
    }
}

/// R10: index of a stream, and whether the call goes on with an interrupted one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StreamOperand {
    pub(crate) index: u16,
    /// Bit 63: resume; for TDH.EXPORT.TRACK: end of the in-order phase.
    pub(crate) command: bool,
}

impl StreamOperand {
    /// Bits 62:16 must be 0, and the index below the number of forward streams.
    pub(crate) fn parse(r10: u64, forward_streams: u16) -> Leaf<Self> {
        const COMMAND: u64 = 1 << 63;
        let index = r10 as u16;
        if (r10 & !COMMAND) >> 16 != 0 || index >= forward_streams {
            return Err(invalid(Operand::R10));
        }
        Ok(StreamOperand {
            index,
            command: r10 & COMMAND != 0,
        })
    }

    /// An operand of leaves that work on forward stream 0 only.
    pub(crate) fn parse_first(r10: u64) -> Leaf<Self> {
        Self::parse(r10, 1)
    }
}

/// R10 of leaves that take neither stream nor command.
pub(crate) fn no_stream(r10: u64) -> Leaf {
    if r10 == 0 {
        Ok(())
    } else {
        Err(invalid(Operand::R10))
    }
}

/// Shares or takes what guards a TD's migration as a whole.
pub(crate) fn lock_migration(td: &Td, mode: LockMode) -> Leaf<Guard<'_>> {
    td.mig_lock
        .guard(mode, Side::Host)
        .ok_or(busy(Operand::MIG))
}

/// `OPERAND_BUSY` of a stream.
pub(crate) fn stream_busy() -> crate::status::Status {
    busy(Operand::MIGSC)
}

/// `INVALID_MBMD`
pub(crate) fn invalid_mbmd() -> crate::status::Status {
    Code::INVALID_MBMD.status()
}
