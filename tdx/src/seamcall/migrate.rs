//! TDH.EXPORT.*, TDH.IMPORT.*, TDH.MIG.* and TDH.SERVTD.*: migration.

use kvm_ops::{CpuId, Hpa, SeamPort, SeamRegs};

use super::{Calls, Leaf, Outcome, regs};
use crate::migrate::{Binding, MBMD_BYTES};

/// R10 bit 63: the call goes on with an interrupted one; of TDH.EXPORT.TRACK, that the in-order phase
/// is over.
const COMMAND: u64 = 1 << 63;

/// Slot and type of the one service TD that the module knows, a migration TD.
const SLOT: u64 = 0;
const MIGRATION_TD: u64 = 0;

/// A list in a page of host memory: GPA list or page list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListAt {
    pub(crate) page: Hpa,
    /// The number of its last entry.
    pub(crate) last: u16,
}

impl ListAt {
    /// A list of `entries` entries, at least 1 and at most 512.
    pub(crate) const fn of(page: Hpa, entries: usize) -> Self {
        let last = entries.saturating_sub(1) as u16;
        Self { page, last }
    }

    /// The register: the address in bits 51:12, the last entry in bits 63:55, the first in 11:3.
    const fn register(self) -> u64 {
        self.page.get() | (self.last as u64) << 55
    }
}

/// The place of a bundle in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BundleAt {
    /// The MBMD.
    pub(crate) mbmd: Hpa,
    /// Of state: the list of its pages. Of memory: the GPA list.
    pub(crate) list: ListAt,
    /// The buffers of a memory bundle, and the MACs of its entries.
    pub(crate) buffers: Hpa,
    pub(crate) macs: Hpa,
    /// The stream that carries it.
    pub(crate) stream: u16,
}

impl BundleAt {
    /// The MBMD operand: the address, and the buffer's size in bits 63:52.
    const fn mbmd_operand(self) -> u64 {
        self.mbmd.get() | (MBMD_BYTES as u64) << 52
    }

    fn state(self, of: Hpa) -> SeamRegs {
        SeamRegs {
            r8: self.mbmd_operand(),
            r9: self.list.register(),
            r10: self.stream.into(),
            ..regs(of.get(), 0)
        }
    }

    fn memory(self, tdr: Hpa) -> SeamRegs {
        SeamRegs {
            r8: self.mbmd_operand(),
            r9: self.buffers.get(),
            r10: self.stream.into(),
            r11: self.macs.get(),
            ..regs(self.list.register(), tdr.get())
        }
    }

    fn token(self, tdr: Hpa) -> SeamRegs {
        SeamRegs {
            r8: self.mbmd_operand(),
            ..regs(tdr.get(), 0)
        }
    }
}

/// The operands with which an interrupted call goes on, from those of the call and what it returned.
pub(super) const fn resumed(leaf: Leaf, input: SeamRegs, returned: &SeamRegs) -> SeamRegs {
    let r10 = input.r10 | COMMAND;
    match leaf {
        Leaf::PhymemCacheWb => SeamRegs { rcx: 1, ..input },
        // The list comes back with the entry to go on at.
        Leaf::ExportBlockw | Leaf::ExportRestore => SeamRegs {
            rcx: returned.rcx,
            ..input
        },
        Leaf::ExportMem | Leaf::ImportMem => SeamRegs {
            rcx: returned.rcx,
            r10,
            ..input
        },
        _ => SeamRegs { r10, ..input },
    }
}

impl<S: SeamPort> Calls<'_, S> {
    /// Binds the TD whose TDR is `service` to that of `target` as its migration TD.
    pub(crate) fn servtd_bind(
        &self,
        target: Hpa,
        service: Hpa,
        attributes: u64,
    ) -> Outcome<Binding> {
        let input = SeamRegs {
            r8: SLOT,
            r9: MIGRATION_TD,
            r10: attributes,
            ..regs(target.get(), service.get())
        };
        let out = self.here(Leaf::ServtdBind, input)?;
        Ok(Binding {
            handle: out.rcx,
            uuid: [out.r10, out.r11, out.r12, out.r13],
        })
    }

    /// Says which migration TD may be bound: the hash at `hash`, 48 bytes of host memory, is that of
    /// its TDINFO.
    pub(crate) fn servtd_prebind(&self, target: Hpa, hash: Hpa, attributes: u64) -> Outcome {
        let input = SeamRegs {
            r8: SLOT,
            r9: MIGRATION_TD,
            r10: attributes,
            ..regs(target.get(), hash.get())
        };
        self.here(Leaf::ServtdPrebind, input).map(drop)
    }

    /// Makes `page` the context of the TD's next stream.
    pub(crate) fn mig_stream_create(&self, page: Hpa, tdr: Hpa) -> Outcome {
        self.here(Leaf::MigStreamCreate, regs(page.get(), tdr.get()))
            .map(drop)
    }

    /// Begins an export session. Returns the number of pages that the bundle fills.
    pub(crate) fn export_immutable(&self, tdr: Hpa, at: BundleAt) -> Outcome<u64> {
        self.here(Leaf::ExportStateImmutable, at.state(tdr))
            .map(|out| out.rdx)
    }

    /// Exports the TD's state. Returns the number of pages that the bundle fills.
    pub(crate) fn export_td(&self, tdr: Hpa, at: BundleAt) -> Outcome<u64> {
        self.here(Leaf::ExportStateTd, at.state(tdr))
            .map(|out| out.rdx)
    }

    /// Exports a vCPU's state on `cpu`, with which it is or becomes associated. Returns the number of
    /// pages that the bundle fills.
    pub(crate) fn export_vcpu(&self, cpu: CpuId, tdvpr: Hpa, at: BundleAt) -> Outcome<u64> {
        self.on(cpu, Leaf::ExportStateVp, at.state(tdvpr))
            .map(|out| out.rdx)
    }

    /// Exports the pages of a GPA list, whose entries come back with what became of each. Returns the
    /// number of entries that were worked on, all of them unless the call failed.
    pub(crate) fn export_mem(&self, tdr: Hpa, at: BundleAt) -> (u16, Outcome) {
        self.memory(Leaf::ExportMem, at, at.memory(tdr))
    }

    fn memory(&self, leaf: Leaf, at: BundleAt, input: SeamRegs) -> (u16, Outcome) {
        let mut last = input;
        let done = self.on_into(self.seam.this_cpu(), leaf, input, &mut last);
        let reached = match done {
            Ok(()) => at.list.last + 1,
            // The entry that failed, bits 11:3.
            Err(_) => (last.rcx >> 3 & 0x1ff) as u16,
        };
        (reached, done)
    }

    /// Blocks the pages of a GPA list for writing.
    pub(crate) fn export_blockw(&self, tdr: Hpa, list: ListAt) -> Outcome {
        self.here(Leaf::ExportBlockw, regs(list.register(), tdr.get()))
            .map(drop)
    }

    /// Makes exported pages of a GPA list ordinary pages again, after an export that was aborted.
    pub(crate) fn export_restore(&self, tdr: Hpa, list: ListAt) -> Outcome {
        self.here(Leaf::ExportRestore, regs(list.register(), tdr.get()))
            .map(drop)
    }

    /// Lets a page be written again.
    pub(crate) fn export_unblockw(&self, at: super::EntryAt, tdr: Hpa) -> Outcome {
        self.entry(Leaf::ExportUnblockw, at, tdr)
    }

    /// Stops the TD for the rest of the export. No vCPU is inside.
    pub(crate) fn export_pause(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::ExportPause, regs(tdr.get(), 0)).map(drop)
    }

    /// Makes an epoch token, with `start` the start token: the TD may not run here any more.
    pub(crate) fn export_track(&self, tdr: Hpa, at: BundleAt, start: bool) -> Outcome {
        let input = SeamRegs {
            r10: if start { COMMAND } else { 0 },
            ..at.token(tdr)
        };
        self.here(Leaf::ExportTrack, input).map(drop)
    }

    /// Ends an export; the TD runs on here. After the start token that needs the abort token of the
    /// target, at `token`.
    pub(crate) fn export_abort(&self, tdr: Hpa, token: Option<BundleAt>) -> Outcome {
        let input = match token {
            Some(at) => at.token(tdr),
            None => regs(tdr.get(), 0),
        };
        self.here(Leaf::ExportAbort, input).map(drop)
    }

    /// Begins an import session.
    pub(crate) fn import_immutable(&self, tdr: Hpa, at: BundleAt) -> Outcome {
        self.here(Leaf::ImportStateImmutable, at.state(tdr))
            .map(drop)
    }

    /// Imports the TD's state.
    pub(crate) fn import_td(&self, tdr: Hpa, at: BundleAt) -> Outcome {
        self.here(Leaf::ImportStateTd, at.state(tdr)).map(drop)
    }

    /// Imports a vCPU's state on `cpu`, with which the vCPU becomes associated.
    pub(crate) fn import_vcpu(&self, cpu: CpuId, tdvpr: Hpa, at: BundleAt) -> Outcome {
        self.on(cpu, Leaf::ImportStateVp, at.state(tdvpr)).map(drop)
    }

    /// Imports the pages of a GPA list; `new_pages` lists the pages that become the TD's. Returns the
    /// number of entries that were worked on, all of them unless the call failed.
    pub(crate) fn import_mem(&self, tdr: Hpa, at: BundleAt, new_pages: Hpa) -> (u16, Outcome) {
        let input = SeamRegs {
            r13: new_pages.get(),
            ..at.memory(tdr)
        };
        self.memory(Leaf::ImportMem, at, input)
    }

    /// Takes an epoch token.
    pub(crate) fn import_track(&self, tdr: Hpa, at: BundleAt) -> Outcome {
        self.here(Leaf::ImportTrack, at.token(tdr)).map(drop)
    }

    /// Ends an import after the start token: the TD may run here.
    pub(crate) fn import_end(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::ImportEnd, regs(tdr.get(), 0)).map(drop)
    }

    /// Lets the TD run here while the rest of its memory is imported.
    pub(crate) fn import_commit(&self, tdr: Hpa) -> Outcome {
        self.here(Leaf::ImportCommit, regs(tdr.get(), 0)).map(drop)
    }

    /// Ends an import for good, and makes the token that lets the source run the TD again.
    pub(crate) fn import_abort(&self, tdr: Hpa, at: BundleAt) -> Outcome {
        self.here(Leaf::ImportAbort, at.token(tdr)).map(drop)
    }
}
