//! One page leaves or comes.

use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, Hpa, Level, Page, PagePort, Result};
use zerocopy::little_endian::{U32, U64};

use super::space::{Leaf, Place, leaf_slot};
use super::stage::Stage;
use super::{SwapSlot, SwapStore, bytes};
use crate::cell::{Cell, VmsaPage};
use crate::command::{self, Command};
use crate::context::Context;
use crate::memory::{Frame, Memory};
use crate::shared::Shared;
use crate::sp::{Held, RmpEntry, Sp, base};
use crate::status::{Failure, Status};
use crate::vmsa::VMSA_GPA;

/// PAGE_TYPE of the two commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum SwapType {
    Data = 0,
    Metadata = 1,
    Vmsa = 2,
}

impl SwapType {
    fn of(leaf: &Leaf) -> Self {
        match leaf.is_vmsa {
            true => Self::Vmsa,
            false => Self::Data,
        }
    }
}

/// ROOT_MDATA_EN: the record is in the context.
const ROOT: u32 = 1 << 3;

/// The place of a record.
#[derive(Clone, Copy, Debug)]
pub(super) enum Record {
    At(u64),
    Root,
}

impl Record {
    fn flag_and_address(self) -> (u32, U64) {
        match self {
            Self::At(address) => (0, U64::new(address)),
            Self::Root => (ROOT, U64::new(0)),
        }
    }
}

/// Pages that leave or come, one after the other.
pub(super) struct Swapping<'a, H: Host> {
    pub(super) shared: &'a Shared<H>,
    gctx: U64,
    asid: u32,
    out: Stage<'a, H>,
    back: Stage<'a, H>,
    store: &'a mut dyn SwapStore,
    contents: Vec<u8>,
}

/// A page that did not leave: why, and the page with the way in which it is held, unless its contents are lost.
type Stayed = (Error, Option<(Page, Held)>);

impl<'a, H: Host> Swapping<'a, H> {
    pub(super) fn new(
        shared: &'a Shared<H>,
        context: &Option<Context>,
        store: &'a mut dyn SwapStore,
    ) -> Result<Self> {
        let gctx = context.as_ref().and_then(Context::gctx);
        let gctx = base(gctx.ok_or(Error::WrongState(shared.step()))?)?;
        Ok(Self {
            shared,
            gctx: U64::new(gctx.get()),
            asid: shared.asid()?.0,
            out: Stage::new(shared.sp(), Held::Immutable),
            back: Stage::new(shared.sp(), Held::Host),
            store,
            contents: Vec::new(),
        })
    }

    pub(super) fn sp(&self) -> Sp<'a, H> {
        self.shared.sp()
    }

    // --- The commands ---

    fn command_out(
        &self,
        kind: SwapType,
        (from, level): (Hpa, Level),
        to: Hpa,
        record: Record,
        at: SwapSlot,
    ) -> Result<()> {
        let (root, mdata) = record.flag_and_address();
        let mut buffer = command::SnpPageSwapOut {
            gctx: self.gctx,
            src: U64::new(from.get()),
            dst: U64::new(to.get()),
            mdata,
            software_data: U64::new(u64::from(at.level) << 32 | u64::from(at.index)),
            flags: flags(kind, level, root),
            ..Default::default()
        };
        self.sp().run(Command::SnpPageSwapOut, &mut buffer)
    }

    fn command_in(
        &self,
        kind: SwapType,
        from: Hpa,
        (to, level): (Hpa, Level),
        record: Record,
    ) -> Result<()> {
        let (root, mdata) = record.flag_and_address();
        let mut buffer = command::SnpPageSwapIn {
            gctx: self.gctx,
            src: U64::new(from.get()),
            dst: U64::new(to.get()),
            mdata,
            flags: flags(kind, level, root),
            ..Default::default()
        };
        self.sp().run(Command::SnpPageSwapIn, &mut buffer)
    }

    // --- A page's contents ---

    /// SNP_PAGE_SWAP_OUT, and the store. Firmware has let the page go then.
    ///
    /// # Errors
    /// With [`Refused::Firmware`] the page is as it was before, with [`Refused::Store`] it came back from the stage.
    pub(super) fn contents_out(
        &mut self,
        kind: SwapType,
        page: &Page,
        record: Record,
        at: SwapSlot,
    ) -> Result<(), Refused> {
        let level = page.level();
        let stage = self.out.page(level).map_err(Refused::Firmware)?.hpa();
        let from = (page.hpa(), level);
        self.command_out(kind, from, stage, record, at)
            .map_err(Refused::Firmware)?;
        self.contents.resize(bytes(level), 0);
        let kept = (self.sp().pages.read(stage, &mut self.contents))
            .and_then(|()| self.store.put(at, &self.contents));
        kept.map_err(|error| match self.command_in(kind, stage, from, record) {
            Ok(()) => Refused::Store(error),
            Err(lost) => Refused::Lost(lost),
        })
    }

    /// The store, and SNP_PAGE_SWAP_IN into a page that is prepared.
    pub(super) fn contents_in(
        &mut self,
        kind: SwapType,
        page: &Page,
        record: Record,
        at: SwapSlot,
    ) -> Result<()> {
        let level = page.level();
        self.contents.resize(bytes(level), 0);
        self.store.get(at, &mut self.contents)?;
        let sp = self.sp();
        let stage = self.back.page(level)?;
        sp.write(stage, &self.contents)?;
        let from = stage.hpa();
        self.command_in(kind, from, (page.hpa(), level), record)
    }

    // --- Pages of the guest ---

    /// A slot whose record can be written.
    fn slot(&mut self, memory: &mut Memory) -> Result<(u32, Record)> {
        let slot = memory.swap.next_slot()?;
        if memory.swap.lacks_table(0, slot) {
            let table = self.new_table()?;
            memory.swap.push_table(0, table);
        }
        Ok((slot, Record::At(memory.swap.record(0, slot)?)))
    }

    /// Takes out a page that no table maps. Tries it as data, then as register state: the host does not see which it is.
    fn page_out(
        &mut self,
        page: Page,
        gfn: Gfn,
        kinds: &[SwapType],
        (slot, record): (u32, Record),
    ) -> Result<SwapType, Stayed> {
        let sp = self.sp();
        let (pfn, level) = (page.pfn(), page.level());
        let entry = match self.fixed(gfn) {
            Ok(entry) => entry,
            Err(error) => return Err((error, Some((page, Held::Assigned)))),
        };
        if let Err(error) = sp.rmpupdate(pfn, level, entry) {
            return Err((error, Some((page, Held::Assigned))));
        }
        let at = leaf_slot(slot);
        let mut refused = Error::Busy;
        for kind in kinds {
            match self.contents_out(*kind, &page, record, at) {
                Ok(()) => {
                    // It is out, even if the RMP keeps the page, which is listed then.
                    let _ = sp.release(page, Held::Immutable);
                    return Ok(*kind);
                }
                Err(Refused::Firmware(error)) => {
                    refused = error;
                    if !is_other_kind(&error) {
                        break;
                    }
                }
                Err(Refused::Store(error)) => return Err((error, Some((page, Held::Assigned)))),
                Err(Refused::Lost(error)) => {
                    self.shared.poison(&error);
                    let _ = sp.release(page, Held::Immutable);
                    return Err((error, None));
                }
            }
        }
        let held = match sp.reclaim(pfn, level) {
            Ok(()) => Held::Assigned,
            Err(error) => {
                self.shared.poison(&error);
                Held::Immutable
            }
        };
        Err((refused, Some((page, held))))
    }

    fn fixed(&self, gfn: Gfn) -> Result<RmpEntry> {
        let gpa = gfn.base().ok_or(Error::Invalid(Field::Gfn, gfn.get()))?;
        Ok(RmpEntry::Guest {
            asid: self.asid,
            gpa: gpa.get(),
            immutable: true,
        })
    }

    fn frame_out(&mut self, memory: &mut Memory, gfn: Gfn, level: Level) -> Result<()> {
        let slot = self.slot(memory)?;
        self.out.page(level)?;
        let not_there = Error::NotFound(Field::Gfn, gfn.get());
        if memory.frame(gfn).ok_or(not_there)?.1.held != Held::Assigned {
            return Err(Error::Poisoned);
        }
        self.shared.unmap_everywhere(memory, gfn)?;
        let Frame { page, .. } = memory.remove(gfn).ok_or(not_there)?;
        let kinds = match level {
            Level::Size4K => &[SwapType::Data, SwapType::Vmsa][..],
            _ => &[SwapType::Data],
        };
        match self.page_out(page, gfn, kinds, slot) {
            Ok(kind) => {
                let leaf = Leaf {
                    place: Place::Memory(gfn),
                    level,
                    is_vmsa: kind == SwapType::Vmsa,
                };
                memory.swap.fill(slot.0, leaf);
                Ok(())
            }
            Err((error, stayed)) => {
                if let Some((page, held)) = stayed {
                    memory.insert(gfn, Frame { page, held });
                }
                Err(error)
            }
        }
    }

    /// True if the host has a page of that size for the contents to pass through.
    fn passes(&mut self, level: Level) -> Result<bool> {
        match self.out.page(level) {
            Ok(_) => Ok(true),
            Err(Error::NoMemory) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The pages of a range, lowest first. Returns the number of frames.
    pub(super) fn range_out(&mut self, memory: &mut Memory, first: Gfn, pages: u64) -> Result<u64> {
        let end = first.get().saturating_add(pages);
        for (gfn, level) in memory.touching(first, pages) {
            let is_inside = gfn >= first && gfn.get() + level.frames() <= end;
            if level != Level::Size4K && !(is_inside && self.passes(level)?) {
                self.shared.split(memory, gfn)?;
            }
        }
        let mut done = 0;
        for (gfn, level) in memory.touching(first, pages) {
            self.frame_out(memory, gfn, level)?;
            done += level.frames();
        }
        Ok(done)
    }

    /// The register state of a vCPU that is not running.
    pub(super) fn vmsa_out(&mut self, memory: &mut Memory, cell: &Cell) -> Result<()> {
        let mut state = cell.state();
        if state.vmsa.is_none() {
            return Ok(());
        }
        let slot = self.slot(memory)?;
        let Some(VmsaPage { page, .. }) = state.vmsa.take() else {
            return Ok(());
        };
        match self.page_out(page, VMSA_FRAME, &[SwapType::Vmsa], slot) {
            Ok(_) => {
                let leaf = Leaf {
                    place: Place::Vcpu(cell.id),
                    level: Level::Size4K,
                    is_vmsa: true,
                };
                memory.swap.fill(slot.0, leaf);
                Ok(())
            }
            Err((error, stayed)) => {
                state.vmsa = stayed.map(|(page, held)| VmsaPage { page, held });
                Err(error)
            }
        }
    }

    /// A page that the host prepares, filled.
    fn page_in(&mut self, memory: &Memory, slot: u32, leaf: &Leaf) -> Result<Page> {
        let record = Record::At(memory.swap.record(0, slot)?);
        let sp = self.sp();
        let (page, gfn) = match leaf.place {
            Place::Memory(gfn) => (sp.alloc(leaf.level)?, gfn),
            Place::Vcpu(_) => (sp.alloc_vmsa()?, VMSA_FRAME),
        };
        if let Err(error) = sp.assign(&page, self.asid, gfn, true) {
            sp.free(page);
            return Err(error);
        }
        match self.contents_in(SwapType::of(leaf), &page, record, leaf_slot(slot)) {
            Ok(()) => Ok(page),
            Err(error) => {
                let _ = sp.release(page, Held::Immutable);
                Err(error)
            }
        }
    }

    fn leaf_in(&mut self, memory: &mut Memory, slot: u32, leaf: &Leaf) -> Result<()> {
        let held = Held::Assigned;
        match leaf.place {
            Place::Memory(gfn) => {
                let page = self.page_in(memory, slot, leaf)?;
                memory.swap.release(slot);
                // One that the port cannot map now, it maps at the next touch.
                let _ = self.shared.enter(memory, gfn, page, held);
            }
            Place::Vcpu(vcpu) => {
                let cell = self.shared.cell_of(vcpu)?;
                let page = self.page_in(memory, slot, leaf)?;
                memory.swap.release(slot);
                cell.state().vmsa = Some(VmsaPage { page, held });
                cell.protect();
            }
        }
        Ok(())
    }

    /// The pages of a range that are out. Returns the number of frames.
    pub(super) fn range_in(&mut self, memory: &mut Memory, first: Gfn, pages: u64) -> Result<u64> {
        let mut done = 0;
        for (slot, ..) in memory.swap.touching(first, pages) {
            if let Some(leaf) = memory.swap.leaf(slot) {
                self.leaf_in(memory, slot, &leaf)?;
                done += leaf.level.frames();
            }
        }
        self.free_tables(memory);
        Ok(done)
    }

    /// Everything that is out.
    pub(super) fn all_in(&mut self, memory: &mut Memory) -> Result<()> {
        for (slot, leaf) in memory.swap.used() {
            self.leaf_in(memory, slot, &leaf)?;
        }
        self.free_tables(memory);
        Ok(())
    }
}

/// The address at which the host's register state is measured.
const VMSA_FRAME: Gfn = Gfn::new(VMSA_GPA >> 12);

/// A page that did not leave.
#[derive(Debug)]
pub(super) enum Refused {
    /// The page is as it was.
    Firmware(Error),
    /// The page is back, and the host can change its entry.
    Store(Error),
    /// The contents are lost: the page left, and firmware does not take it back.
    Lost(Error),
}

fn flags(kind: SwapType, level: Level, root: u32) -> U32 {
    U32::new((kind as u32) << 1 | u32::from(level == Level::Size2M) | root)
}

/// Firmware's answer for a page of another kind than the command says.
fn is_other_kind(error: &Error) -> bool {
    Failure::of(error).and_then(|failure| failure.status()) == Some(Status::INVALID_PARAM)
}
