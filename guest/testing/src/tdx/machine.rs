//! A machine with one TD, built by SEAMCALLs as a host builds it.

use crate::layout::{Layout, Page};
use kvm_ops_guest::PageSize;
use kvm_ops_guest::tdx::Gpaw;
use soft_tdx_module::{
    BuildError as PlatformError, CallError, Code, HostLeaf as L, MemoryError, Platform,
    PlatformBuilder, Range, Regs, SeptState, SeptView, Status, Tdmr,
};

const GIB: u64 = 1 << 30;
const HKID: u64 = 33;
/// Pages of a TDCS beside TDR, and of a TDVPS beside TDVPR.
const TDCX_PAGES: usize = 6;
const VCPU_PAGES: usize = 5;
/// EPT of four and of five levels, write-back.
const EPTP_4_LEVELS: u64 = 0x1E;
const EPTP_5_LEVELS: u64 = 0x26;
const GPAW_52: u64 = 1;
/// x87 and SSE.
const XFAM: u64 = 3;
const TSC_1_GHZ: u64 = 40;
/// A call that finds a lock taken is tried so often.
const BUSY_TRIES: u32 = 1 << 20;

/// What a TD is made of.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) gpaw: Gpaw,
    pub(super) attributes: u64,
    pub(super) vcpus: usize,
    pub(super) ram: u64,
    pub(super) seed: u64,
    pub(super) measurement_ids: [[u8; 48]; 3],
    pub(super) layout: Layout,
}

/// The platform, and the TD's place on it.
///
/// Physical memory: the guest's shared memory (its shared EPT maps every page to the same address), then
/// the region of private pages and control structures, its metadata, and a GiB that only the host
/// uses.
pub(super) struct Machine {
    pub(super) p: Platform,
    pub(super) gpaw: Gpaw,
    pub(super) ram: u64,
    pub(super) tdr: u64,
    pub(super) tdvprs: Vec<u64>,
    staging: u64,
}

/// Private pages that are free, by level.
#[derive(Debug)]
pub(super) struct Pool {
    next: u64,
    end: u64,
    free: [Vec<u64>; 2],
}

impl Pool {
    /// A page of the host that no TD has.
    pub(super) fn take(&mut self, size: PageSize) -> Option<u64> {
        let free = self.free.get_mut(size as usize)?;
        if let Some(page) = free.pop() {
            return Some(page);
        }
        let page = self.next.next_multiple_of(size.bytes());
        let end = page
            .checked_add(size.bytes())
            .filter(|end| *end <= self.end)?;
        self.next = end;
        Some(page)
    }

    /// A page that has come back from the TD.
    pub(super) fn give_back(&mut self, page: u64, size: PageSize) {
        if let Some(free) = self.free.get_mut(size as usize) {
            free.push(page);
        }
    }
}

/// Why the machine did not do what its host wanted.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineError {
    /// The platform cannot be built.
    Platform(PlatformError),
    /// A SEAMCALL failed.
    Call(CallError),
    /// Memory of the host does not exist, or is not the host's to touch.
    Memory(MemoryError),
    /// The host has no private page left.
    Full,
}

impl std::fmt::Display for MachineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Platform(_) => "no machine",
            Self::Call(_) => "a call of the host failed",
            Self::Memory(_) => "no access to the host's memory",
            Self::Full => "the host has no private page left",
        })
    }
}

impl std::error::Error for MachineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Platform(error) => Some(error),
            Self::Call(error) => Some(error),
            Self::Memory(error) => Some(error),
            Self::Full => None,
        }
    }
}

impl From<PlatformError> for MachineError {
    fn from(error: PlatformError) -> Self {
        Self::Platform(error)
    }
}

impl From<CallError> for MachineError {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl From<MemoryError> for MachineError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

/// A lock is taken, for a moment.
pub(super) fn is_busy(status: Status) -> bool {
    let code = status.code();
    code == Code::OPERAND_BUSY || code == Code::PREVIOUS_TLB_EPOCH_BUSY || code == Code::SYS_BUSY
}

/// Operands RCX and RDX.
pub(super) fn operands(rcx: u64, rdx: u64) -> Regs {
    Regs {
        rcx,
        rdx,
        ..Regs::default()
    }
}

impl Machine {
    /// A TD that can run, with the pages of its layout.
    pub(super) fn new(config: &Config) -> Result<(Self, Pool), MachineError> {
        let base = config.ram.next_multiple_of(GIB).max(GIB);
        let private = Range::new(base, base + GIB);
        let tdmr = Tdmr::with_pamt_at(private, private.end());
        let staging = tdmr.pamt_1g.end().next_multiple_of(GIB);
        let p = PlatformBuilder::new()
            // One for each vCPU, and one for the host.
            .processors(std::iter::repeat_n(0, config.vcpus + 1))
            .memory(staging + GIB)
            .cmrs([Range::new(base, staging - base)])
            .seamrr(Range::new(staging + GIB / 2, 32 << 20))
            .tdmrs([tdmr])
            .seed(config.seed)
            .build()?;
        p.bring_up()?;
        let mut pool = Pool {
            next: private.base,
            end: private.end(),
            free: [Vec::new(), Vec::new()],
        };
        let mut machine = Self {
            p,
            gpaw: config.gpaw,
            ram: config.ram,
            tdr: pool.take(PageSize::Size4K).ok_or(MachineError::Full)?,
            tdvprs: Vec::new(),
            staging,
        };
        machine.create_td(config, &mut pool)?;
        for lp in 0..config.vcpus {
            machine.create_vcpu(lp, &mut pool)?;
        }
        for page in config.layout.launched() {
            machine.add(page, &mut pool)?;
        }
        machine.host_call(L::MrFinalize, operands(machine.tdr, 0))?;
        for (gpa, size) in config.layout.pending() {
            let page = pool.take(size).ok_or(MachineError::Full)?;
            machine.aug(gpa, size, page, &mut pool)?;
        }
        Ok((machine, pool))
    }

    fn create_td(&self, config: &Config, pool: &mut Pool) -> Result<(), MachineError> {
        self.host_call(L::MngCreate, operands(self.tdr, HKID))?;
        self.host_call(L::MngKeyConfig, operands(self.tdr, 0))?;
        self.add_pages(TDCX_PAGES, L::MngAddcx, self.tdr, pool)?;
        let (eptp, flags) = match config.gpaw {
            Gpaw::Bits48 => (EPTP_4_LEVELS, 0),
            Gpaw::Bits52 => (EPTP_5_LEVELS, GPAW_52),
        };
        let params = [
            (0, config.attributes),
            (8, XFAM),
            (16, config.vcpus as u64),
            (24, eptp),
            (32, flags),
            (40, TSC_1_GHZ),
        ];
        for (offset, value) in params {
            let at = self.staging + offset;
            self.p.write_memory(at, &value.to_le_bytes())?;
        }
        for (offset, id) in [80, 128, 176].into_iter().zip(&config.measurement_ids) {
            self.p.write_memory(self.staging + offset, id)?;
        }
        self.host_call(L::MngInit, operands(self.tdr, self.staging))?;
        Ok(())
    }

    fn create_vcpu(&mut self, lp: usize, pool: &mut Pool) -> Result<(), MachineError> {
        let tdvpr = pool.take(PageSize::Size4K).ok_or(MachineError::Full)?;
        self.host_call(L::VpCreate, operands(tdvpr, self.tdr))?;
        self.add_pages(VCPU_PAGES, L::VpAddcx, tdvpr, pool)?;
        // On the processor that the vCPU runs on: this associates it.
        self.p.call(lp, L::VpInit, operands(tdvpr, 0))?;
        self.tdvprs.push(tdvpr);
        Ok(())
    }

    fn add_pages(
        &self,
        count: usize,
        leaf: L,
        to: u64,
        pool: &mut Pool,
    ) -> Result<(), MachineError> {
        for _ in 0..count {
            let page = pool.take(PageSize::Size4K).ok_or(MachineError::Full)?;
            self.host_call(leaf, operands(page, to))?;
        }
        Ok(())
    }

    /// Adds a page before the TD runs, with its contents.
    fn add(&self, page: &Page, pool: &mut Pool) -> Result<(), MachineError> {
        let source = self.staging + PageSize::Size4K.bytes();
        self.p.write_memory(source, &page.bytes[..])?;
        self.tables(page.gpa, PageSize::Size4K, pool)?;
        let add = Regs {
            r8: pool.take(PageSize::Size4K).ok_or(MachineError::Full)?,
            r9: source,
            ..operands(page.gpa, self.tdr)
        };
        self.host_call(L::MemPageAdd, add)?;
        if page.is_measured {
            for chunk in (0..PageSize::Size4K.bytes()).step_by(256) {
                self.host_call(L::MrExtend, operands(page.gpa + chunk, self.tdr))?;
            }
        }
        Ok(())
    }

    /// The processor of the host.
    pub(super) fn host_lp(&self) -> usize {
        self.p.config().lp_package.len() - 1
    }

    /// A SEAMCALL of the host; a lock that a vCPU holds for a moment is waited for.
    pub(super) fn host_call(&self, leaf: L, operands: Regs) -> Result<Regs, CallError> {
        let mut tries = 0;
        loop {
            match self.p.call(self.host_lp(), leaf, operands) {
                Err(CallError::Leaf { status, .. }) if is_busy(status) && tries < BUSY_TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                other => return other,
            }
        }
    }

    /// The entry at which a walk of the Secure EPT to `level` ends.
    pub(super) fn entry(&self, gpa: u64, level: u8) -> SeptView {
        // The TD lives as long as its machine.
        self.p.sept(self.tdr, gpa, level).unwrap_or(SeptView {
            level,
            state: SeptState::Free,
            entry: 0,
        })
    }

    /// Gives a page of the host at a GPA, with the tables on the way.
    pub(super) fn aug(
        &self,
        gpa: u64,
        size: PageSize,
        page: u64,
        pool: &mut Pool,
    ) -> Result<(), MachineError> {
        self.tables(gpa, size, pool)?;
        let aug = Regs {
            r8: page,
            ..operands(gpa | size as u64, self.tdr)
        };
        self.host_call(L::MemPageAug, aug)?;
        Ok(())
    }

    fn tables(&self, gpa: u64, size: PageSize, pool: &mut Pool) -> Result<(), MachineError> {
        let top = match self.gpaw {
            Gpaw::Bits48 => 3,
            Gpaw::Bits52 => 4,
        };
        for level in (size as u8 + 1..=top).rev() {
            let view = self.entry(gpa, level);
            if (view.level, view.state) == (level, SeptState::Free) {
                let bits = 12 + 9 * level;
                let add = Regs {
                    r8: pool.take(PageSize::Size4K).ok_or(MachineError::Full)?,
                    ..operands(gpa >> bits << bits | u64::from(level), self.tdr)
                };
                self.host_call(L::MemSeptAdd, add)?;
            }
        }
        Ok(())
    }

    /// Returns whether a range of guest-physical addresses is memory.
    pub(super) fn is_ram(&self, gpa: u64, bytes: u64) -> bool {
        gpa.checked_add(bytes).is_some_and(|end| end <= self.ram)
    }
}
