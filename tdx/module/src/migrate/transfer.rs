//! Common parts of TDH.EXPORT.MEM and TDH.IMPORT.MEM: operands, page buffers and MAC lists.

use super::entries::{GpaList, Words};
use super::interrupt::MemoryOperands;
use super::lists::PageEntry;
use super::mbmd::Kind;
use super::operands::{MbmdBuffer, StreamOperand, lock_migration, stream_busy};
use super::stream::Stream;
use crate::call::{Call, Leaf, TdRef, busy, shared_operand, tdr};
use crate::lock::{Guard, LockMode, Side};
use crate::platform::Platform;
use crate::status::Operand;
use crate::td::Td;
use std::sync::MutexGuard;

const MACS_OF_A_PAGE: u16 = 256;
const MAC: u64 = 16;
/// R13 of an import without new pages.
const NO_LIST: u64 = u64::MAX;

/// Checked operands and locks of a memory leaf.
pub(super) struct Transfer<'p> {
    pub(super) td: &'p Td,
    pub(super) operand: StreamOperand,
    pub(super) stream: MutexGuard<'p, Stream>,
    pub(super) list: GpaList,
    pub(super) buffers: Words,
    macs: [Option<u64>; 2],
    pub(super) new_pages: Option<Words>,
    pub(super) mbmd: MbmdBuffer,
    pub(super) epoch: u32,
    rax: u64,
    fixed: [u64; 4],
    _tree: Guard<'p>,
    _mig: Guard<'p>,
    _op_state: Option<Guard<'p>>,
    _tdr: TdRef<'p>,
}

impl<'p> Transfer<'p> {
    /// Checks the operands of a memory leaf, in the architecture's order.
    pub(super) fn begin(c: &mut Call<'p, '_>, importing: bool) -> Leaf<Self> {
        let p = c.p;
        let r = *c.regs;
        let tdr = tdr(p, r.rdx, LockMode::Shared, Operand::RDX)?;
        let td = tdr.td;
        let op_state = c.td_state(td, true)?;
        let mig = lock_migration(td, LockMode::Shared)?;
        let (num_migs, epoch) = {
            let m = td.migration();
            (m.num_migs, m.mig_epoch)
        };
        let operand = StreamOperand::parse(r.r10, num_migs.saturating_sub(1))?;
        let stream = td.streams.forward(operand.index).ok_or_else(stream_busy)?;
        let tree = td
            .tree
            .guard(LockMode::Shared, Side::Host)
            .ok_or(busy(Operand::SEPT_TREE))?;
        let list = GpaList::parse(p, r.rcx)?;
        let buffers = Words::page(p, r.r9, Operand::R9)?;
        let first_half = list.info.first < MACS_OF_A_PAGE;
        let second_half = list.info.last >= MACS_OF_A_PAGE;
        let page = |wanted: bool, pa, operand| match wanted {
            true => shared_operand(p, pa, 4096, operand).map(Some),
            false => Ok(None),
        };
        let macs = [
            page(first_half, r.r11, Operand::R11)?,
            page(second_half, r.r12, Operand::R12)?,
        ];
        let new_pages = match importing && r.r13 != NO_LIST {
            true => Some(Words::page(p, r.r13, Operand::R13)?),
            false => None,
        };
        Ok(Transfer {
            td,
            operand,
            stream,
            list,
            buffers,
            macs,
            new_pages,
            mbmd: MbmdBuffer::parse(p, r.r8)?,
            epoch,
            rax: r.rax,
            fixed: [
                r.r9,
                if first_half { r.r11 } else { 0 },
                if second_half { r.r12 } else { 0 },
                if importing { r.r13 } else { NO_LIST },
            ],
            _tree: tree,
            _mig: mig,
            _op_state: op_state,
            _tdr: tdr,
        })
    }

    /// Operands that a resumed call must repeat.
    pub(super) fn operands(&self) -> MemoryOperands {
        let [buffers, first, second, new_pages] = self.fixed;
        MemoryOperands {
            list: self.list.info.register(),
            buffers,
            macs: [first, second],
            new_pages,
            epoch: self.epoch,
        }
    }

    pub(super) fn rax(&self) -> u64 {
        self.rax
    }

    /// Lists of MACs the bundle has.
    pub(super) fn mac_lists(&self) -> u64 {
        self.macs.iter().flatten().count() as u64
    }

    /// Address of the MAC of the list's current entry.
    fn mac_address(&self) -> u64 {
        let index = self.list.info.first;
        let list = self.macs[usize::from(index / MACS_OF_A_PAGE) & 1].unwrap_or(0);
        list + u64::from(index % MACS_OF_A_PAGE) * MAC
    }

    pub(super) fn write_mac(&self, p: &Platform, mac: &super::cipher::Tag) {
        p.mem.host_write(self.mac_address(), mac);
    }

    pub(super) fn read_mac(&self, p: &Platform) -> super::cipher::Tag {
        let mut mac = [0; 16];
        p.mem.host_read(self.mac_address(), &mut mac);
        mac
    }

    pub(super) fn buffer(&self, p: &Platform) -> PageEntry {
        self.buffers.page_entry(p, self.list.info.first)
    }
}

/// The kind both leaves work with.
pub(super) const KIND: Kind = Kind::Memory;

/// The shared page of a buffer list's entry.
pub(super) fn buffer_page(p: &Platform, entry: PageEntry) -> Leaf<u64> {
    shared_operand(p, entry.0, 4096, Operand::MIG_BUFF_LIST_ENTRY)
}
