//! A platform: processors, memory and the module that runs on them.

use crate::arena::Arena;
use crate::call;
use crate::config::PlatformConfig;
use crate::faults::{Fault, Machine};
use crate::guest::Programs;
use crate::kot::{Kot, Package};
use crate::lock::Sharex;
use crate::memory::{KeyRing, MemoryError, PhysicalMemory};
use crate::observe::Observer;
use crate::pamt::Pamt;
use crate::regs::Regs;
use crate::report::ReportKey;
use crate::sept::Tables;
use crate::status::Status;
use crate::td::Td;
use crate::vcpu::{Event, Vcpu};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};

/// Bits of a physical address, key id included.
const PA_BITS: u32 = 52;

/// State of the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
#[repr(u8)]
pub enum SysState {
    /// Waits for TDH.SYS.INIT.
    InitPending = 0,
    /// Waits for TDH.SYS.LP.INIT everywhere and TDH.SYS.CONFIG.
    InitDone = 1,
    /// Waits for TDH.SYS.KEY.CONFIG on every package.
    ConfigDone = 2,
    /// Works.
    Ready = 3,
    /// After TDH.SYS.SHUTDOWN.
    Shutdown = 4,
}

impl SysState {
    /// The name in the manuals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            SysState::InitPending => "INIT_PENDING",
            SysState::InitDone => "INIT_DONE",
            SysState::ConfigDone => "CONFIG_DONE",
            SysState::Ready => "READY",
            SysState::Shutdown => "SHUTDOWN",
        }
    }
}

/// Reasons for which a logical processor cannot execute a request. These are not statuses of the module: on
/// hardware the situation cannot arise, or the instruction faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LpError {
    /// No such processor.
    Unknown {
        /// Its number.
        lp: usize,
    },
    /// Another thread is executing on it.
    Busy {
        /// Its number.
        lp: usize,
    },
    /// It has been taken offline.
    Offline {
        /// Its number.
        lp: usize,
    },
    /// It is inside a TD, where only the guest executes.
    InsideTd {
        /// Its number.
        lp: usize,
    },
    /// It is not inside a TD.
    OutsideTd {
        /// Its number.
        lp: usize,
    },
}

impl core::fmt::Display for LpError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            LpError::Unknown { lp } => write!(f, "there is no processor {lp}"),
            LpError::Busy { lp } => write!(f, "processor {lp} is executing for another thread"),
            LpError::Offline { lp } => write!(f, "processor {lp} is offline"),
            LpError::InsideTd { lp } => write!(f, "processor {lp} is inside a TD"),
            LpError::OutsideTd { lp } => write!(f, "processor {lp} is not inside a TD"),
        }
    }
}

impl std::error::Error for LpError {}

/// Result of a SEAMCALL for the processor that executed it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// Back in the host, with this status in RAX.
    Returned(Status),
    /// TDH.VP.ENTER has entered the TD; the guest runs.
    Entered {
        /// The guest's registers.
        guest: Regs,
        /// An event delivered with the entry.
        injected: Option<Event>,
        /// The VM that runs: 0 is L1, 1 to 3 are its L2 VMs.
        vm: u8,
    },
}

/// The vCPU that a processor inside a TD runs, and the locks it holds until the TD exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) td: u32,
    pub(crate) vcpu: u32,
    pub(crate) tdvpr: u64,
}

#[derive(Debug, Default)]
pub(crate) struct LpState {
    pub(crate) running: Option<Running>,
}

/// A logical processor. Padded, so that processors do not share cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Lp {
    pub(crate) package: usize,
    pub(crate) state: Mutex<LpState>,
    pub(crate) initialised: AtomicBool,
    pub(crate) offline: AtomicBool,
    pub(crate) pending: AtomicU8,
    /// An interrupt that is gone once it has caused an exit.
    pub(crate) kicked: AtomicBool,
    pub(crate) interrupts_enabled: AtomicBool,
    /// Calls counted while transient faults are armed.
    pub(crate) transient_calls: AtomicU64,
}

impl Lp {
    /// Any event that interrupts the guest.
    pub(crate) fn guest_event_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire) != 0 || self.kicked.load(Ordering::Acquire)
    }

    /// Any event that interrupts the host, INTR counting only if enabled.
    pub(crate) fn host_event_pending(&self) -> bool {
        use crate::faults::pending::INTR;
        let pending = self.pending.load(Ordering::Acquire);
        pending & !INTR != 0
            || pending & INTR != 0 && self.interrupts_enabled.load(Ordering::Acquire)
    }
}

/// A machine with a TDX module. Shared by reference between threads; one thread at a time executes on each of
/// its processors.
pub struct Platform {
    pub(crate) cfg: PlatformConfig,
    pub(crate) mem: PhysicalMemory,
    pub(crate) machine: Machine,
    pub(crate) global: Sharex,
    sys_state: AtomicU8,
    /// IA32_TSC_ADJUST at TDH.SYS.INIT.
    pub(crate) boot_tsc_adjust: AtomicU64,
    pub(crate) lps: Box<[Lp]>,
    pub(crate) in_td: AtomicU32,
    pub(crate) packages: Box<[Package]>,
    pub(crate) key_configured: AtomicU64,
    pub(crate) kot: Kot,
    pub(crate) pamt: OnceLock<Pamt>,
    pub(crate) tds: Arena<Td, 8>,
    pub(crate) vcpus: Arena<Vcpu, 8>,
    pub(crate) tables: Tables,
    pub(crate) programs: Programs,
    pub(crate) observer: Observer,
    pub(crate) report_key: ReportKey,
}

impl core::fmt::Debug for Platform {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Platform")
            .field("state", &self.sys_state())
            .field("lps", &self.lps.len())
            .field("tds", &self.tds.in_use())
            .field("vcpus", &self.vcpus.in_use())
            .finish_non_exhaustive()
    }
}

impl Platform {
    /// The machine just after reset; `cfg` has been checked.
    pub(crate) fn new(cfg: PlatformConfig) -> Self {
        let mut seed = [0; 32];
        match cfg.seed {
            Some(s) => seed[..8].copy_from_slice(&s.to_le_bytes()),
            // Keys of a simulation guard nothing; without an entropy source they are merely predictable.
            None => getrandom::fill(&mut seed).unwrap_or_default(),
        }
        let rng_seed = cfg.rng_seed.unwrap_or_else(|| {
            let mut word = [0; 8];
            word.copy_from_slice(&seed[24..]);
            cfg.seed.unwrap_or(u64::from_le_bytes(word))
        });
        let keys = KeyRing::new(cfg.encrypt_memory, cfg.escrow_keys, seed);
        Platform {
            mem: PhysicalMemory::new(cfg.memory_bytes, keys),
            machine: Machine::new(rng_seed),
            global: Sharex::default(),
            sys_state: AtomicU8::new(0),
            boot_tsc_adjust: AtomicU64::new(0),
            lps: cfg
                .lp_package
                .iter()
                .map(|&package| Lp {
                    package,
                    ..Lp::default()
                })
                .collect(),
            in_td: AtomicU32::new(0),
            packages: (0..cfg.packages).map(|_| Package::default()).collect(),
            key_configured: AtomicU64::new(0),
            kot: Kot::new(cfg.private_hkids.0, cfg.private_hkids.1),
            pamt: OnceLock::new(),
            tds: Arena::new(),
            vcpus: Arena::new(),
            tables: Arena::new(),
            programs: Programs::default(),
            observer: Observer::new(cfg.lp_package.len(), cfg.trace_depth),
            report_key: ReportKey::new(&seed),
            cfg,
        }
    }

    /// The configuration of the platform.
    #[must_use]
    pub fn config(&self) -> &PlatformConfig {
        &self.cfg
    }

    /// State of the module.
    #[must_use]
    pub fn sys_state(&self) -> SysState {
        match self.sys_state.load(Ordering::Acquire) {
            0 => SysState::InitPending,
            1 => SysState::InitDone,
            2 => SysState::ConfigDone,
            3 => SysState::Ready,
            _ => SysState::Shutdown,
        }
    }

    pub(crate) fn set_sys_state(&self, to: SysState) {
        self.sys_state.store(to as u8, Ordering::Release);
    }

    pub(crate) fn lp(&self, lp: usize) -> Result<(&Lp, MutexGuard<'_, LpState>), LpError> {
        let this = self.lps.get(lp).ok_or(LpError::Unknown { lp })?;
        let state = match this.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(LpError::Busy { lp }),
        };
        Ok((this, state))
    }

    /// Executes SEAMCALL on a processor: RAX is leaf and version; on return RAX is the status and the other
    /// output registers are as the leaf sets them. TDH.VP.ENTER runs the vCPU's guest program until the
    /// TD exit.
    ///
    /// # Errors
    /// The processor cannot execute at all; `regs` is then unchanged.
    pub fn seamcall(&self, lp: usize, regs: &mut Regs) -> Result<Status, LpError> {
        match self.seamcall_step(lp, regs)? {
            Flow::Returned(status) => Ok(status),
            Flow::Entered {
                guest,
                injected,
                vm,
            } => self.run_program(lp, vm, guest, injected, regs),
        }
    }

    /// Like [`Platform::seamcall`], but leaves the processor inside the TD after a successful entry. The
    /// caller then plays the guest with [`Platform::guest_event`] until it exits.
    ///
    /// # Errors
    /// As for [`Platform::seamcall`].
    pub fn seamcall_step(&self, lp: usize, regs: &mut Regs) -> Result<Flow, LpError> {
        let (this, mut state) = self.lp(lp)?;
        if state.running.is_some() {
            return Err(LpError::InsideTd { lp });
        }
        // One that goes offline inside a TD still leaves it, hence the check only here.
        if this.offline.load(Ordering::Acquire) {
            return Err(LpError::Offline { lp });
        }
        Ok(call::dispatch(self, lp, this, &mut state, regs))
    }

    /// Arms a fault.
    pub fn inject(&self, fault: Fault) {
        self.machine.inject(fault);
    }

    /// Makes events pending on a processor ([`crate::pending`]); they stay until changed. Unknown
    /// processors are ignored.
    pub fn set_pending(&self, lp: usize, events: u8) {
        if let Some(lp) = self.lps.get(lp) {
            lp.pending.store(events & 7, Ordering::Release);
        }
    }

    /// Sends a processor an interrupt that is served once: if it runs a guest, the guest exits.
    pub fn kick(&self, lp: usize) {
        if let Some(lp) = self.lps.get(lp) {
            lp.kicked.store(true, Ordering::Release);
        }
    }

    /// Sets the host's RFLAGS.IF on a processor.
    pub fn set_interrupts_enabled(&self, lp: usize, enabled: bool) {
        if let Some(lp) = self.lps.get(lp) {
            lp.interrupts_enabled.store(enabled, Ordering::Release);
        }
    }

    /// Takes a processor offline or back. One that is inside a TD leaves it at its next interruption.
    pub fn set_offline(&self, lp: usize, offline: bool) {
        if let Some(this) = self.lps.get(lp) {
            this.offline.store(offline, Ordering::Release);
        }
    }

    /// Returns true if a processor exists and is not offline.
    #[must_use]
    pub fn is_online(&self, lp: usize) -> bool {
        let online = |this: &Lp| !this.offline.load(Ordering::Acquire);
        self.lps.get(lp).is_some_and(online)
    }

    /// The address without key id, if it is one of RAM.
    fn ram(&self, pa: u64, len: usize) -> Result<u64, MemoryError> {
        let at = self.cfg.strip(pa);
        match pa >> PA_BITS == 0 && self.mem.contains(at, len as u64) {
            true => Ok(at),
            false => Err(MemoryError::OutOfRange { pa }),
        }
    }

    pub(crate) fn host_access(&self, pa: u64, len: usize) -> Result<u64, MemoryError> {
        let keyid = self.cfg.keyid_of(pa);
        if pa >> PA_BITS == 0 && self.cfg.is_private_hkid(keyid) {
            return Err(MemoryError::PrivateKeyId { keyid });
        }
        self.ram(pa, len)
    }

    /// Reads memory as the host does: private memory shows ciphertext.
    ///
    /// # Errors
    /// The range is not RAM, or the address carries a private key id.
    pub fn read_memory(&self, pa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let at = self.host_access(pa, buf.len())?;
        self.mem.host_read(at, buf);
        Ok(())
    }

    /// Writes memory as the host does. Private memory so written is lost to the TD, which finds out at its
    /// next read.
    ///
    /// # Errors
    /// As for [`Platform::read_memory`].
    pub fn write_memory(&self, pa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let at = self.host_access(pa, data.len())?;
        self.mem.host_write(at, data);
        Ok(())
    }

    /// Reads memory as the last writer of each line sees it, which is impossible on a real machine. Lines under a
    /// dead key show ciphertext, unless the platform escrows keys. Key-id bits are ignored.
    ///
    /// # Errors
    /// The range is not RAM.
    pub fn peek_memory(&self, pa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let at = self.ram(pa, buf.len())?;
        self.mem.peek(at, buf);
        Ok(())
    }
}
