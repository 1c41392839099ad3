//! Pages of an SNP guest leave memory and come back: SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN.
//!
//! Firmware encrypts a page that leaves under a key of the guest's context, and keeps a record of it in a page that only
//! firmware writes. The record counts once, so a page that is changed, an older copy of it, or one of another place does
//! not come back. 64 records fit a page. Pages of records leave too, when the whole guest does; the record of the last of
//! them is in the context.
//!
//! [`SevVm::swap_out`] takes some pages of a guest that may run on: a touch of one of them leaves as
//! [`Exit::MemoryFault`](kvm_ops::Exit::MemoryFault), and [`SevVm::swap_in`] brings it back. [`SevVm::suspend`] stops the
//! guest and takes everything but its context; [`SevVm::resume`] brings everything back and lets it run.

mod page;
mod space;
mod stage;
mod table;

use kvm_ops::moves::Claimed;
use kvm_ops::{Error, Gfn, Host, Level, Result, Step, VcpuId};

pub(crate) use space::{Leaf, Place, SwapSpace};

use crate::SevVm;
use crate::context::Context;
use crate::memory::Memory;
use crate::migrate::is_plain_owner;
use crate::shared::Shared;
use page::Swapping;

/// The name of a page that left memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapSlot {
    /// 0 for a page of the guest; n for a page of records of level n - 1.
    pub level: u8,
    /// The number among those of the level.
    pub index: u32,
}

/// Where pages are while they are not in memory: a file, a link, memory of the host. The pages are encrypted. A store that
/// loses, changes or repeats them does not harm the guest but for what it loses.
///
/// Context and memory of the VM are locked while the store works: faults, conversions and changes of slots wait, and the store
/// must not call the VM. The vCPUs run on until they fault.
pub trait SwapStore {
    /// Keeps a page of 4 KiB or 2 MiB, in place of what it had under that name.
    ///
    /// # Errors
    /// The page stays in memory.
    fn put(&mut self, at: SwapSlot, page: &[u8]) -> Result<()>;

    /// Fills `page`, which is as long as it was at [`put`](Self::put), with what it keeps under that name.
    ///
    /// # Errors
    /// The page stays out of memory.
    fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> Result<()>;
}

/// What [`SevVm::suspend`] took out of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Suspended {
    /// Pages of the guest, register state included, in pages of 4 KiB.
    pub pages: u64,
    /// Pages of records.
    pub records: u64,
}

impl<H: Host> SevVm<H> {
    /// Takes the private pages of a range out of memory, each with its own record. The guest may run on. A large page that
    /// is only partly in the range is split; so is one for which the host has no large page to pass it through.
    ///
    /// Returns how many frames left. No page is mapped in the place of a frame that is out. Converting it gives its contents up, as
    /// converting a frame in memory does.
    ///
    /// # Errors
    /// [`Error::NotOffered`] but for SNP; [`Error::WrongState`] for a guest that is not launched; [`Error::Busy`] for one that is
    /// suspended; [`Error::NoMemory`]; what firmware, the RMP or the store answers: POLICY_FAILURE for a guest whose policy
    /// forbids it (PAGE_SWAP_DISABLE). The page at which it failed is in memory, those before it are out. Where firmware fails so
    /// that a page is neither here nor there, the VM is poisoned.
    pub fn swap_out(&self, first: Gfn, pages: u64, store: &mut dyn SwapStore) -> Result<u64> {
        let shared = &self.shared;
        shared.within("swap_out", || {
            let (context, mut memory) = shared.swappable(first, pages)?;
            Swapping::new(shared, &context, store)?.range_out(&mut memory, first, pages)
        })
    }

    /// Brings the frames of a range back that are out. Returns how many came.
    ///
    /// # Errors
    /// As [`swap_out`](Self::swap_out); BAD_MEASUREMENT for a page that is not what left, and an older one. The page at which it
    /// failed is out and can be brought back later.
    pub fn swap_in(&self, first: Gfn, pages: u64, store: &mut dyn SwapStore) -> Result<u64> {
        let shared = &self.shared;
        shared.within("swap_in", || {
            let (context, mut memory) = shared.swappable(first, pages)?;
            Swapping::new(shared, &context, store)?.range_in(&mut memory, first, pages)
        })
    }

    /// True if a frame's private page is out of memory.
    pub fn is_swapped_out(&self, gfn: Gfn) -> bool {
        self.shared.memory().swap.at(gfn).is_some()
    }

    /// Stops the guest, and takes its pages, its register state and their records out of memory. The context page stays.
    /// Only [`resume`](Self::resume) and the teardown are left then; a vCPU that is run answers [`Error::Busy`].
    ///
    /// # Errors
    /// As [`swap_out`](Self::swap_out); [`Error::Busy`] while a move is under way; [`Error::Invalid`] for a guest that shares its
    /// context. The guest is stopped; a part of it may be out. Call it again, or [`resume`](Self::resume).
    pub fn suspend(&self, store: &mut dyn SwapStore) -> Result<Suspended> {
        let shared = &self.shared;
        shared.within("suspend", || {
            let _claim = shared.claim_for_suspension()?;
            shared.suspend(store)
        })
    }

    /// Brings back what is out of memory, and lets the guest run.
    ///
    /// # Errors
    /// As [`swap_in`](Self::swap_in). The guest is stopped, and a part of it may be out. Call it again.
    pub fn resume(&self, store: &mut dyn SwapStore) -> Result<()> {
        let shared = &self.shared;
        shared.within("resume", || {
            let _claim = shared.claim_for_suspension()?;
            shared.bring_back(store)?;
            shared.let_run();
            Ok(())
        })
    }
}

/// A context that is locked, and has a guest.
type Locked<'a> = spin::MutexGuard<'a, Option<Context>>;

impl<H: Host> Shared<H> {
    /// Context and memory of a guest whose pages of that range may leave or come.
    fn swappable(
        &self,
        first: Gfn,
        pages: u64,
    ) -> Result<(Locked<'_>, spin::MutexGuard<'_, Memory>)> {
        self.require_snp()?;
        self.step().require(Step::Runnable)?;
        self.check_range(first, pages)?;
        let context = self.context();
        let memory = self.memory();
        match memory.swap.is_suspended() {
            true => Err(Error::Busy),
            false => Ok((context, memory)),
        }
    }

    pub(crate) fn require_snp(&self) -> Result<()> {
        match self.is_snp() {
            true => Ok(()),
            false => kvm_ops::not_offered!("swapping pages of a guest without SNP"),
        }
    }

    /// Keeps moves away from a guest that is its VM's alone.
    pub(crate) fn claim_for_suspension(&self) -> Result<Claimed<'_>> {
        self.require_snp()?;
        let claim = self.moving.claim().claim()?;
        self.step().require(Step::Runnable)?;
        is_plain_owner(self)?;
        Ok(claim)
    }

    /// Stops the guest and takes everything out of memory but its context.
    pub(crate) fn suspend(&self, store: &mut dyn SwapStore) -> Result<Suspended> {
        self.stop();
        let context = self.context();
        let mut memory = self.memory();
        memory.swap.set_suspended(true);
        let mut swapping = Swapping::new(self, &context, store)?;
        swapping.range_out(&mut memory, Gfn::new(0), u64::MAX)?;
        for cell in self.all_cells() {
            swapping.vmsa_out(&mut memory, &cell)?;
        }
        swapping.fold(&mut memory)?;
        Ok(memory.swap.totals())
    }

    /// Brings back what is out of memory. The guest stays stopped.
    pub(crate) fn bring_back(&self, store: &mut dyn SwapStore) -> Result<()> {
        let context = self.context();
        let mut memory = self.memory();
        let mut swapping = Swapping::new(self, &context, store)?;
        swapping.unfold(&mut memory)?;
        swapping.all_in(&mut memory)
    }

    /// Lets a guest run that is back.
    pub(crate) fn let_run(&self) {
        self.memory().swap.set_suspended(false);
        self.gate.open();
    }

    /// The cell of a vCPU whose register state is out.
    fn cell_of(&self, vcpu: VcpuId) -> Result<alloc::sync::Arc<crate::cell::Cell>> {
        let cell = self.cells().get(&vcpu).cloned();
        cell.ok_or(Error::NotFound(kvm_ops::Field::Vcpu, vcpu.0.into()))
    }
}

/// Bytes of a page.
const fn bytes(level: Level) -> usize {
    level.bytes() as usize
}
