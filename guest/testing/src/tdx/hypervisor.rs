//! The host's hands: what it can do to a TD, and what an honest one does.

use super::machine::{MachineError, Pool, operands};
use super::td::Inner;
use super::{Exit, Reply, ViolationBy};
use crate::sync::lock;
use kvm_ops_guest::tdx::{QuoteHeader, QuoteStatus, Vmcall, VmcallStatus};
use kvm_ops_guest::{GpaRange, PageSize};
use soft_tdx_module::{HostLeaf, Platform, Regs, SeptState, SeptView, Status};

const PAGE: u64 = PageSize::Size4K.bytes();
const LARGE: u64 = PageSize::Size2M.bytes();
/// The answer to a hypercall that does not exist (KVM_ENOSYS, negated).
const NO_SUCH_HYPERCALL: u64 = (-1000_i64) as u64;

/// The host's side of a [`TestTd`](super::TestTd): its memory, its SEAMCALLs, and the vCPU that exited.
///
/// Guest-physical addresses of pages come without the shared bit. Calls that a vCPU's instruction delays
/// are repeated, and vCPUs are interrupted where the module wants them out of the TD.
pub struct Hypervisor<'a> {
    pub(super) inner: &'a Inner,
    pub(super) vcpu: usize,
}

impl Hypervisor<'_> {
    /// The vCPU that exited; 0 outside of an exit.
    pub fn vcpu(&self) -> usize {
        self.vcpu
    }

    /// The platform, for everything else.
    pub fn platform(&self) -> &Platform {
        &self.inner.machine.p
    }

    /// The TD's root page.
    pub fn tdr(&self) -> u64 {
        self.inner.machine.tdr
    }

    /// Reads memory of the host. Shared guest memory lies at the same address; of private memory the host
    /// sees ciphertext ([`Hypervisor::behind`] says where).
    ///
    /// # Errors
    /// There is no such memory.
    pub fn read(&self, pa: u64, len: usize) -> Result<Vec<u8>, MachineError> {
        let mut bytes = vec![0; len];
        self.platform().read_memory(pa, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes memory of the host. A private page so written is lost to the TD.
    ///
    /// # Errors
    /// There is no such memory.
    pub fn write(&self, pa: u64, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.platform().write_memory(pa, bytes)?)
    }

    /// A SEAMCALL with RCX, RDX and R8, and its status. The operands are those of the module's interface:
    /// a page with its level, the TDR, a page of the host.
    ///
    /// # Errors
    /// The host's processor cannot execute.
    pub fn seamcall(
        &self,
        leaf: HostLeaf,
        [rcx, rdx, r8]: [u64; 3],
    ) -> Result<Status, soft_tdx_module::LpError> {
        let _pool = lock(&self.inner.pool);
        let mut regs = Regs {
            rax: leaf.number(),
            r8,
            ..operands(rcx, rdx)
        };
        let machine = &self.inner.machine;
        machine.p.seamcall(machine.host_lp(), &mut regs)
    }

    /// A private page of the host that no TD has.
    ///
    /// # Errors
    /// [`MachineError::Full`].
    pub fn free_page(&self, size: PageSize) -> Result<u64, MachineError> {
        lock(&self.inner.pool).take(size).ok_or(MachineError::Full)
    }

    /// The entry at which a walk of the Secure EPT to `size` ends.
    pub fn entry(&self, gpa: u64, size: PageSize) -> SeptView {
        self.inner.machine.entry(gpa, size as u8)
    }

    /// The host address of the private page of `gpa`; `None` if there is none.
    pub fn behind(&self, gpa: u64) -> Option<u64> {
        let view = self.entry(gpa, PageSize::Size4K);
        let is_page = matches!(view.state, SeptState::Mapped | SeptState::Pending);
        let offset = gpa & ((PAGE << (9 * u32::from(view.level))) - 1);
        is_page.then_some((view.entry & 0x000F_FFFF_FFFF_F000) + (offset & !(PAGE - 1)))
    }

    /// Returns whether the host takes a page for shared.
    pub fn is_shared(&self, gpa: u64) -> bool {
        self.inner.is_shared(gpa)
    }

    /// Gives a new private page at `gpa`, to be accepted (TDH.MEM.PAGE.AUG). Its host address.
    ///
    /// # Errors
    /// The module refuses, or the host has no page.
    pub fn give(&self, gpa: u64, size: PageSize) -> Result<u64, MachineError> {
        let mut pool = lock(&self.inner.pool);
        self.give_from(&mut pool, gpa, size)
    }

    /// Gives a page of the host's choice at `gpa`.
    ///
    /// # Errors
    /// The module refuses.
    pub fn give_page(&self, gpa: u64, size: PageSize, page: u64) -> Result<(), MachineError> {
        let mut pool = lock(&self.inner.pool);
        self.inner.machine.aug(gpa, size, page, &mut pool)
    }

    fn give_from(&self, pool: &mut Pool, gpa: u64, size: PageSize) -> Result<u64, MachineError> {
        let page = pool.take(size).ok_or(MachineError::Full)?;
        let given = self.inner.machine.aug(gpa, size, page, pool);
        if given.is_err() {
            pool.give_back(page, size);
        }
        given.map(|()| page)
    }

    /// Takes a private page away, with all that the module wants: block, track, interrupt, remove.
    ///
    /// # Errors
    /// The module refuses.
    pub fn take(&self, gpa: u64, size: PageSize) -> Result<(), MachineError> {
        let mut pool = lock(&self.inner.pool);
        self.take_to(&mut pool, gpa, size)
    }

    fn take_to(&self, pool: &mut Pool, gpa: u64, size: PageSize) -> Result<(), MachineError> {
        let page = self.behind(gpa);
        let at = operands(gpa | size as u64, self.tdr());
        self.block(at)?;
        self.inner.machine.host_call(HostLeaf::MemPageRemove, at)?;
        if let Some(page) = page {
            pool.give_back(page, size);
        }
        Ok(())
    }

    /// TDH.MEM.RANGE.BLOCK, and no vCPU has the old translation any more.
    fn block(&self, at: Regs) -> Result<(), MachineError> {
        let machine = &self.inner.machine;
        machine.host_call(HostLeaf::MemRangeBlock, at)?;
        machine.host_call(HostLeaf::MemTrack, operands(self.tdr(), 0))?;
        for vcpu in 0..self.inner.vcpus.len() {
            self.inner.interrupt(vcpu);
        }
        Ok(())
    }

    /// Splits a private page of 2 MiB; its contents stay.
    fn split(&self, pool: &mut Pool, gpa: u64) -> Result<(), MachineError> {
        let at = operands(gpa & !(LARGE - 1) | PageSize::Size2M as u64, self.tdr());
        self.block(at)?;
        let demote = Regs {
            r8: pool.take(PageSize::Size4K).ok_or(MachineError::Full)?,
            ..at
        };
        self.inner
            .machine
            .host_call(HostLeaf::MemPageDemote, demote)?;
        Ok(())
    }

    /// An honest host's MapGPA: converts `bytes` from `gpa` on, which has the shared bit if they are to be
    /// shared. Private pages come in 2 MiB where they fit. The status that the guest gets in R10.
    pub fn map_gpa(&self, gpa: u64, bytes: u64) -> VmcallStatus {
        let bit = self.inner.machine.gpaw.shared_bit();
        let range = match GpaRange::new(gpa & !bit, bytes) {
            Ok(range) if self.inner.machine.is_ram(range.start(), bytes) => range,
            Err(kvm_ops_guest::RangeError::Unaligned) => return VmcallStatus::ALIGN_ERROR,
            _ => return VmcallStatus::INVALID_OPERAND,
        };
        match self.convert(range, gpa & bit != 0) {
            Ok(()) => VmcallStatus::SUCCESS,
            Err(_) => VmcallStatus::INVALID_OPERAND,
        }
    }

    fn convert(&self, range: GpaRange, shared: bool) -> Result<(), MachineError> {
        let mut pool = lock(&self.inner.pool);
        self.inner.set_shared(range, shared);
        let mut at = range.start();
        while at < range.end() {
            let view = self.entry(at, PageSize::Size4K);
            let rest = range.end() - at;
            let present = matches!(view.state, SeptState::Mapped | SeptState::Pending);
            let fits = at.is_multiple_of(LARGE) && rest >= LARGE;
            let mut done = PageSize::Size4K;
            match (shared, present, view.level) {
                (true, true, 0) => self.take_to(&mut pool, at, done)?,
                (true, true, _) if fits => {
                    done = PageSize::Size2M;
                    self.take_to(&mut pool, at, done)?;
                }
                // The guest keeps the other part of a large page, with what is in it.
                (true, true, _) => {
                    self.split(&mut pool, at)?;
                    continue;
                }
                (false, false, _) => {
                    if fits && self.has_room(at) {
                        done = PageSize::Size2M;
                    }
                    self.give_from(&mut pool, at, done)?;
                }
                (true, false, _) | (false, true, _) => {}
            }
            at += done.bytes();
        }
        Ok(())
    }

    /// Returns whether nothing is mapped in the 2 MiB at a GPA, not even a table.
    fn has_room(&self, gpa: u64) -> bool {
        let view = self.entry(gpa, PageSize::Size2M);
        view.level > 1 || view.state == SeptState::Free
    }

    /// An honest host's answer, as KVM and a VMM give it: memory is converted, and pages come when the
    /// guest first touches them; ports and device memory read as ones; CPUID reads as zeros; MSRs are
    /// unknown; GetQuote goes to the quoting service. It stops a guest that touches a page that is pending,
    /// private where it made it shared, shared where it did not, or beyond memory.
    pub fn honestly(&self, exit: &Exit) -> Reply {
        match exit {
            Exit::MapGpa { gpa, bytes } => Reply::Status(self.map_gpa(*gpa, *bytes), *gpa),
            Exit::Vmcall(call) => self.call(call),
            Exit::BadVmcall { refusal, .. } => Reply::Status(*refusal, 0),
            Exit::Hypercall { .. } => Reply::Status(VmcallStatus(NO_SUCH_HYPERCALL), 0),
            Exit::Violation { gpa, by } => self.violation(*gpa, *by),
            Exit::Lost(_) => Reply::Stop,
            Exit::Other(_) => Reply::Enter,
        }
    }

    fn call(&self, call: &Vmcall) -> Reply {
        match *call {
            Vmcall::In { width, .. } | Vmcall::MmioRead { width, .. } => {
                Reply::value(width.cut(u64::MAX))
            }
            Vmcall::RdMsr(_) | Vmcall::WrMsr(..) => Reply::Status(VmcallStatus::INVALID_OPERAND, 0),
            Vmcall::GetQuote(buffer) => Reply::Status(self.quote(buffer), 0),
            Vmcall::FatalError { .. } => Reply::Stop,
            _ => Reply::Enter,
        }
    }

    fn violation(&self, gpa: u64, by: ViolationBy) -> Reply {
        let machine = &self.inner.machine;
        let shared = gpa & machine.gpaw.shared_bit() != 0;
        let page = gpa & !(PAGE - 1);
        if shared || !machine.is_ram(page, PAGE) || self.is_shared(page) {
            return Reply::Stop;
        }
        let size = match by {
            ViolationBy::PendingAccess => return Reply::Stop,
            ViolationBy::Accept { level: 1 }
                if machine.is_ram(page, LARGE) && self.has_room(page) && !self.has_shared(page) =>
            {
                PageSize::Size2M
            }
            _ => PageSize::Size4K,
        };
        let mut pool = lock(&self.inner.pool);
        match self.entry(page, PageSize::Size4K).state {
            SeptState::Free => match self.give_from(&mut pool, page, size) {
                Ok(_) => Reply::Enter,
                Err(_) => Reply::Stop,
            },
            // Another vCPU was faster, or is at it.
            _ => Reply::Enter,
        }
    }

    /// Returns whether the host takes a page of the 2 MiB at `gpa` for shared.
    fn has_shared(&self, gpa: u64) -> bool {
        (gpa..gpa + LARGE)
            .step_by(PAGE as usize)
            .any(|page| self.is_shared(page))
    }

    /// Takes a request for a quote; the answer comes into the buffer.
    fn quote(&self, buffer: GpaRange) -> VmcallStatus {
        let pages = (buffer.start()..buffer.end()).step_by(PAGE as usize);
        let machine = &self.inner.machine;
        let is_memory = machine.is_ram(buffer.start(), buffer.bytes());
        if !is_memory || !pages.into_iter().all(|page| self.is_shared(page)) {
            return VmcallStatus::INVALID_OPERAND;
        }
        let mut bytes = [0; QuoteHeader::LEN];
        if self
            .platform()
            .read_memory(buffer.start(), &mut bytes)
            .is_err()
        {
            return VmcallStatus::INVALID_OPERAND;
        }
        let header = QuoteHeader::from_bytes(bytes);
        if header.version != QuoteHeader::VERSION {
            return VmcallStatus::INVALID_OPERAND;
        }
        self.inner.answer_quote(buffer, QuoteStatus::IN_FLIGHT, &[]);
        self.inner.request_quote(buffer, header);
        VmcallStatus::SUCCESS
    }
}

impl std::fmt::Debug for Hypervisor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hypervisor")
            .field("vcpu", &self.vcpu)
            .finish_non_exhaustive()
    }
}
