//! Interrupted calls: what a stream keeps so that the same call can go on.

use super::export::Outgoing;
use super::import::Incoming;
use super::stream::Stream;
use crate::call::Leaf;
use crate::status::Code;

/// A call that ended with `INTERRUPTED_RESUMABLE`.
pub(crate) struct Interrupted {
    /// Leaf and version.
    pub(crate) rax: u64,
    pub(crate) work: Work,
}

/// The operands a resumed call must repeat, and how far it had come.
pub(crate) enum Work {
    /// A state bundle on its way out; the operands are the page list and, of a vCPU's state, the TDVPR.
    Export { operands: [u64; 2], work: Outgoing },
    /// A state bundle on its way in, with the same operands.
    Import { operands: [u64; 2], work: Incoming },
    /// A memory bundle.
    Memory {
        operands: MemoryOperands,
        /// Pages written so far, as the export reports them.
        pages: u64,
    },
}

/// Operands of a memory leaf that stay the same when it is resumed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MemoryOperands {
    /// The GPA list with the entry to go on with.
    pub(crate) list: u64,
    pub(crate) buffers: u64,
    pub(crate) macs: [u64; 2],
    pub(crate) new_pages: u64,
    pub(crate) epoch: u32,
}

impl Stream {
    fn interrupted_call(&mut self, rax: u64) -> Leaf<Work> {
        if !self.is_initialised() {
            return Err(Code::MIGRATION_STREAM_STATE_INCORRECT.status());
        }
        match self.interrupted.take() {
            Some(call) if call.rax == rax => Ok(call.work),
            _ => Err(Code::INVALID_RESUMPTION.status()),
        }
    }

    /// The bundle an interrupted export was working on.
    pub(crate) fn resume_export(&mut self, rax: u64, operands: [u64; 2]) -> Leaf<Outgoing> {
        match self.interrupted_call(rax)? {
            Work::Export {
                operands: before,
                work,
            } if before == operands => Ok(work),
            _ => Err(Code::INVALID_RESUMPTION.status()),
        }
    }

    /// The bundle an interrupted import was working on.
    pub(crate) fn resume_import(&mut self, rax: u64, operands: [u64; 2]) -> Leaf<Incoming> {
        match self.interrupted_call(rax)? {
            Work::Import {
                operands: before,
                work,
            } if before == operands => Ok(work),
            _ => Err(Code::INVALID_RESUMPTION.status()),
        }
    }

    /// The pages an interrupted memory leaf had counted.
    pub(crate) fn resume_memory(&mut self, rax: u64, operands: &MemoryOperands) -> Leaf<u64> {
        match self.interrupted_call(rax)? {
            Work::Memory {
                operands: before,
                pages,
            } if before == *operands => Ok(pages),
            _ => Err(Code::INVALID_RESUMPTION.status()),
        }
    }

    /// Keeps a call for resumption and gives the status it ends with.
    pub(crate) fn interrupt(&mut self, rax: u64, work: Work) -> crate::status::Status {
        self.interrupted = Some(Box::new(Interrupted { rax, work }));
        Code::INTERRUPTED_RESUMABLE.status()
    }
}
